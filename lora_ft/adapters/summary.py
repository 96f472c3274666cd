"""What an adapter will train, found on a base's skeleton before any weight is read: layers, parameters, scales.

    layers(skeleton, cfg) -> Layers(count=210, targets={"q_proj": 30, ...}, trainable=4_884_480, scales=[2.0], ...)

PEFT injects into the skeleton as it will into the base, so that nothing is counted by a rule of our own.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer

from lora_ft import config
from lora_ft.adapters import attach, audit, files, provenance
from lora_ft.models.load import Base

_NAME = "outline"

# alpha / r of published recipes: 0.25 in QLoRA (r 64, alpha 16), 1 to 2 in most guides, 8 in LoRA's own GPT-2 runs
# (r 4, alpha 32). Beyond them a learning rate taken from any of these means another size of update.
_USUAL_SCALE = (0.25, 8.0)


@dataclass(frozen=True)
class Layers:
    """What trains. count: adapted layers. targets: the same by pattern, which may overlap.

    trainable, base: parameters. scales: of the products B A. over_full: layers whose two matrices have as many
    parameters as the layer, or more.
    """

    count: int
    targets: dict[str, int]
    trainable: int
    base: int
    scales: list[float]
    over_full: int


def layers(base: Base, cfg: config.TrainRun) -> Layers:
    """Attach the adapter of a run to its base's skeleton, which is changed by it, and look at what came of it.

    Raises what `attach` raises, and MismatchError where `adapter.init_from` does not fit this base or this adapter.
    """
    candidates = attach.adaptable_layers(base.model)
    resolved = attach.resolve_targets(base.model, candidates, cfg.adapter.targets)
    base_parameters = sum(parameter.numel() for parameter in base.model.parameters())
    token_ids = base.tokenizer.convert_tokens_to_ids(list(cfg.model.added_tokens))
    with torch.device("meta"):
        model = attach.attach(base.model, cfg.adapter, _NAME, 0, token_ids)
    if cfg.adapter.init_from:
        source = Path(cfg.adapter.init_from)
        provenance.check_source(source, files.read_config(source), base, cfg.quant)
        files.check_same_method(source, model.peft_config[_NAME])
        files.check_shapes(model, source, _NAME)
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _NAME in layer.r]
    by_target = {target: attach.matched_layers(candidates, {target}) for target in resolved}
    order = {name: i for i, name in enumerate(candidates)}
    targets: Counter[str] = Counter()
    for target, names in sorted(by_target.items(), key=lambda item: min(order[name] for name in item[1])):
        # all-linear names layers in full where a last part would match the head as well
        targets[target if target in cfg.adapter.targets else target.rpartition(".")[2]] += len(names)
    return Layers(
        count=len(adapted),
        targets=dict(targets),
        trainable=audit.check_trainable(model, _NAME, attach.trainable(model, _NAME)),
        base=base_parameters,
        scales=sorted({float(layer.scaling[_NAME]) for layer in adapted}),
        over_full=sum(_is_over_full(layer) for layer in adapted),
    )


def _is_over_full(layer: LoraLayer) -> bool:
    rows, columns = int(layer.in_features), int(layer.out_features)
    return bool(layer.r[_NAME] * (rows + columns) >= rows * columns)


def warnings(layers: Layers, adapter: config.Adapter) -> Iterator[str]:
    """What is allowed and seldom meant, in sentences."""
    low, high = _USUAL_SCALE
    if not all(low <= scale <= high for scale in layers.scales):
        rule = "alpha / sqrt(r)" if adapter.rslora else "alpha / r"
        yield (
            f"the update is scaled by {' and '.join(f'{scale:.3g}' for scale in layers.scales)} ({rule}); published "
            f"recipes have {low} to {high:g}, most 1 to 2: another scale acts like another learning rate"
        )
    if layers.over_full:
        yield (
            f"{layers.over_full:,} of {layers.count:,} layers get as many parameters from adapter.r as they have "
            "themselves: a lower rank or adapter.modules_to_save does the same with less"
        )
