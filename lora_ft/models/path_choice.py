"""Choose the paths from packed documents to the loss: the fastest that pass the self-check (models/self_check.py).

    packing, attention, loss    all on                     -> the check finds no problem: done
                                one, two, three of them off -> the first choice without a problem

Documents that cannot be packed are rows side by side (with plain attention) or, where that has a problem too, one row
in a forward pass. The log names each switch that is off, with the problem that the check finds if only this switch is
on again.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.models import self_check
from lora_ft.models.build import quiet
from lora_ft.ops import attention
from lora_ft.ops.logits import PRODUCT, LogitMap
from lora_ft.ops.token_loss import Paths

_SWITCHES = {
    "attention": "plain attention",
    "loss": "plain loss",
    "packing": "packing off, one row per forward pass",
}
_PADDED = "packing off, rows of similar length side by side"


def choose_paths(
    model: PreTrainedModel, fast: config.Fast, reference: self_check.Reference | None
) -> tuple[Paths, str, list[str]]:
    """Set the model's attention; return the paths, a problem that all choices have (or ""), and log lines.

    Without a reference no number is checked: the paths are those that `fast` selects, as far as they run.
    """
    lines = [f"plain {name}: fast.{name}=false" for name in ("attention", "loss") if not getattr(fast, name)]
    candidates = [name for name in _SWITCHES if name == "packing" or getattr(fast, name)]
    logit_map = self_check.expected_logit_map(model) if reference is None else reference.logit_map
    if fast.loss and logit_map is None:
        lines.append("plain loss: the logits are not the product with the head, scaled or soft-capped")
        candidates.remove("loss")
    plain = plain_name(model)
    problems: dict[frozenset[str], str] = {}
    for count in range(len(candidates) + 1):
        for off in map(frozenset, combinations(candidates, count)):
            for pads in (True, False) if "packing" in off and reference is not None else (False,):
                paths = _set(model, plain, frozenset(candidates) - off, logit_map or PRODUCT, pads=pads)
                with attention.recorded_calls() as calls:
                    problem = _problem(model, paths, reference)
                if not problem:
                    names = _SWITCHES | ({"packing": _PADDED} if pads else {})
                    lines += [f"{names[name]}: {problems[off - {name}]}" for name in candidates if name in off]
                    kernels = [f"attention: {plain} of transformers"] if pads else _kernel_lines(calls)
                    return paths, "", [*lines, *kernels]
            problems[off] = problem
    return paths, problems[frozenset(candidates)], lines


def _problem(model: PreTrainedModel, paths: Paths, reference: self_check.Reference | None) -> str:
    if reference is None:
        return self_check.find_failure(model, paths)
    return self_check.find_problem(model, paths, reference)


def plain_name(model: PreTrainedModel) -> str:
    """Return the name of a model's plain attention: its current one, or transformers' default if that is ours."""
    own: str = model.config._attn_implementation
    if own != attention.NAME:
        return own
    return attention.PLAIN if model._supports_sdpa else "eager"


def _set(model: PreTrainedModel, plain: str, switched_on: frozenset[str], logit_map: LogitMap, *, pads: bool) -> Paths:
    packing, attends, loss = (name in switched_on for name in ("packing", "attention", "loss"))
    attends &= not pads
    set_attention(model, attention.NAME if attends else plain)
    return Paths(packing, attends, loss, longest_shared(model), logit_map, pads)


def longest_shared(model: PreTrainedModel) -> int | None:
    """Return the length up to which a document does not change the rotary frequencies of others; None for no limit.

    `dynamic` and `longrope` choose the frequencies of all tokens by the largest position of a forward pass.
    """
    limits: list[int] = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)  # of the model, or of each layer type
        for layer, rope_type in (types if isinstance(types, dict) else {None: types}).items():
            if isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope"):
                text: Any = module.config
                rope = text.rope_parameters if layer is None else text.rope_parameters[layer]
                trained = rope.get("original_max_position_embeddings")
                limits.append(min(trained or text.max_position_embeddings, text.max_position_embeddings))
    return min(limits, default=None)


def set_attention(model: PreTrainedModel, name: str) -> Callable[[], None]:
    """Set the attention implementation, and return a function that restores the current one."""
    before = model.config._attn_implementation
    if name != before:
        with quiet():  # transformers only logs a warning if it cannot set the attention; find_problem notices it
            model.set_attn_implementation(name)

    def undo() -> None:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)

    return undo


def _kernel_lines(calls: list[attention.Call]) -> list[str]:
    """Return a log line for each kernel that layers use."""
    return ["attention: {} ({})".format(*kernel) for kernel in dict.fromkeys(call.kernel for call in calls)]
