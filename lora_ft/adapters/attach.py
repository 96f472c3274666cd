"""Attach an adapter to a frozen base: choose its layers, check the settings, then let PEFT inject it.

W x  ->  W x + (alpha / r) B A x        A [r, in] random, B [out, r] zero: the model starts as the base

adapter.target_modules=[q_proj,v_proj]  ->  60 layers  ->  120 matrices that train, everything else frozen
"""

import re
import warnings
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft import config
from lora_ft.adapters import targets
from lora_ft.adapters.experts import shapes_only, use_wrappers_that_keep_the_base
from lora_ft.adapters.master_weights import keep_in_float32
from lora_ft.adapters.targets import matched_layers
from lora_ft.errors import ConfigError
from lora_ft.models.cpu_embedding import is_on_cpu


def attach(
    base: PreTrainedModel,
    adapter: config.Adapter,
    name: str,
    seed: int,
    token_ids: list[int],
    task_type: str = "CAUSAL_LM",
    quantized: Collection[str] = (),
) -> PeftModel:
    """Inject the adapter under `name` and return the PEFT model; only its parameters train, in at least fp32.

    The initial matrices depend only on `seed`. `token_ids` are added tokens, whose embedding rows train as well.
    `quantized` are layers that will be quantized, for a base without weights. Raises ConfigError for targets that match
    nothing that can be trained, for settings that cannot be saved or merged correctly (tied embeddings), for quantized
    modules in modules_to_save, and for what PEFT refuses.
    """
    _check_full_modules(base, adapter)
    chosen = targets.select(base, adapter, quantized)
    _check_patterns(adapter, (*chosen.layers, *chosen.experts))
    _check_ties(base, adapter, chosen.layers)
    _check_embedding(base, adapter, chosen.layers, token_ids)
    peft_config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=sorted(chosen.modules),
        target_parameters=sorted(chosen.parameters) or None,
        modules_to_save=sorted(adapter.modules_to_save) or None,
        rank_pattern=_of_parameters(adapter.rank_pattern, chosen.by_weight),
        alpha_pattern=_of_parameters(adapter.alpha_pattern, chosen.by_weight),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in chosen.layers),
        trainable_token_indices=_token_rows(base, token_ids),
        task_type=task_type,
    )
    torch.manual_seed(seed)
    try:
        model = inject(base, peft_config, name)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        detach(base)
        raise ConfigError(f"PEFT cannot attach this adapter to {base.config.model_type}: {error}") from error
    for module in base.modules():
        if isinstance(module, ModulesToSaveWrapper):
            keep_in_float32(module.modules_to_save[name])
    return model


def _of_parameters(pattern: dict[str, Any], by_weight: Collection[str]) -> dict[str, Any]:
    """Return a pattern that also names NAME.weight for the layers that PEFT adapts as parameters."""
    weights = {f"{key}.weight": value for key, value in pattern.items() if matched_layers(by_weight, {key})}
    return dict(pattern) | weights


def detach(base: PreTrainedModel) -> None:
    """Remove every adapter layer from a base, also after an `attach` that failed midway.

    Restores the base's modules, attributes and bytes.
    """
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(base).pop(name, None)
    base.requires_grad_(False)


def inject(model: PreTrainedModel, peft_config: LoraConfig, name: str) -> PeftModel:
    """Let PEFT inject the layers of an adapter, without warnings that a user cannot act on."""
    # PEFT would warn that the base's name differs; provenance.check_source compares hashes instead.
    peft_config.base_model_name_or_path = None
    with warnings.catch_warnings():
        # PEFT 0.21 still reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # PEFT corrects this setting for each layer: GPT-2's head and quantized layers are not Conv1D.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        # PEFT looks for the keys of patterns among layers only, not among parameters; `attach` has checked them.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        with shapes_only(model):
            attached = get_peft_model(model, peft_config, adapter_name=name)
    use_wrappers_that_keep_the_base(attached)
    if peft_config.modules_to_save:  # PEFT adds the names of classifiers' heads, also if they are there
        peft_config.modules_to_save = sorted(set(peft_config.modules_to_save))
    return attached


