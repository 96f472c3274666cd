"""Put an adapter onto a frozen base: names resolved and counted first, then PEFT injects.

W x  ->  W x + (alpha / r) B A x        A [r, in] random, B [out, r] zero: the start is the base

adapter.target_modules=[q_proj,v_proj]  ->  60 layers  ->  120 matrices that train, everything else frozen
"""

import re
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft import config
from lora_ft.errors import ConfigError

ALL_LINEAR = "all-linear"


def attach(
    base: PreTrainedModel,
    adapter: config.Adapter,
    name: str,
    seed: int,
    token_ids: list[int],
    task_type: str = "CAUSAL_LM",
) -> PeftModel:
    """Inject the adapter under `name` and return the PEFT model; only its parameters train, in fp32 at least.

    `seed` alone decides the initial matrices. `token_ids` are added tokens, whose embedding rows are
    trained beside the adapter. Raises ConfigError for targets that match nothing and for what cannot
    be saved or merged truthfully (tied embeddings, modules_to_save in half precision).
    """
    layers = adaptable_layers(base)
    targets = resolve_targets(base, layers, adapter.target_modules)
    _check_names(base, targets)
    _check_patterns(adapter, matched_layers(layers, targets))
    _check_ties(base, adapter, targets)
    _check_full_modules(base, adapter, token_ids)
    peft_config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=sorted(targets),
        modules_to_save=sorted(adapter.modules_to_save) or None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        fan_in_fan_out=any(isinstance(layers[n], Conv1D) for n in matched_layers(layers, targets)),
        trainable_token_indices=_token_rows(base, token_ids),
        task_type=task_type,
    )
    torch.manual_seed(seed)
    return inject(base, peft_config, name)


def detach(base: PreTrainedModel) -> None:
    """Take every layer of an adapter off its base, also after an `attach` that failed midway.

    The base's modules, attributes and bytes are then those from before.
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
    """PEFT's own injection, without the warnings that nobody can act on."""
    # PEFT would warn that the base's name differs; identity is checked by hashes instead (origin.check_source).
    peft_config.base_model_name_or_path = None
    with warnings.catch_warnings():
        # PEFT 0.21 still reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        # It sets this for each layer as the layer is: GPT-2's head is no Conv1D, nor are its quantized layers.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        return get_peft_model(model, peft_config, adapter_name=name)


def _token_rows(model: PreTrainedModel, token_ids: list[int]) -> dict[str, list[int]] | None:
    """Which rows of which matrices train for added tokens: in the embedding, and in a head of its own to say them."""
    if not token_ids:
        return None
    ends = [model.get_input_embeddings()]
    if not _tied(model) and model.get_output_embeddings() is not None:
        ends.append(model.get_output_embeddings())
    return {name: token_ids for name, module in model.named_modules() if module in ends}


def _tied(model: PreTrainedModel) -> bool:
    head = _unwrapped(model.get_output_embeddings())
    return head is not None and head.weight is _unwrapped(model.get_input_embeddings()).weight  # type: ignore[union-attr]


