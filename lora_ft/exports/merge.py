"""Add an adapter to the weights of its base and write them as a model of its own.

    LoRA     W' = W + s B A                         s: alpha / r, or alpha / sqrt(r) with rsLoRA
    DoRA     W' = m (W + s B A) / |W + s B A|       the norm over each output's inputs
    saved    W' = the layer trained in full
    tokens   W' = W with the trained rows in it

W of a quantized layer is what its codes stand for: the weights that the adapter was trained on. Adding to
the codes themselves would round small updates away (peft issue 2321), and the unquantized original is
another model than the one trained on. A written tensor is W' rounded once to the dtype asked for.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lora_ft import durable
from lora_ft.errors import MismatchError, ResourceError

SHARD_BYTES = 5_000_000_000

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_OTHER_FILES_BYTES = 50_000_000  # tokenizer and configs, generously


def write(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write the active adapter's merged model into an existing folder: weights in `dtype`, configs, tokenizer.

    Holds one merged tensor at a time beside the model, which stays as it was. Raises ResourceError where
    the disk is too small, MismatchError for an adapter that cannot be expressed in the base's weights.
    """
    base: PreTrainedModel = model.get_base_model()
    plain = _plain_twin(base)
    names, ties = _written_names(plain)
    _check_adapter(base, model.active_adapter)
    _check_space(folder, sum(_spec(n, t, dtype).num_bytes for n, t in names.items()))
    tensors = _Merged(base, model.active_adapter, dtype)
    for name, twin in ties.items():
        if not torch.equal(tensors[name], tensors[twin]):
            raise MismatchError(
                f"{name} and {twin} are one matrix in this model, and the adapter changes only one of them: "
                "merged, the change would be lost or appear twice"
            )
    _write_weights(folder, names, tensors, dtype)
    _write_configs(folder, base, dtype)
    tokenizer.save_pretrained(folder)


def _plain_twin(base: PreTrainedModel) -> PreTrainedModel:
    """The architecture alone, without data: what a fresh process will build, and so the names that it looks for."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_plain_config(base, base.dtype))


def _plain_config(base: PreTrainedModel, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    return config


def _written_names(plain: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write by name, and the other names of tied ones: {"lm_head.weight": "model.embed_tokens.weight"}."""
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
            known = isinstance(module.get_base_layer(), (nn.Linear, Conv1D, nn.Embedding))
            if not known or (variant and not module.use_dora.get(adapter)) or module.lora_bias.get(adapter):
                kind = type(variant or module.get_base_layer()).__name__
                raise MismatchError(f"{name}: an adapter of this kind ({kind}, or with biases) cannot be merged")


class _Merged:
    """The merged model's tensors by name, each computed when asked for, on the CPU, in `dtype`."""

    def __init__(self, base: PreTrainedModel, adapter: str, dtype: torch.dtype) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype

    def __getitem__(self, name: str) -> Tensor:
        *path, leaf = name.split(".")
        module: Any = self._base
        for part in path:
            module = self._trained(getattr(module, part))
        tensor = self._weight(module) if leaf == "weight" else getattr(_inmost(module), leaf)
        if not tensor.is_floating_point():
            return tensor.cpu().contiguous()
        rounded = tensor.detach().to(device="cpu", dtype=self._dtype).contiguous()
        if not torch.isfinite(rounded).all():
            raise MismatchError(f"{name}: the merged weights are not finite in {self._dtype}: try dtype=float32")
        return rounded

    def _trained(self, module: Any) -> Any:
        """The copy that `modules_to_save` trained, where there is one."""
        if isinstance(module, ModulesToSaveWrapper):
            return dict(module.modules_to_save.items()).get(self._adapter, module.original_module)
        return module

    def _weight(self, module: Any) -> Tensor:
        if isinstance(module, LoraLayer) and self._adapter in module.scaling:
            return _lora_weight(module, self._adapter)
        if isinstance(module, TrainableTokensWrapper) and self._adapter in module.token_adapter.token_indices:
            tokens, weight = module.token_adapter, dequantized(_inmost(module))
            rows = torch.tensor(tokens.token_indices[self._adapter], device=weight.device)
            return weight.index_copy(0, rows, tokens.trainable_tokens_delta[self._adapter].to(weight))
        return dequantized(_inmost(module))


def _inmost(module: Any) -> Any:
    """The base's own layer inside PEFT's wrappers."""
    while isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
        module = module.get_base_layer() if isinstance(module, LoraLayer) else module.original_module
    return module


def _lora_weight(layer: Any, adapter: str) -> Tensor:
    """W' of an adapted layer in float32 at least, laid out as its W: [out, in]; Conv1D [in, out]; embedding [V, E]."""
    base = layer.get_base_layer()
    weight = dequantized(base)
    # PEFT's delta has the layout of W; the sum is taken in the adapter's precision and rounded when written.
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + layer.get_delta_weight(adapter).detach()
    if layer.use_dora.get(adapter):
        inputs = 0 if isinstance(base, (Conv1D, nn.Embedding)) else 1
        norm = torch.linalg.vector_norm(merged, dim=inputs, keepdim=True)
        merged *= layer.lora_magnitude_vector[adapter].weight.detach().view_as(norm) / norm
    return merged


def dequantized(layer: Any) -> Tensor:
    """The weights that a layer computes with: bitsandbytes' own dequantization of its codes, or W as it is."""
    weight = layer.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        # The row scales move from the weight to the layer's state at the first forward.
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    return weight.detach()


def _spec(name: str, tensor: Tensor, dtype: torch.dtype) -> durable.TensorSpec:
    written = dtype if tensor.is_floating_point() else tensor.dtype
    return durable.TensorSpec(name, _CODES[written], tuple(tensor.shape), tensor.numel() * written.itemsize)


def _check_space(folder: Path, weights_bytes: int) -> None:
    needed, free = weights_bytes + _OTHER_FILES_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"the disk of {folder.parent} is too small: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def _write_weights(folder: Path, names: dict[str, Tensor], tensors: _Merged, dtype: torch.dtype) -> None:
    """One file, or several of at most SHARD_BYTES with an index, as transformers names them."""
    shards: list[list[durable.TensorSpec]] = [[]]
    for spec in (_spec(name, tensor, dtype) for name, tensor in names.items()):
        if shards[-1] and sum(s.num_bytes for s in shards[-1]) + spec.num_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        durable.write_tensors(folder / file, specs, (_bytes(tensors[s.name]) for s in specs), {"format": "pt"})
        weight_map |= {s.name: file for s in specs}
    if len(shards) > 1:
        total = sum(s.num_bytes for specs in shards for s in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        durable.write_json(folder / "model.safetensors.index.json", index)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write_configs(folder: Path, base: PreTrainedModel, dtype: torch.dtype) -> None:
    settings = json.loads(_plain_config(base, dtype).to_json_string())
    # transformers 5 alone knows the new names. Readers of the old ones (transformers 4, mlx-lm, converters) would
    # fall back to a rope_theta of 10,000 without a word, and to float32.
    settings["torch_dtype"] = settings["dtype"]
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            settings["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    durable.write_json(folder / "config.json", settings)
    if base.generation_config:
        durable.write_text(folder / "generation_config.json", base.generation_config.to_json_string())
