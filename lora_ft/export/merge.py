"""Add an adapter to the weights of its base and write them as a model that needs no adapter.

    LoRA             W' = W + s B A                         s: alpha / r, or alpha / sqrt(r) with rsLoRA
    LoRA of experts  the same for each expert's matrix
    DoRA             W' = m (W + s B A) / |W + s B A|       the norm over each output's inputs
    modules_to_save  W' = the trained copy of the module
    added tokens     W' = W with the trained rows
    classifiers      the same, with the classes in the config: transformers loads the folder as a classifier

W of a quantized layer is the dequantized weight. Adding to the codes themselves would round small updates away (peft
issue 2321). A written tensor is W' rounded once to the requested dtype. Tensors are computed and written one at a time.

If an adapter changes only the embedding or only the head of a tied model, both are written, untied.
"""

import copy
import gc
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_ft.adapters import experts, peft_folder, provenance
from lora_ft.adapters.attach import base_layer
from lora_ft.errors import MismatchError, NonFiniteError, ResourceError
from lora_ft.export.verify import dequantized
from lora_ft.io import durable
from lora_ft.models import heads, tensor_files

log = logging.getLogger("lora_ft")

SHARD_BYTES = 5_000_000_000

_OTHER_FILES_BYTES = 50_000_000  # tokenizer and configs take less


def hindrance(saved: LoraConfig) -> tuple[str, str] | None:
    """Return what keeps an adapter with this config from being merged, and the remedy; None if nothing does."""
    if change := provenance.change_of_base(saved):
        return change
    if saved.lora_bias:
        return "lora_bias=True: its biases are not part of the base's weights", "load it with PEFT"
    for name, value in peft_folder.other_settings(saved, peft_folder.LOADED).items():
        return f"{name}={str(value)[:80]}: it is not a plain LoRA", "load it with PEFT"
    return None


def check(folder: Path, saved: LoraConfig) -> None:
    """Raise MismatchError for an adapter that cannot be merged."""
    if found := hindrance(saved):
        raise MismatchError(f"the adapter in {folder} cannot be merged: {found[0]}; {found[1]}")


class MergedModel:
    """The merged model's tensors by name, each computed on access, on the CPU, in `dtype`.

    `plain` is the model without adapter and data, on the meta device; `names` are its tensors to write, tied ones once.
    Raises MismatchError for an adapter that cannot be expressed in the base's weights.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype) -> None:
        self._base: PreTrainedModel = model.get_base_model()
        self._adapter, self.dtype = model.active_adapter, dtype
        _check_adapter(self._base, self._adapter)
        classifies = heads.is_classifier(self._base)
        self.plain = _on_meta(_plain_config(self._base, dtype), classifies=classifies)
        names, ties = _written_names(self.plain)
        if untied := [name for name, twin in ties.items() if not self._equal(name, twin)]:
            log.warning("the adapter changes one of two tied matrices: %s is written untied", untied[0])
            config = copy.deepcopy(self.plain.config)
            config.tie_word_embeddings = False
            self.plain = _on_meta(config, classifies=classifies)
            names, ties = _written_names(self.plain)
            if any(name in ties for name in untied):
                raise MismatchError(f"{untied[0]} cannot be untied in this architecture, and the adapter changes it")
        self.names = names
        if classifies:  # the config of the base names the class of a language model
            self.plain.config.architectures = [type(self.plain).__name__]
        self.plain.generation_config = None if classifies else self._base.generation_config

    def release(self) -> None:
        """Free the base and the adapter, whose memory the verification of the written model needs."""
        del self._base
        gc.collect()  # modules form reference cycles

    def _equal(self, name: str, twin: str) -> bool:
        """Compare the bytes of two tensors, one of them in memory at a time."""
        first, second = (xxhash.xxh3_128_digest(tensor_files.as_bytes(self[key])) for key in (name, twin))
        return first == second

    def __getitem__(self, name: str) -> Tensor:
        exact = self._exact(name).detach()
        if not exact.is_floating_point():
            return exact.cpu().contiguous()
        rounded = exact.to(device="cpu", dtype=self.dtype).contiguous()
        if not torch.isfinite(rounded).all():
            if torch.isfinite(exact).all():
                raise NonFiniteError(f"{name}: the merged weights overflow {self.dtype}: try dtype=float32 or bfloat16")
            raise NonFiniteError(f"{name}: the weights of the base or of the adapter are not finite")
        return rounded

    def _exact(self, name: str) -> Tensor:
        """Return a tensor before it is rounded, laid out as in `plain`."""
        path, _, leaf = name.rpartition(".")
        module: Any = self._base
        for part in path.split("."):
            module = getattr(module.get_base_layer() if isinstance(module, ParamWrapper) else module, part)
            if isinstance(module, ModulesToSaveWrapper):
                module = dict(module.modules_to_save.items()).get(self._adapter, module.original_module)
        layer = base_layer(module)
        if wrapper := experts.wrapper_of(module, leaf, self._adapter):
            return _sum(getattr(layer, leaf).detach().cpu(), experts.update(wrapper, self._adapter).cpu())
        if leaf != "weight":
            tensor: Tensor = getattr(layer, leaf)
            return tensor
        weight = dequantized(layer).cpu()
        if isinstance(module, ParamWrapper):
            return weight
        if isinstance(module, LoraLayer) and self._adapter in module.scaling:
            weight = _lora_weight(module, self._adapter, weight)
        elif isinstance(module, TrainableTokensWrapper) and self._adapter in module.token_adapter.token_indices:
            rows = torch.tensor(module.token_adapter.token_indices[self._adapter])
            trained = module.token_adapter.trainable_tokens_delta[self._adapter].detach().cpu()
            weight = weight.index_copy(0, rows, trained.to(weight.dtype))
        # Quantization turns a Conv1D into a linear layer, whose weight is transposed.
        is_transposed = isinstance(self.plain.get_submodule(path), Conv1D) and not isinstance(layer, Conv1D)
        return weight.T if is_transposed else weight


def write_folder(merged: MergedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, configs and tokenizer into an existing folder; raises ResourceError if the disk is too small."""
    specs = {name: _spec(name, tensor, merged.dtype) for name, tensor in merged.names.items()}
    _check_space(folder, sum(spec.num_bytes for spec in specs.values()))
    _write_weights(folder, merged, specs)
    _write_configs(folder, merged.plain)
    tokenizer.save_pretrained(folder)


