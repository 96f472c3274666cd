"""Account for every parameter of a base: adapted, trained in full, frozen by design, left out or out of reach.

    account(model, selection, adapter)  ->  {"model.layers.0.self_attn.q_proj.weight": Part.ADAPTED, ...}

A parameter that is not adapted is named by what it is, so that no weight is frozen without being said.
"""

from enum import Enum

from torch import nn
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.adapters.experts import expert_parameters
from lora_ft.adapters.targets import EXCLUDED, Selection, matched_layers
from lora_ft.adapters.text_path import LINEAR, text_path
from lora_ft.models import heads


class Part(Enum):
    """The use of a base's parameter by an adapter; the value is what `check` prints."""

    ADAPTED = "adapted"
    SAVED = "trained in full"  # adapter.modules_to_save
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "norms and biases"
    NOT_CHOSEN = "layers not chosen"  # by adapter.target_modules, or by adapter.exclude
    OFF_PATH = "layers that text does not use"
    LEFT_OUT = "layers left out"  # text uses them, and an adapter could not train them
    EXPERTS = "experts"
    OTHER = "routers, convolutions and other tensors"


TRAINED = (Part.ADAPTED, Part.SAVED)
# Frozen tensors that belong to no linear layer and no embedding.
SPECIAL = (Part.EXPERTS, Part.OTHER)


def account(model: PreTrainedModel, selection: Selection, adapter: config.Adapter) -> dict[str, Part]:
    """Return the part of each parameter of a base without adapter, by name; tied parameters count once."""
    modules = dict(model.named_modules())
    saved = matched_layers(modules, adapter.modules_to_save)
    unused, experts = text_path(model).unused, expert_parameters(model)
    homes = {name.rpartition(".")[0]: parameter.shape[0] for name, parameter in experts.items()}
    parts: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if any(owner == module or owner.startswith(f"{module}.") for module in saved):
            parts[name] = Part.SAVED
        elif name in unused:
            parts[name] = Part.OFF_PATH
        elif name in experts:
            parts[name] = Part.ADAPTED if name in selection.experts else Part.EXPERTS
        elif parameter.dim() < 2 or ("bias" in name and parameter.shape[0] == homes.get(owner)):
            parts[name] = Part.VECTOR  # the biases of experts are vectors too, one for each
        else:
            parts[name] = _part(model, owner, modules[owner], selection)
    return parts


def _part(model: PreTrainedModel, name: str, module: nn.Module, selection: Selection) -> Part:
    if name in selection.layers:
        return Part.ADAPTED
    if name in selection.left_out:
        return Part.NOT_CHOSEN if selection.left_out[name] == EXCLUDED else Part.LEFT_OUT
    if module is heads.head(model):
        return Part.HEAD
    if isinstance(module, nn.Embedding):
        return Part.EMBEDDING
    if isinstance(module, LINEAR):
        return Part.NOT_CHOSEN
    return Part.OTHER
