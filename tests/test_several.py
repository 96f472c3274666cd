"""Several values of a setting as people write them: read, or refused with what was meant."""

import re

import pytest

from lora_ft.cli import grid
from lora_ft.cli.composition import CommandLine
from lora_ft.cli.overrides import translate
from lora_ft.errors import ConfigError


def jobs(*overrides: str) -> list[grid.GridJob]:
    return grid.jobs(CommandLine("sweep", ["data.path=rows.jsonl", *overrides]))


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("choice(null,Be short.)", [None, "Be short."]),
        ("choice( null , Be short. )", [None, "Be short."]),
        ("choice('Be short.',\"Be kind, and short.\")", ["Be short.", "Be kind, and short."]),
        ("choice(It's fine.,null)", ["It's fine.", None]),
        ("choice(Be (very, very) short.,Be kind :))", ["Be (very, very) short.", "Be kind :)"]),
        ("choice(Use [a, b] and {c, d}.,null)", ["Use [a, b] and {c, d}.", None]),
        ("choice(50% off: {x} & $HOME!,Größe 你好 \\ ${y})", ["50% off: {x} & $HOME!", "Größe 你好 \\ ${y}"]),
        ("choice('It\\'s \\\\ here',b)", ["It's \\ here", "b"]),
        ("choice('a' and 'b','c')", ["'a' and 'b'", "c"]),
        ("choice(An open ( bracket,b)", ["An open ( bracket", "b"]),
    ],
)
def test_texts_of_a_choice_are_read_literally_and_can_be_typed_again(typed: str, texts: list[str | None]) -> None:
    found = jobs(f"data.system={typed}")
    assert [job.cfg.data.system for job in found] == texts
    for job, text in zip(found, texts, strict=True):
        assert job.overrides[-1] == f"data.system={'null' if text is None else text}"
        assert translate("train", job.overrides[-1:], sweep=False)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("adapter.r=[2,4]", "adapter.r=2,4"),
        ("adapter.r=[2, 4]", "adapter.r=2,4"),
        ("adapter.r=(2,4)", "adapter.r=2,4"),
        ("adapter.r={2,4}", "adapter.r=2,4"),
        ('adapter.r="2,4"', "adapter.r=2,4"),
        ("adapter.r='2, 4'", "adapter.r=2,4"),
        ("adapter.r=2;4", "adapter.r=2,4"),
        ("adapter.r=2 4", "adapter.r=2,4"),
        ("adapter.r=2,4,", "adapter.r=2,4"),
        ("adapter.r=2,,4", "adapter.r=2,4"),
        ("adapter.r=choice([2,4])", "adapter.r=2,4"),
        ("adapter.r=2..8", "adapter.r=range(2,9)"),
        ("adapter.r=[range(2,9,2)]", "adapter.r=range(2,9,2)"),
        ("optim.lr=[1e-4,2e-4]", "optim.lr=1e-4,2e-4"),
        ("adapter.use_rslora=[true,false]", "adapter.use_rslora=true,false"),
        ("quant=[none,nf4]", "quant=none,nf4"),
        ("train.epochs=glob(*)", "train.epochs=1,2"),
        ("adapter.target_modules=[[q_proj],[v_proj]]", "adapter.target_modules=[q_proj],[v_proj]"),
        ("adapter.target_modules=q_proj,v_proj", "adapter.target_modules=[q_proj,v_proj] is one list"),
    ],
)
def test_list_for_a_single_value_names_the_sweep_that_was_meant(override: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(meant)):
        jobs(override)
    with pytest.raises(ConfigError, match=r"adapter\.r takes one value; lora-ft sweep adapter\.r=2,4 trains with each"):
        translate("train", ["adapter.r=[2,4]"], sweep=False)


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("adapter.r=2, 4", [2, 4]),
        ("adapter.r=choice(2, 4)", [2, 4]),
        ("adapter.r=range(2,9,2)", [2, 4, 6, 8]),
        ("train.eval_every_steps=choice(null,5)", [None, 5]),
        ("adapter.target_modules=[q_proj],[q_proj,v_proj]", [["q_proj"], ["q_proj", "v_proj"]]),
    ],
)
def test_values_in_the_notation_of_a_sweep(override: str, values: list[object]) -> None:
    group, _, name = override.partition("=")[0].partition(".")
    assert [getattr(getattr(job.cfg, group), name) for job in jobs(override)] == values
