"""Combine several adapters of one base into one adapter, through PEFT.

    svd        the adapter nearest to sum w s B A, of the highest rank among the sources
    linear     A = sum sqrt(w s) A,  B = sum sqrt(w s) B       equal ranks only; not the sum of the updates
    ties       as linear, of the largest entries whose signs agree (arXiv 2306.01708)
    dare_ties  as ties, of entries drawn at random and scaled up (arXiv 2311.03099)

The distance of the result from the weighted sum of the updates is measured: for unrelated adapters, linear also adds
cross terms such as B1 A2, which nobody trained.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import files, loading, peft_folder, provenance
from lora_ft.errors import ConfigError, MismatchError
from lora_ft.export import truncate
from lora_ft.models.load import Base
from lora_ft.values import Combination

_COMBINED = "combined"


@dataclass(frozen=True)
class Combined:
    """The combined adapter: tensors under PEFT's file keys, and their config.

    `distance` is the norm of its update's difference from the weighted sum of its sources' updates, over that sum's
    norm.
    """

    tensors: dict[str, Tensor]
    config: LoraConfig
    distance: float


def check(base: Base, quant: config.Quant, folders: list[Path]) -> None:
    """Raise MismatchError for an adapter of another base or with more parts than A, B and a scale."""
    for folder in folders:
        saved = peft_folder.read_config(folder)
        peft_folder.check_settings(folder, saved, peft_folder.PLAIN, "; merge it into its base instead")
        if saved.use_dora:
            raise MismatchError(
                f"{folder} is a DoRA adapter, whose magnitudes belong to its own W + s B A and cannot be added to "
                "others: merge it into its base instead"
            )
        provenance.check_source(folder, saved, base, quant)


def combine(
    model: PeftModel, folders: list[Path], weights: list[float], method: Combination, density: float, seed: int
) -> Combined:
    """Combine checked adapters, the first of which is on the model already; the base may have placeholder weights.

    `density` is the fraction of entries that ties and dare_ties keep; `seed` decides the draws of dare_ties. Raises
    ConfigError if the method cannot combine these ranks, MismatchError if the adapters have different layers.
    """
    names = [loading.NAME, *(f"a{number:03}" for number in range(1, len(folders)))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.add_adapter(name, _of_same_layers(peft_folder.read_config(folder), model.peft_config[loading.NAME]))
        files.load_tensors(model, folder, name, placeholders=True)
    parts = [truncate.updates(model, name) for name in names]
    highest = _check_ranks(parts, method)
    for name in names:
        # PEFT scales the matrices that it combines, and would scale an rsLoRA's by sqrt(r) a second time.
        model.peft_config[name].use_rslora = False
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density", category=UserWarning)  # about a density of 1
        torch.manual_seed(seed)
        combination = "cat" if method is Combination.svd else method.value  # the exact sum, truncated below
        model.add_weighted_adapter(names, weights, _COMBINED, combination_type=combination, density=density)
    made = truncate.updates(model, _COMBINED)
    tensors, settings = files.tensors_of(model, _COMBINED), model.peft_config[_COMBINED]
    if method is Combination.svd:
        made = {layer: update.truncated(highest) for layer, update in made.items()}
        tensors, settings = truncate.tensors(model, _COMBINED, made), truncate.settings(settings, made)
    return Combined(tensors, settings, _distance(made, parts, weights))


def _of_same_layers(saved: LoraConfig, first: LoraConfig) -> LoraConfig:
    """Return an adapter's config with the layer patterns of the first one, since PEFT compares the patterns.

    Loading is strict, so an adapter with other layers is still refused.
    """
    return replace(saved, target_modules=first.target_modules, exclude_modules=first.exclude_modules,
                   layers_to_transform=first.layers_to_transform, layers_pattern=first.layers_pattern,
                   fan_in_fan_out=first.fan_in_fan_out, base_model_name_or_path=None)  # fmt: skip


def _check_ranks(parts: list[dict[str, truncate.Update]], method: Combination) -> int:
    """Return the highest rank; raises ConfigError if ranks differ and the method adds matrices entry by entry."""
    ranks = sorted({len(update.values) for part in parts for update in part.values()})
    if method is not Combination.svd and len(ranks) > 1:
        raise ConfigError(
            f"method={method.value} combines adapters of equal rank only, and these have rank "
            f"{', '.join(map(str, ranks))}: use method=svd"
        )
    return ranks[-1]


def _distance(made: dict[str, truncate.Update], parts: list[dict[str, truncate.Update]], weights: list[float]) -> float:
    difference, whole = 0.0, 0.0
    for layer, update in made.items():
        left = torch.cat([weight * part[layer].left for weight, part in zip(weights, parts, strict=True)], dim=1)
        right = torch.cat([part[layer].right for part in parts])
        whole += _squared_norm(left, right)
        difference += _squared_norm(torch.cat([update.left, -left], dim=1), torch.cat([update.right, right]))
    return (max(difference, 0.0) / whole) ** 0.5 if whole else 0.0


def _squared_norm(left: Tensor, right: Tensor) -> float:
    """Return the squared norm of left @ right without computing the product."""
    return float(((left.T @ left) * (right @ right.T)).sum())
