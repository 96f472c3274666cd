"""Count the layers and parameters that an adapter trains, and those it cannot reach, on a base without weights.

    layers(meta_model, cfg) -> Layers(count=210, targets={"q_proj": 30, ...}, trainable=4_884_480, scales=[2.0], ...)

PEFT injects its layers into the model without weights as it does into the real one, so the counts are PEFT's own.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.adapters import attach, audit, files, init, peft_folder, provenance, targets
from lora_ft.adapters.accounting import SPECIAL, TRAINED, Part, account
from lora_ft.adapters.experts import hindrance
from lora_ft.adapters.targets import EXCLUDED, SWITCHED_OFF
from lora_ft.adapters.text_path import NOT_CALLED, text_path
from lora_ft.errors import ConfigError
from lora_ft.models import quantize, stored
from lora_ft.models.load import Base

_NAME = "summary"

# lora_alpha / r of published recipes: 0.25 in QLoRA (r 64, alpha 16), 1 to 2 in most guides, 8 in the LoRA paper for
# GPT-2 (r 4, alpha 32). Outside of this range, a learning rate of these recipes gives updates of another size.
_USUAL_SCALE = (0.25, 8.0)

# Routers and convolutions are far below this share of a large model's weights, experts far above it.
_NOTABLE_SHARE = 0.01


@dataclass(frozen=True)
class Layers:
    """Counts of a base's layers and parameters, for one adapter.

    count: adapted layers and parameters of experts. targets: the same by the last part of their name. left_out: those
    that target_modules selects and that are not adapted, by reason and name, such as {"without a gradient":
    {"q_proj": 27}}. trainable, base: parameters. experts: trainable parameters of experts' matrices. scales: factors of
    the products B A. over_full: layers whose A and B have at least as many parameters as the layer. parts: the base's
    parameters by what they are to the adapter (adapters/accounting.py).
    quantized: parameters that the quantization changes. quantization: its kind, "none" without one.
    frozen_experts: the reasons of experts that the adapter does not train, "" if target_modules does not select them.
    not_adapted: parameters of experts, routers and convolutions that the adapter does not train, by the last two parts
    of their names, largest first, such as {"experts.gate_up_proj": 9_663_676_416, ...}. not_quantized: the same of
    those that quantization does not change, whether they are adapted or not; empty without quantization.
    not_quantized_bytes: their size in memory.
    """

    count: int
    targets: dict[str, int]
    left_out: dict[str, dict[str, int]]
    trainable: int
    experts: int
    base: int
    scales: list[float]
    over_full: int
    parts: dict[str, int]
    quantized: int
    quantization: str
    frozen_experts: list[str]
    not_adapted: dict[str, int]
    not_quantized: dict[str, int]
    not_quantized_bytes: int

    @property
    def adapted(self) -> int:
        """Parameters of the base that the adapter changes: weights of adapted layers, and layers trained in full."""
        return sum(self.parts.get(part.value, 0) for part in TRAINED)

    @property
    def frozen(self) -> dict[str, int]:
        """Parameters of the base that do not change, by what they are, largest first."""
        return {name: size for name, size in self.parts.items() if name not in {part.value for part in TRAINED}}


def layers(base: Base, cfg: config.TrainRun, task_type: str = "CAUSAL_LM") -> Layers:
    """Attach the adapter of a run to its base without weights, which this changes, and count the result.

    Raises the errors of `attach`, and MismatchError if `adapter.init_from` does not match this base or this adapter.
    """
    parameters = dict(base.model.named_parameters())
    quant = stored.agreed(cfg.quant, base.identity.stored)
    of_files, quantizes = base.identity.stored, quant.kind is not config.QuantKind.none
    planned = quantize.planned_layers(base.model, of_files) if quantizes else []
    _check_bypassed(base.model, planned, quant)
    quantized = {f"{name}.weight" for name in planned if f"{name}.weight" in parameters}
    quantized |= set(quantize.planned_experts(base.model, of_files) if quantizes else [])
    rounded = targets.to_be_quantized(base.model, quant, of_files)
    selection = targets.select(base.model, cfg.adapter, rounded)
    parts = account(base.model, selection, cfg.adapter)
    not_adapted = [name for name, part in parts.items() if part in SPECIAL]
    special = [name for name in parts if name in not_adapted or name in selection.experts]
    not_quantized = [name for name in special if quantizes and name not in quantized]
    token_ids = base.tokenizer.convert_tokens_to_ids(list(cfg.model.added_tokens))
    with torch.device("meta"):
        model = attach.attach(base.model, cfg.adapter, _NAME, 0, token_ids, task_type, rounded)
    init.find(cfg.adapter.init)
    if cfg.adapter.init_from:
        source = Path(cfg.adapter.init_from)
        provenance.check_source(source, peft_folder.read_config(source), base, cfg.quant)
        peft_folder.check_same_method(source, model.peft_config[_NAME])
        files.check_shapes(model, source, _NAME)
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _NAME in layer.r]
    return Layers(
        count=len(adapted),
        targets=selection.counts(),
        left_out=_by_reason(selection.left_out),
        trainable=audit.check_trainable(model, _NAME, attach.trainable(model, _NAME)),
        experts=sum(_size(layer) for layer in adapted if getattr(layer, "num_experts", 1) > 1),
        base=sum(parameter.numel() for parameter in parameters.values()),
        scales=sorted({float(layer.scaling[_NAME]) for layer in adapted}),
        over_full=sum(_is_over_full(layer) for layer in adapted),
        parts=_by_part(parts, parameters),
        quantized=sum(parameters[name].numel() for name in quantized),
        quantization=quant.kind.value,
        frozen_experts=list(
            dict.fromkeys(selection.left_out.get(n, "") for n, part in parts.items() if part is Part.EXPERTS)
        ),
        not_adapted=_sizes({name: parameters[name] for name in not_adapted}),
        not_quantized=_sizes({name: parameters[name] for name in not_quantized}),
        not_quantized_bytes=sum(parameters[name].nbytes for name in not_quantized),
    )


def _check_bypassed(model: PreTrainedModel, planned: list[str], quant: config.Quant) -> None:
    """Raise ConfigError if code of the model multiplies by a weight that would be quantized, past its layer."""
    if names := sorted({targets.short(name) for name in text_path(model).bypassed.intersection(planned)}):
        raise ConfigError(
            f"quant={quant.kind.value}: the code of {model.config.model_type} reads the weights of {', '.join(names)} "
            "outside of these layers, where it cannot use quantized ones: set quant=none"
        )


def _by_reason(left_out: dict[str, str]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for name, reason in left_out.items():
        found.setdefault(reason, Counter())[targets.short(name)] += 1
    return {reason: dict(names) for reason, names in found.items()}


def _by_part(parts: dict[str, Part], parameters: dict[str, torch.nn.Parameter]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, part in parts.items():
        sizes[part.value] += parameters[name].numel()
    return dict(sizes.most_common())


def _sizes(parameters: dict[str, torch.nn.Parameter]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, parameter in parameters.items():
        sizes[".".join(name.split(".")[-2:])] += parameter.numel()
    return dict(sizes.most_common())


def _size(layer: LoraLayer) -> int:
    return sum(matrix[_NAME].weight.numel() for matrix in (layer.lora_A, layer.lora_B))


def _is_over_full(layer: LoraLayer) -> bool:
    rows, columns = int(layer.in_features), int(layer.out_features)
    return bool(layer.r[_NAME] * (rows + columns) >= rows * columns)


def warnings(layers: Layers, cfg: config.TrainRun) -> Iterator[str]:
    """Yield warnings about settings that are allowed but rarely intended."""
    low, high = _USUAL_SCALE
    if not all(low <= scale <= high for scale in layers.scales):
        rule = "lora_alpha / sqrt(r)" if cfg.adapter.use_rslora else "lora_alpha / r"
        yield (
            f"the update is scaled by {' and '.join(f'{scale:.3g}' for scale in layers.scales)} ({rule}); published "
            f"recipes use {low} to {high:g}, most of them 1 to 2: a larger scale acts like a larger learning rate"
        )
    if layers.over_full:
        yield (
            f"{layers.over_full:,} of {layers.count:,} layers get at least as many adapter parameters as they have "
            "weights: lower adapter.r, or train these layers in full with adapter.modules_to_save"
        )
    left_out = layers.parts.get(Part.LEFT_OUT.value, 0)
    if left_out >= _NOTABLE_SHARE * layers.base:
        yield (
            f"{left_out / layers.base:.1%} of the base's weights ({left_out:,}) are in linear layers that an adapter "
            f"cannot train, and stay frozen: {'; '.join(_untrainable(layers))}"
        )
    if (count := sum(layers.not_adapted.values())) >= _NOTABLE_SHARE * layers.base:
        yield (
            f"{count / layers.base:.1%} of the base's weights ({count:,}) are not adapted and stay frozen "
            f"({_shares(layers.not_adapted, layers.base)}): {_why_frozen(layers, cfg.adapter)}"
        )
    count, size = sum(layers.not_quantized.values()), layers.not_quantized_bytes
    if count >= _NOTABLE_SHARE * layers.base:
        yield (
            f"quant={layers.quantization} quantizes linear layers and experts of transformers' usual form only: "
            f"{count / layers.base:.1%} of the base's weights stay at {round(8 * size / count)} bits each, "
            + (f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB")
        )


def left_out_lines(layers: Layers) -> list[str]:
    """Return a line for each reason for which layers are left out, with their number by name."""
    counts = (
        (reason, ", ".join(f"{n} {name}" for name, n in names.items())) for reason, names in layers.left_out.items()
    )
    return [f"{names} ({reason})" for reason, names in counts]


def _untrainable(layers: Layers) -> list[str]:
    chosen = {
        reason: names for reason, names in layers.left_out.items() if reason not in (EXCLUDED, NOT_CALLED, SWITCHED_OFF)
    }
    return left_out_lines(replace(layers, left_out=chosen))


def _shares(sizes: dict[str, int], whole: int) -> str:
    return ", ".join(f"{name} {size / whole:.1%}" for name, size in sizes.items())


def _why_frozen(layers: Layers, adapter: config.Adapter) -> str:
    """Say why experts, routers or convolutions are frozen, and what would train experts."""
    if not layers.frozen_experts:
        return "an adapter trains linear layers, embeddings and experts, and these are routers or convolutions"
    remedies = {
        "": "adapter.target_modules does not name the experts; adapter.experts=true adds them",
        SWITCHED_OFF: "adapter.experts=false leaves the experts out",
        EXCLUDED: "adapter.exclude names the experts",
    }
    dropout = "set adapter.lora_dropout=0" if adapter.lora_dropout else "set adapter.use_dora=false"
    return "; ".join(
        remedies.get(reason)
        or f"experts: {reason}" + (f"; {dropout} to train them" if reason == hindrance(adapter) else "")
        for reason in layers.frozen_experts
    )