def _on_meta(config: Any, *, classifies: bool) -> Any:
    """Build a model without data, for the names of its tensors."""
    with torch.device("meta"):
        return heads.auto_class(classifies=classifies).from_config(config)


def _plain_config(base: PreTrainedModel, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    return config


def _written_names(plain: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to write, and tied names: {"lm_head.weight": "model.embed_tokens.weight"}."""
    first: dict[int, str] = {}
    names, ties = {}, {}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        twin = first.setdefault(id(tensor), name)
        if twin == name:
            names[name] = tensor
        else:
            ties[name] = twin
    return names, ties


def _check_adapter(base: PreTrainedModel, adapter: str) -> None:
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.active_adapters:
            variant = module.lora_variant.get(adapter)
            known = isinstance(module, ParamWrapper) or isinstance(
                module.get_base_layer(), (nn.Linear, Conv1D, nn.Embedding)
            )
            if not known or (variant and not module.use_dora.get(adapter)) or module.lora_bias.get(adapter):
                kind = type(variant or module.get_base_layer()).__name__
                raise MismatchError(f"{name}: an adapter of type {kind}, or with biases, cannot be merged")


def _lora_weight(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """Compute W' in at least float32, laid out as W: [out, in]; Conv1D [in, out]; embedding [V, E]."""
    # PEFT's delta has the layout of W.
    merged = _sum(weight, layer.get_delta_weight(adapter).detach().cpu())
    if layer.use_dora.get(adapter):
        inputs = 0 if isinstance(base_layer(layer), (Conv1D, nn.Embedding)) else 1
        norm = torch.linalg.vector_norm(merged, dim=inputs, keepdim=True)
        merged *= layer.lora_magnitude_vector[adapter].weight.detach().cpu().view_as(norm) / norm
    return merged


def _sum(weight: Tensor, update: Tensor) -> Tensor:
    """Return the sum in the adapter's precision; it is rounded when written."""
    return update.to(torch.promote_types(weight.dtype, torch.float32)).contiguous().add_(weight)


def _spec(name: str, tensor: Tensor, dtype: torch.dtype) -> durable.TensorSpec:
    written = dtype if tensor.is_floating_point() else tensor.dtype
    return durable.TensorSpec(name, tensor_files.CODES[written], tuple(tensor.shape), tensor.numel() * written.itemsize)


def _check_space(folder: Path, weights_bytes: int) -> None:
    needed, free = weights_bytes + _OTHER_FILES_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"the disk of {folder.parent} is too small: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _write_weights(folder: Path, merged: MergedModel, specs: dict[str, durable.TensorSpec]) -> None:
    """Write one file, or shards of at most SHARD_BYTES with an index, named as transformers names them."""
    plan = split_state_dict_into_shards_factory(
        specs, get_storage_size=lambda spec: spec.num_bytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )  # fmt: skip
    for file, names in plan.filename_to_tensors.items():
        buffers = (tensor_files.as_bytes(merged[name]) for name in names)
        durable.write_tensors(folder / file, [specs[name] for name in names], buffers, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        durable.write_json(folder / "model.safetensors.index.json", index)


def _write_configs(folder: Path, plain: PreTrainedModel) -> None:
    settings = json.loads(plain.config.to_json_string())
    # Only transformers 5 knows the new names. Without the old ones transformers 4, mlx-lm and converters would
    # silently use a rope_theta of 10,000 and float32.
    settings["torch_dtype"] = settings["dtype"]
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            settings["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    durable.write_json(folder / "config.json", settings)
    if plain.generation_config:
        durable.write_text(folder / "generation_config.json", plain.generation_config.to_json_string())