def adaptable_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that LoRA can adapt, by name: linear (quantized ones too), Conv1D and embeddings."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return {
        name.replace(".base_layer", ""): module
        for name, module in _outside_adapters(model)
        if isinstance(module, kinds)
    }


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the base alone: an adapted layer counts once, as its base layer."""
    inside = {
        f"{prefix}.{child}"
        for prefix, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for child, _ in module.named_modules()
        if child and not child.startswith("base_layer")
    }
    return ((name, module) for name, module in model.named_modules() if name not in inside)


def resolve_targets(model: PreTrainedModel, layers: dict[str, nn.Module], targets: list[str]) -> set[str]:
    """Turn `all-linear` into layer names, shortest that are exact; ConfigError names a target that matches nothing."""
    resolved = {t for t in targets if t != ALL_LINEAR}
    for target in sorted(resolved):
        if not matched_layers(layers, {target}):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(f"adapter.target_modules: {target} matches no layer of this model, which has {known}")
    if ALL_LINEAR in targets:
        head = model.get_output_embeddings()
        linear = {
            name
            for name, module in layers.items()
            if not isinstance(module, nn.Embedding) and module is not _unwrapped(head)
        }
        suffixes = {name.rpartition(".")[2] for name in linear}
        # q_proj says more than 30 full names, and other loaders of the adapter expect it; a suffix
        # that would also match the head or an embedding keeps its full names.
        resolved |= suffixes if matched_layers(layers, suffixes) == linear else linear
    return resolved


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def matched_layers(layers: dict[str, nn.Module], targets: set[str]) -> set[str]:
    """Names of the layers that PEFT's rule selects: a target is a layer's full name or its last part(s)."""
    return {name for name in layers if any(name == t or name.endswith("." + t) for t in targets)}


def _check_names(model: PreTrainedModel, targets: set[str]) -> None:
    """Refuse linear layers that PEFT takes for experts, whose tensors it would adapt in place of the layers.

    Experts were linear layers of these names before transformers 5; shared experts and dense MLPs still are.
    """
    taken, others = set(), set()
    for target in targets | resolve_targets(model, adaptable_layers(model), [ALL_LINEAR]):
        name = target.rpartition(".")[2]
        if not _is_converted(model, name):
            others.add(name)
        elif target in targets:
            taken.add(name)
    if taken:
        raise ConfigError(
            f"adapter.target_modules: PEFT takes {', '.join(sorted(taken))} for the experts of "
            f"{model.config.model_type}, which cannot be trained yet: leave them out, "
            f"as in adapter.target_modules=[{','.join(sorted(others))}]"
        )


def _is_converted(model: PreTrainedModel, target: str) -> bool:
    converted = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError:  # one name of a pair that is one tensor now
        return True
    return converted.target_modules != {target}


def _check_patterns(adapter: config.Adapter, matched: set[str]) -> None:
    for key, pattern in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for target, value in pattern.items():
            if not matched_layers(dict.fromkeys(matched, nn.Identity()), {target}):
                raise ConfigError(f"adapter.{key}: {target} matches no adapted layer")
            if value <= 0:
                raise ConfigError(f"adapter.{key}: {target} must be above 0, got {value}")


def _check_ties(model: PreTrainedModel, adapter: config.Adapter, targets: set[str]) -> None:
    """Refuse to change one of two tied matrices: saved or merged, the pair would fall apart (A20, peft issue 2018)."""
    if not _tied(model):
        return
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    names = {name for name, module in model.named_modules() if module in ends}
    for key, chosen in (("targets", targets), ("modules_to_save", set(adapter.modules_to_save))):
        for name in sorted(names):
            if any(name == c or name.endswith("." + c) for c in chosen):
                raise ConfigError(
                    f"adapter.{key}: {name} shares its weight with the other end of this model; "
                    "an adapter for one of them would be lost in the other. Leave it out."
                )


def _check_full_modules(model: PreTrainedModel, adapter: config.Adapter, token_ids: list[int]) -> None:
    modules = dict(model.named_modules())
    for name in adapter.modules_to_save:
        matched = [module for n, module in modules.items() if n == name or n.endswith("." + name)]
        if not matched:
            raise ConfigError(f"adapter.modules_to_save: {name} matches no layer of this model")
        if any(not p.is_floating_point() for module in matched for p in module.parameters()):
            raise ConfigError(f"adapter.modules_to_save: {name} is quantized, and codes do not train: leave it out")
    if (adapter.modules_to_save or token_ids) and model.dtype in (torch.bfloat16, torch.float16):
        what = "adapter.modules_to_save" if adapter.modules_to_save else "model.added_tokens"
        raise ConfigError(
            f"{what} trains whole layers, which must be float32 to learn, "
            f"but the model computes in {model.dtype}: set model.dtype=float32"
        )


# Module names under which PEFT keeps what an adapter trains; the adapter's own name is the next part of the path.
_KINDS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|trainable_tokens_delta"


def trainable(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name`, in the model's order: matrices, magnitudes, saved modules, token rows."""
    part = re.compile(rf"\.({_KINDS})\.{re.escape(name)}(\.|$)")
    return {n: p for n, p in model.named_parameters() if part.search(n)}


def is_lora_b(parameter: str) -> bool:
    """Return True for the name of a B, the matrix on the output's side."""
    return ".lora_B." in parameter or ".lora_embedding_B." in parameter


def starts_at_zero(parameter: str) -> bool:
    """Return True for the name of the matrix that PEFT sets to zero: B, but A of an embedding."""
    return ".lora_B." in parameter or ".lora_embedding_A." in parameter
