"""Base against adapter on one model: the base is bit-identical to the bare one, and the table shows everything."""

from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import ONE, tiny_classifier
from finished import adapted, settings
from rich.console import Console
from states import some_rows
from tiny import FAMILIES, tiny_model

from lora_ft import config
from lora_ft.data.dataset import prepare
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation import heads
from lora_ft.evaluation.comparison import Answers, Comparison, EvalSet, adapter_off, compare, render
from lora_ft.evaluation.generation import generate
from lora_ft.evaluation.loss import EvalLoss, eval_loss
from lora_ft.models.acceleration import accelerate
from lora_ft.models.load import load_base
from lora_ft.objectives.sft import Sft
from lora_ft.ops.batch import LossSum
from lora_ft.ops.token_loss import PLAIN_PATHS

NASTY = "[bold red]no markup[/] \x1b[31mno colour " + "unbroken" * 30


def test_an_evaluation_that_fails_leaves_the_model_in_training_mode() -> None:
    """Else a run that goes on after an error, such as too little memory, would train without dropout."""
    model, classifier = tiny_model("llama").train(), tiny_classifier("llama", ONE).train()

    def failing(*_: object) -> LossSum:
        raise torch.OutOfMemoryError("toy")

    with pytest.raises(torch.OutOfMemoryError):
        eval_loss(model, failing, some_rows(2), PLAIN_PATHS, 100)
    classifier.model.register_forward_pre_hook(failing)
    with pytest.raises(torch.OutOfMemoryError):
        heads.predict(classifier, ONE, some_rows(2), PLAIN_PATHS, 100)
    assert all(module.training for each in (model, classifier) for module in each.modules())


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in FAMILIES]
    + [
        ("llama", {"tie": True, "use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"quant": "nf4"}),
    ],
)
def test_the_base_with_the_adapter_off_is_bit_identical_to_the_bare_base(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    cfg = settings(tmp_path, family, **options)
    _, model = adapted(cfg)
    bare = load_base(cfg.model, cfg.quant, "cpu")
    dataset = prepare(cfg.data, bare.tokenizer)
    assert dataset.eval and dataset.eval_prompts
    paths = accelerate(bare.model, config.Fast()).paths
    accelerate(model.get_base_model(), config.Fast())
    found = compare(model, bare.tokenizer, EvalSet(dataset.eval, dataset.eval_prompts[:2], 100, 8, Sft().loss), paths)
    assert found.base == eval_loss(bare.model, Sft().loss, dataset.eval, paths, 100)
    assert found.adapter.loss != found.base.loss
    assert (found.adapter.tokens, found.adapter.rows) == (found.base.tokens, found.base.rows)
    greedy = config.Sampling(max_new_tokens=8)
    for answers, question in zip(found.answers, dataset.eval_prompts, strict=False):
        assert (answers.question, answers.reference) == (question.prompt, question.answer)
        assert [answers.base] == generate(bare.model, bare.tokenizer, [question.prompt_ids], greedy, 0)
        alone = generate(model.get_base_model(), bare.tokenizer, [question.prompt_ids], greedy, 0)
        assert [answers.adapter] == alone
    assert len(found.answers) == min(2, len(dataset.eval_prompts))


def test_added_tokens_are_disabled_with_the_adapter(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama", tie=True)
    cfg.model.added_tokens = ["<one>", "<two>"]
    _, model = adapted(cfg)
    bare = load_base(cfg.model, cfg.quant, "cpu")
    ids = torch.tensor([[5, 512, 513, 7]])
    with adapter_off(model), torch.no_grad():
        off = model(ids).logits
    assert torch.equal(off, bare.model(ids).logits)
    assert not torch.equal(off, model(ids).logits)


@pytest.mark.closes("A14")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_comparing_restores_mode_and_requires_grad(tmp_path: Path, training: bool, frozen: bool) -> None:
    cfg = settings(tmp_path, "llama")
    base, model = adapted(cfg)
    if frozen:
        model.requires_grad_(False)
    model.train(training)
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    dataset = prepare(cfg.data, base.tokenizer)
    paths = accelerate(base.model, config.Fast()).paths
    state = torch.get_rng_state()
    compare(model, base.tokenizer, EvalSet(dataset.eval, dataset.eval_prompts[:1], 64, 4, Sft().loss), paths)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert base.model.training is training
    assert torch.equal(torch.get_rng_state(), state)


def test_requires_grad_is_restored_after_an_error(tmp_path: Path) -> None:
    _, model = adapted(settings(tmp_path, "llama"))
    model.requires_grad_(False)
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert not any(p.requires_grad for p in model.parameters())


def test_a_nan_loss_is_refused(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "llama")
    base, model = adapted(cfg)
    base.model.model.norm.weight.data[0] = float("nan")
    dataset = prepare(cfg.data, base.tokenizer)
    paths = accelerate(base.model, config.Fast()).paths
    with pytest.raises(NonFiniteError, match="eval loss nan"):
        compare(model, base.tokenizer, EvalSet(dataset.eval, [], 64, 4, Sft().loss), paths)


def comparison(*answers: Answers) -> Comparison:
    return Comparison(EvalLoss(3.1419, 1234, 56), EvalLoss(2.0871, 1234, 56), list(answers))


def shown(width: int, *args: Any) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render(*args))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [20, 99, 100])
def test_no_text_is_truncated_at_any_width(width: int) -> None:
    shown_values = (
        comparison(Answers("Why?", "42", "b", NASTY)),
        {"adapter": "/a/rather/long/path/" * 8},
        {"chrf": (1.0, 2.0)},
    )
    text = shown(width, *shown_values)
    assert all(len(line) <= width for line in text.splitlines())
    # Folded cells interleave their lines, so characters are counted; nothing is folded in a thousand columns.
    assert Counter("".join(text.split())) == Counter("".join(shown(1000, *shown_values).split()))
    if width < 100:
        assert "unbroken" * 30 in "".join(shown(width, *shown_values).split())


@pytest.mark.parametrize("width", [60, 160])
def test_markup_and_control_characters_are_shown_literally(width: int) -> None:
    text = shown(
        width, comparison(Answers("[red]q[/]", "r", "b", "[bold]x[/bold] \x1b[31m")), {"[dim]fact": "[link=a]v"}
    )
    assert "[red]q[/]" in text and "[bold]x[/bold]" in text and "[dim]fact" in text and "[link=a]v" in text
    assert "\x1b" not in text and "\\x1b[31m" in text


def test_answers_are_side_by_side_in_a_wide_terminal_only() -> None:
    answers = comparison(Answers("Why?", "a reference", "the base says", "the adapter says"))
    assert any("the base says" in li and "the adapter says" in li for li in shown(120, answers, {}).splitlines())
    assert not any("the base says" in li and "the adapter says" in li for li in shown(80, answers, {}).splitlines())


def test_scores_and_facts_are_shown_and_a_missing_eval_set_is_reported() -> None:
    text = shown(80, comparison(), {"speed": "12 tokens/s"}, {"chrf": (12.5, 44.25)})
    assert "12.5000" in text and "44.2500" in text and "12 tokens/s" in text
    assert "no eval rows" in shown(80, None, {"speed": "12 tokens/s"})


def test_an_infinite_perplexity_is_shown() -> None:
    assert "over 1e304" in shown(80, Comparison(EvalLoss(800.0, 1, 1), EvalLoss(2.0, 1, 1), []), {})