def base_layer(module: Any) -> Any:
    """Return the base's own layer inside PEFT's wrappers; `module` itself if it is none."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def _token_rows(model: PreTrainedModel, token_ids: list[int]) -> dict[str, list[int]] | None:
    """Return the rows that train for added tokens, by module: of the embedding, and of the head if it is not tied."""
    if not token_ids:
        return None
    ends = [model.get_input_embeddings()]
    if not _tied(model) and model.get_output_embeddings() is not None:
        ends.append(model.get_output_embeddings())
    return {name: token_ids for name, module in model.named_modules() if module in ends}


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_patterns(adapter: config.Adapter, layers: Collection[str]) -> None:
    for key, pattern in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for target, value in pattern.items():
            if not matched_layers(layers, {target}):
                raise ConfigError(f"adapter.{key}: {target} matches no adapted layer")
            if value <= 0:
                raise ConfigError(f"adapter.{key}: the value of {target} must be above 0, got {value}")


def _check_ties(model: PreTrainedModel, adapter: config.Adapter, layers: Collection[str]) -> None:
    """Refuse to train one of two tied matrices: saved or merged, the two would differ (A20, peft issue 2018).

    Raises ConfigError.
    """
    if not _tied(model):
        return
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    names = {name: module for name, module in model.named_modules() if module in ends}
    for key, chosen in (("target_modules", layers), ("modules_to_save", adapter.modules_to_save)):
        if tied := sorted(matched_layers(names, chosen)):
            raise ConfigError(
                f"adapter.{key}: {tied[0]} shares its weight with the other embedding matrix of this model, "
                "which an adapter of one of them would not change: remove it"
            )


def _check_embedding(
    model: PreTrainedModel, adapter: config.Adapter, layers: Collection[str], token_ids: list[int]
) -> None:
    """Raise ConfigError if an embedding that is kept on the CPU is to be trained."""
    embedding = model.get_input_embeddings()
    if not is_on_cpu(embedding):
        return
    name = next(n for n, module in model.named_modules() if module is embedding)
    of_targets, of_modules = (matched_layers([name], chosen) for chosen in (layers, adapter.modules_to_save))
    for key, trained in (("adapter.target_modules", of_targets), ("adapter.modules_to_save", of_modules),
                         ("model.added_tokens", token_ids)):  # fmt: skip
        if trained:
            raise ConfigError(f"{key} trains {name}, which model.embedding_device=cpu keeps on the CPU: remove one")


def _check_full_modules(model: PreTrainedModel, adapter: config.Adapter) -> None:
    modules = dict(model.named_modules())
    for name in adapter.modules_to_save:
        matched = [modules[n] for n in matched_layers(modules, {name})]
        if not matched:
            raise ConfigError(f"adapter.modules_to_save: {name} matches no layer of this model")
        if any(not p.is_floating_point() for module in matched for p in module.parameters()):
            raise ConfigError(f"adapter.modules_to_save: {name} is quantized and cannot be trained: remove it")


# Names of the modules in which PEFT keeps an adapter's parameters; the next part of the path is the adapter's name.
_KINDS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|trainable_tokens_delta"


def trainable(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of adapter `name` in the model's order: matrices, magnitudes, saved modules, token rows."""
    part = re.compile(rf"\.({_KINDS})\.{re.escape(name)}(\.|$)")
    return {n: p for n, p in model.named_parameters() if part.search(n)}


def is_lora_b(parameter: str) -> bool:
    """Return True for the parameter name of a B, the matrix on the output side."""
    return ".lora_B." in parameter or ".lora_embedding_B." in parameter


def starts_at_zero(parameter: str) -> bool:
    """Return True for the parameter name of a matrix that PEFT sets to zero: B, or A of an embedding."""
    return ".lora_B." in parameter or ".lora_embedding_A." in parameter
