"""A run with the template of Qwen3 and its variables: saved with the adapter, used by eval, chat, merge and publish."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import call
from real_templates import real_tokenizer
from tiny import tiny_model
from transformers import AutoTokenizer

import lora_ft
from lora_ft import chat, config
from lora_ft.adapters import loading
from lora_ft.errors import MismatchError
from lora_ft.publishing import verification

CHAT = [{"role": "user", "content": "Which number is Lima?"}]
EMPTY = "<think>\n\n</think>\n\n"


def base_folder(folder: Path) -> Path:
    tokenizer, model = real_tokenizer("qwen3"), tiny_model("qwen3")
    tokenizer.model_max_length = 256
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for saved in (tokenizer, model):
        saved.save_pretrained(folder / "base")
    return folder / "base"


def rows(number: int, thought: str | None = None) -> list[dict[str, Any]]:
    more = {"reasoning_content": thought} if thought else {}
    return [
        {"messages": [{"role": "user", "content": f"Which number is {i}?"},
                      {"role": "assistant", "content": f"It is {i}.", **more}]}
        for i in range(number)
    ]  # fmt: skip


def configured(folder: Path, *overrides: str) -> config.TrainRun:
    base = folder / "base" if (folder / "base").is_dir() else base_folder(folder)
    typed = [f"model.path={base}", "model=local", "device=cpu", "adapter.r=4", "train.max_steps=2", *overrides]
    return lora_ft.compose("train", typed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that trained without thinking; its base is beside it."""
    folder = tmp_path_factory.mktemp("made")
    cfg = configured(folder, "data.template.enable_thinking=false")
    return lora_ft.train(cfg, rows=rows(8), eval_rows=rows(9)[8:], folder=folder / "run").folder


def prompt_of(tokenizer: Any, **variables: Any) -> str:
    return str(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False, **variables))


def test_variables_of_a_run_are_saved_and_used_by_every_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((run / "adapter" / "lora_ft.json").read_text())
    assert record["template"] == {"enable_thinking": False}
    saved = AutoTokenizer.from_pretrained(run / "adapter")
    without = prompt_of(real_tokenizer("qwen3"), enable_thinking=False)
    assert prompt_of(saved) == without and without.endswith(EMPTY)
    assert prompt_of(saved, enable_thinking=True) + EMPTY == without

    asked: list[str] = []
    monkeypatch.setattr(
        chat, "stream", lambda model, tokenizer, prompt, *rest: asked.append(tokenizer.decode(prompt)) or ""
    )
    adapter = [f"adapter_path={run / 'adapter'}", "model=local", f"model.path={run.parent / 'base'}"]
    for source in ([f"run={run}"], adapter, [*adapter, "data.template.enable_thinking=true"]):
        assert call("chat", *source, f"prompt={CHAT[0]['content']}", "device=cpu") == 0
    assert asked == [without, without, without.removesuffix(EMPTY)]
    assert call("chat", f"run={run}", "prompt=a", "data.template.enable_thnking=true", "device=cpu") == 2
    assert "reads no variable of this name; it reads enable_thinking" in capsys.readouterr().err

    assert call("eval", f"run={run}", "device=cpu") == 0
    shown = json.loads((run / "eval.json").read_text())
    assert shown["data_sha256"] == record["data_sha256"]

    assert call("merge", f"run={run}", f"out={tmp_path / 'merged'}", "device=cpu") == 0
    assert prompt_of(AutoTokenizer.from_pretrained(tmp_path / "merged")) == without
    package = tmp_path / "package"
    assert call("publish", f"run={run}", f"to=dir:{package}", "model.hub_id=me/base", "device=cpu") == 0
    assert prompt_of(AutoTokenizer.from_pretrained(package)) == without
    assert json.loads((package / "lora_ft.json").read_text())["template"] == {"enable_thinking": False}


def test_a_package_whose_template_writes_another_prompt_is_refused(run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    tokenizer = loading.adapter_tokenizer(adapter, config.Model())
    cfg = loading.with_base(lora_ft.compose("chat", [f"run={run}", "device=cpu"]), adapter)
    base, _ = loading.open_adapter(adapter, cfg.model, cfg.quant, "cpu", tokenizer)
    arguments = lora_ft.adapters.provenance.loading(base, cfg.quant, cfg.model)
    template = adapter / "chat_template.jinja"
    template.write_text(template.read_text().replace("is defined else false", "is defined else true", 1))
    with pytest.raises(MismatchError, match="writes another prompt than in training"):
        verification.verify(adapter, arguments)


def test_an_adapter_with_variables_may_start_a_run_with_others(run: Path, tmp_path: Path) -> None:
    cfg = configured(run.parent, f"adapter.init_from={run / 'adapter'}")
    again = lora_ft.train(cfg, rows=rows(8), eval_rows=rows(9)[8:], folder=tmp_path / "again")
    assert "template" not in json.loads((again.folder / "adapter" / "lora_ft.json").read_text())


def first_of_answer(folder: Path, **variables: Any) -> tuple[float, float]:
    """Return the probability that an answer begins with a thought, of the base and of the adapter."""
    model, tokenizer = lora_ft.load(folder)
    ids = torch.tensor([tokenizer.encode(prompt_of(tokenizer, **variables), add_special_tokens=False)])
    token = tokenizer.convert_tokens_to_ids("<think>")
    with torch.no_grad():
        adapted = model(input_ids=ids).logits[0, -1].float().softmax(0)[token]
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0, -1].float().softmax(0)[token]
    return float(base), float(adapted)


STEPS = [
    "train.max_steps=80",
    "optim.lr=5e-3",
    "optim.warmup_steps=0",
    "adapter.target_modules=[q_proj,v_proj,up_proj,down_proj]",
]


def thinking_base(folder: Path) -> None:
    """Make a base that thinks: trained on rows with thoughts, and merged."""
    cfg = configured(folder, *STEPS, "data.eval_fraction=0")
    thinker = lora_ft.train(cfg, rows=rows(8, "Let me count."), folder=folder / "thinker").folder
    lora_ft.merge(str(thinker), out=str(folder / "thinks"))


@pytest.mark.nightly
def test_a_thinking_prompt_still_begins_with_a_thought_after_rows_without(tmp_path: Path) -> None:
    """Rows without thoughts unteach them only if the empty thoughts, or answers right after the prompt, are learned."""
    thinking_base(tmp_path)
    found = {}
    for name, overrides in {
        "nonempty": [],
        "off": ["data.template.enable_thinking=false"],
        "true": ["data.train_on_thoughts=true"],
    }.items():
        cfg = configured(tmp_path, *STEPS, "data.eval_fraction=0", f"model.path={tmp_path / 'thinks'}", *overrides)
        made = lora_ft.train(cfg, rows=rows(8), folder=tmp_path / name)
        found[name] = first_of_answer(made.folder, enable_thinking=True)
    assert all(base > 0.9 for base, _ in found.values())
    assert found["nonempty"][1] > 0.9 and found["off"][1] > 0.9
    model, tokenizer = lora_ft.load(tmp_path / "nonempty")
    ids = tokenizer.encode(prompt_of(tokenizer), add_special_tokens=False)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(answer).startswith("<think>\nLet me count.")
