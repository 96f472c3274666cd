"""Choose the paths from packed documents to the loss: the fastest that give the truth (models/self_check.py).

    packing, attention, loss    all on                     -> same as the truth: done
                                one, two, three of them off -> the first choice that is the same

Each switch that is off has its reason: the problem that the choice has with it on and the others as chosen.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.models import self_check
from lora_ft.models.load import quiet
from lora_ft.ops import attention
from lora_ft.ops.token_loss import Paths

_SWITCHES = {
    "attention": "plain attention",
    "loss": "plain loss",
    "packing": "packing off, one row in a forward pass",
}


def choose_paths(
    model: PreTrainedModel, fast: config.Fast, reference: self_check.Reference
) -> tuple[Paths, str, list[str]]:
    """Set the model's attention; return the paths, a problem that no choice of paths avoids, and lines for the log."""
    lines = [f"plain {name}: fast.{name}=false" for name in ("attention", "loss") if not getattr(fast, name)]
    if fast.loss and not reference.plain_head:
        lines.append("plain loss: the logits are not the product of the head alone")
    wished = [name for name in _SWITCHES if name == "packing" or getattr(fast, name)]
    if not reference.plain_head and "loss" in wished:
        wished.remove("loss")
    plain = plain_name(model)
    problems: dict[frozenset[str], str] = {}
    for count in range(len(wished) + 1):
        for switched_off in map(frozenset, combinations(wished, count)):
            paths = _set(model, plain, frozenset(wished) - switched_off)
            problems[switched_off] = self_check.find_problem(model, paths, reference)
            if not problems[switched_off]:
                lines += [f"{_SWITCHES[name]}: {problems[switched_off - {name}]}" for name in wished
                          if name in switched_off]  # fmt: skip
                return paths, "", [*lines, *_kernel_line(model, paths)]
    return paths, problems[frozenset(wished)], lines


def unchecked_paths(model: PreTrainedModel, fast: config.Fast) -> tuple[Paths, list[str]]:
    """Set the model's attention and return the paths that `fast` asks for."""
    lines = [f"plain {name}: fast.{name}=false" for name in ("attention", "loss") if not getattr(fast, name)]
    switched_on = frozenset(name for name in _SWITCHES if name == "packing" or getattr(fast, name))
    paths = _set(model, plain_name(model), switched_on)
    return paths, [*lines, *_kernel_line(model, paths)]


def plain_name(model: PreTrainedModel) -> str:
    """Return the name of transformers' attention for a model: the one that it has, unless it has ours."""
    own: str = model.config._attn_implementation
    if own != attention.NAME:
        return own
    return attention.PLAIN if model._supports_sdpa else "eager"


def _set(model: PreTrainedModel, plain: str, switched_on: frozenset[str]) -> Paths:
    set_attention(model, attention.NAME if "attention" in switched_on else plain)
    return Paths("packing" in switched_on, "attention" in switched_on, "loss" in switched_on, longest_shared(model))


def longest_shared(model: PreTrainedModel) -> int | None:
    """Return the length up to which documents leave each other's rotary frequencies alone; None for any length.

    `dynamic` and `longrope` frequencies of all tokens follow the largest position of a forward pass.
    """
    limits: list[int] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                text: Any = module.config
                rope = text.rope_parameters if layer is None else text.rope_parameters[layer]
                trained = rope.get("original_max_position_embeddings")
                limits.append(min(trained or text.max_position_embeddings, text.max_position_embeddings))
    return min(limits, default=None)


def set_attention(model: PreTrainedModel, name: str) -> Callable[[], None]:
    """Set the attention implementation, and return the function that sets it back."""
    before = model.config._attn_implementation
    if name != before:
        with quiet():  # a model whose attention cannot be set would log a warning; find_problem tells
            model.set_attn_implementation(name)

    def undo() -> None:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)

    return undo


def _kernel_line(model: PreTrainedModel, paths: Paths) -> list[str]:
    if not paths.passes_starts:
        return []
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ["attention: {} ({})".format(*attention.choose_kernel(model.device, model.dtype, width))]
