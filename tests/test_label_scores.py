"""Scores of labels with a shared prompt, against a loop over labels with transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finished import adapted, settings
from tiny import FAMILIES, MIXTURES, tiny_model
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.data.label_prompts import LabelPrompt
from lora_ft.errors import NonFiniteError
from lora_ft.evaluation import label_scores
from lora_ft.evaluation.comparison import adapter_off
from lora_ft.evaluation.label_scores import LabelScorer
from lora_ft.models.acceleration import accelerated, accelerated_lora
from lora_ft.ops.attention import NAME as PACKED
from lora_ft.ops.token_loss import PLAIN_PATHS

END = 2
# One token, several, one that begins others, and one that is longer than the shortest prompts.
LABELS = [(5, END), (5, 6, END), (5, 6, 7, END), (300, END), (9, 8, 7, 6, 5, END)]
LENGTHS = (3, 20, 20, 1, 40, 33)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[LabelPrompt]:
    generator = np.random.default_rng(0)
    return [LabelPrompt(generator.integers(10, 500, n).astype(np.int32), LABELS, f"row {n}") for n in lengths]


@torch.no_grad()
def loop(model: PreTrainedModel, rows: list[LabelPrompt]) -> np.ndarray:
    """Compute each label after each prompt by itself."""
    scores = np.zeros((len(rows), len(LABELS)))
    for i, row in enumerate(rows):
        for j, label in enumerate(row.label_ids):
            ids = torch.tensor([[*row.prompt_ids, *label]])
            log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
            first = len(row.prompt_ids) - 1
            scores[i, j] = sum(log_probs[first + k, token].item() for k, token in enumerate(label))
    return scores


@pytest.mark.parametrize("tokens", [1, 64, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_a_loop_over_labels(family: str, tokens: int) -> None:
    model = tiny_model(family)
    expected = loop(model, prompts())
    scorer = LabelScorer(prompts(), PLAIN_PATHS, tokens)
    assert scorer.scores(model) == pytest.approx(expected, abs=1e-5) and scorer.problem == ""
    shares = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
    assert scorer.probabilities(model) == pytest.approx(shares, abs=1e-5)


BY_DEFAULT = (("qwen3", "none"), ("llama", "nf4"), ("gpt2", "int8"))


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        pytest.param(family, quant, marks=[] if (family, quant) in BY_DEFAULT else pytest.mark.nightly)
        for family in ("llama", "qwen3", "gpt2")
        for quant in ("none", "nf4", "int8")
    ],
)
def test_scores_of_an_adapter_on_a_quantized_base_equal_those_of_a_loop(
    tmp_path: Path, family: str, quant: str
) -> None:
    """On the paths of training, with the adapter on and off; the loop runs the same model without them."""
    base, model = adapted(settings(tmp_path, family, quant=quant))
    rows = prompts()
    expected = loop(base.model, rows)
    with adapter_off(model):
        expected_off = loop(base.model, rows)
    with accelerated(base.model, config.Fast()) as made, accelerated_lora(model, "first", config.Fast()):
        scorer = LabelScorer(rows, made.paths, 64)
        found = scorer.scores(base.model)
        with adapter_off(model):
            found_off = scorer.scores(base.model)
        documents = label_scores.document_scores(base.model, rows, made.paths, 64)
        assert base.model.config._attn_implementation == PACKED
    assert scorer.problem == ""
    # int8 quantizes activations too, for all rows of a pass in its own way.
    assert found == pytest.approx(expected, abs=1e-5 if quant != "int8" else 0.05)
    assert found_off == pytest.approx(expected_off, abs=1e-5 if quant != "int8" else 0.05)
    assert documents == pytest.approx(expected, abs=1e-5 if quant != "int8" else 0.05)
    assert np.abs(found - found_off).max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_in_bfloat16_differ_by_rounding(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    scorer = LabelScorer(prompts(), PLAIN_PATHS, 64)
    assert scorer.scores(model) == pytest.approx(loop(model, prompts()), abs=0.05) and scorer.problem == ""


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.nightly
def test_scores_of_mixtures_equal_those_of_a_loop(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    scorer = LabelScorer(prompts(), PLAIN_PATHS, 64)
    allowed = 1e-5 if dtype is torch.float32 else 0.05
    assert scorer.scores(model) == pytest.approx(loop(model, prompts()), abs=allowed)
    assert bool(scorer.problem) == (family == "granitemoehybrid")  # its recurrent layers see what is before them


def test_a_model_with_a_recurrent_state_scores_each_label_by_itself() -> None:
    model = tiny_model("granitemoehybrid", dtype=torch.bfloat16)
    rows = prompts((3, 9))
    scorer = LabelScorer(rows, PLAIN_PATHS, 64)
    assert scorer.scores(model) == pytest.approx(loop(model, rows), abs=0.05)
    assert scorer.problem == "labels of a row see each other"


def test_a_prompt_beyond_the_attention_window_is_scored_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    model.config.sliding_window = 16
    calls: dict[str, list[int]] = {}
    for name in ("shared_scores", "document_scores"):
        plain = getattr(label_scores, name)

        def recorded(model, rows, *arguments, name=name, plain=plain):
            calls.setdefault(name, []).extend(len(row.prompt_ids) for row in rows)
            return plain(model, rows, *arguments)

        monkeypatch.setattr(label_scores, name, recorded)
    scorer = LabelScorer(prompts(), PLAIN_PATHS, 64, problem="")
    assert scorer.scores(model) == pytest.approx(loop(model, prompts()), abs=1e-5)
    assert calls == {"shared_scores": [3, 1], "document_scores": [20, 20, 40, 33]}


def test_a_prompt_is_computed_once_for_all_labels() -> None:
    model = tiny_model("llama")
    computed: list[tuple[int, ...]] = []
    model.model.register_forward_hook(lambda module, _, output: computed.append(output.last_hidden_state.shape[:2]))
    LabelScorer(prompts(), PLAIN_PATHS, 10_000, problem="").scores(model)
    longest = max(LENGTHS) + sum(len(label) - 1 for label in LABELS)
    assert computed == [(len(LENGTHS), longest)]


def test_mode_and_attention_are_restored_after_an_error() -> None:
    model = tiny_model("llama").train()
    torch.nn.init.constant_(model.lm_head.weight, torch.inf)
    own = model.config._attn_implementation
    with pytest.raises(NonFiniteError, match="scores of labels are not finite"):
        LabelScorer(prompts(), PLAIN_PATHS, 64).scores(model)
    assert model.training and model.config._attn_implementation == own
