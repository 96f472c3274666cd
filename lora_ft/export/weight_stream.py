"""Stream the weights of a base from its files, one tensor at a time, so that it is never in memory as a whole.

    opened = open_adapter(folder, model, quant, "auto", tokenizer)
    opened.model                               base and adapter joined by PEFT; the base's weights are placeholders of
                                               the right shape and dtype, each with one element of memory
    opened.trained_on("model.norm.weight")     the weights that the adapter was trained on: quantized ones dequantized
    opened.original("model.norm.weight")       the weights in the base's own files
    with streamed(opened.model, opened.modules, opened.trained_on):
        opened.model(ids)                      each layer gets its weights before it runs, and drops them after it

Names in the files are mapped to names in the model by transformers' own rules. Architectures with tensors that
transformers computes from several (mixtures of experts) are loaded as a whole, with a warning.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D

from lora_ft import config
from lora_ft.adapters import files, loading, provenance
from lora_ft.models import load, quantize, resolve
from lora_ft.models.load import Base
from lora_ft.models.meta_model import load_meta_model
from lora_ft.values import Dtype, QuantKind

log = logging.getLogger("lora_ft")

Read = Callable[[str], Tensor]  # returns a tensor of the base by its name in the model, on the CPU; read only
Modules = dict[nn.Module, str]  # the base's own modules and their names without PEFT's wrappers


@dataclass(frozen=True)
class StreamedAdapter:
    """An adapter on a base of placeholders, and the functions that read the base's tensors."""

    base: Base
    model: PeftModel
    modules: Modules
    trained_on: Read
    original: Read


def open_adapter(
    folder: Path, model: config.Model, quant: config.Quant, device: str, tokenizer: PreTrainedTokenizerBase
) -> StreamedAdapter:
    """Put an adapter onto a base of placeholders; `device` is the one that quantizes weights.

    Raises the errors of `loading.open_adapter`.
    """
    skeleton = load_meta_model(model, quant, device, tokenizer)
    base = replace(skeleton, identity=resolve.locate(model))  # downloads the weights of a hub id
    provenance.check_source(folder, files.read_config(folder), base, quant)
    trained_on = _tensors(base, model, quant, device)
    original = trained_on if quant.kind is QuantKind.none else _tensors(base, model, config.Quant(), device)
    modules = use_placeholders(base.model)
    return StreamedAdapter(base, files.load(base.model, folder, loading.NAME), modules, trained_on, original)


def use_placeholders(network: PreTrainedModel, device: torch.device | str = "cpu") -> Modules:
    """Move a model from the meta device to `device` without its weights: each is one zero, expanded to its shape.

    Unlike on the meta device, PEFT can create and load adapters. Buffers that are not saved, such as rotary
    frequencies, are computed. Ties are kept.
    """
    for name, buffer in list(network.named_non_persistent_buffers()):
        owner, _, key = name.rpartition(".")
        network.get_submodule(owner)._buffers[key] = torch.empty_like(buffer, device=device)
    with torch.device(device):
        network.initialize_weights()  # does nothing for weights on the meta device
    seen: dict[int, Any] = {}
    for module in network.modules():
        for held, key, tensor in _own(module):
            empty = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
            made = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
            held[key] = seen.setdefault(id(tensor), made)
    return {module: name for name, module in network.named_modules()}


def _own(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return a module's own parameters and saved buffers: the dictionary that holds each, its key, the tensor."""
    skipped = module._non_persistent_buffers_set
    held: list[tuple[dict[str, Any], str, Any]] = [(module._parameters, k, p) for k, p in module._parameters.items()]
    held += [(module._buffers, k, b) for k, b in module._buffers.items() if k not in skipped]
    return [(where, key, tensor) for where, key, tensor in held if tensor is not None]


@contextlib.contextmanager
def streamed(model: nn.Module, modules: Modules, read: Read) -> Iterator[None]:
    """Give every layer of a model of placeholders its weights from `read` while it runs, and no longer.

    A layer and PEFT's wrapper around it are one unit: DoRA and trained tokens also read the weight.
    """
    hooks: list[Any] = []

    def hold(unit: nn.Module) -> None:
        empty: list[tuple[dict[str, Any], str, Tensor]] = []

        def fill(*_: Any) -> None:
            for module in unit.modules():
                for held, key, tensor in _own(module) if module in modules else ():
                    empty.append((held, key, tensor))
                    full = read(f"{modules[module]}.{key}").to(device=tensor.device, dtype=tensor.dtype)
                    held[key] = nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full

        def clear(*_: Any) -> None:
            while empty:
                held, key, tensor = empty.pop()
                held[key] = tensor

        hooks.append(unit.register_forward_pre_hook(fill))
        hooks.append(unit.register_forward_hook(clear, always_call=True))

    for unit in _units(model, modules):
        hold(unit)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _units(module: nn.Module, modules: Modules) -> Iterator[nn.Module]:
    if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) or (module in modules and _own(module)):
        yield module
    else:
        for child in module.children():
            yield from _units(child, modules)


def loaded(network: PreTrainedModel, modules: Modules) -> Read:
    """Return a reader for a base in memory, under the names in `modules` of its twin with placeholders."""
    twins = {name: module for module, name in modules.items()}

    def read(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module: Any = network
        for part in path.split("."):
            module = innermost_layer(getattr(module, part))
        if leaf != "weight":
            return getattr(module, leaf).detach().cpu()
        weight = dequantized(module).cpu()
        # A quantized Conv1D is a linear layer, with a transposed weight.
        return weight.T if isinstance(twins[path], Conv1D) and not isinstance(module, Conv1D) else weight

    return read


def innermost_layer(module: Any) -> Any:
    """Return the base's own layer inside PEFT's wrappers."""
    while isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
        module = module.get_base_layer() if isinstance(module, LoraLayer) else module.original_module
    return module


def dequantized(layer: Any) -> Tensor:
    """Return the weight that a layer computes with, dequantized by bitsandbytes if it is quantized."""
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


def _tensors(base: Base, model: config.Model, quant: config.Quant, device: str) -> Read:
    """Return a reader for the tensors that `load_base` would load with this quantization, one at a time."""
    folder = Path(str(base.identity.folder))
    locations = _locations(base.model, folder, len(model.added_tokens))
    if isinstance(locations, str):
        log.warning("the base is loaded as a whole, which takes its size in memory: %s", locations)
        names: Modules = {module: name for name, module in base.model.named_modules()}
        read = functools.cache(lambda: loaded(load.load_base(model, quant, device, base.tokenizer).model, names))
        return lambda name: read()(name)
    return _from_files(base, locations, len(model.added_tokens), quant, load.resolve_device(device))


def _from_files(
    base: Base, locations: dict[str, tuple[Path, str]], added: int, quant: config.Quant, device: torch.device
) -> Read:
    """Return a reader that makes tensors as `load_base` does: dtype, rows of added tokens, quantization."""
    dtypes = {name: tensor.dtype for name, tensor in base.model.state_dict().items()}
    ends = {name for name, module in base.model.named_modules() if module in _ends(base.model)}
    quantized = _planned(base.model) if quant.kind is not QuantKind.none else {}
    num_tokens = len(base.tokenizer)

    def read(name: str) -> Tensor:
        path, key = locations[name]
        with safe_open(path, "pt") as stored:  # the file stays mapped as long as the tensor lives
            tensor: Tensor = stored.get_tensor(key).to(dtypes[name])
        module, _, leaf = name.rpartition(".")
        if module in ends and added:  # as `load.fit_embeddings`: added tokens start as the mean of the others
            old = tensor[: num_tokens - added]
            mean = old.mean(dim=0, dtype=torch.float32).to(tensor.dtype)
            tensor = torch.cat([old, mean.expand(added, -1), tensor[num_tokens:]])
        if module in quantized and leaf == "weight":
            if quantized[module]:  # a Conv1D
                return _through_codes(tensor.T, quant, device).T
            return _through_codes(tensor, quant, device)
        if module in quantized and quant.compute_dtype is not Dtype.auto:
            return tensor.to(load.resolve_dtype(quant.compute_dtype, device))  # as `quantize.settle` does
        return tensor

    return read


def _ends(network: PreTrainedModel) -> list[nn.Module | None]:
    return [network.get_input_embeddings(), network.get_output_embeddings()]


def _planned(network: PreTrainedModel) -> dict[str, bool]:
    """Return the layers that are quantized (`quantize.check_plan`), with True for those that are Conv1D."""
    head = network.get_output_embeddings()
    return {
        name: isinstance(module, Conv1D)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _locations(network: PreTrainedModel, folder: Path, added: int) -> dict[str, tuple[Path, str]] | str:
    """Return (file, name in the file) of each of a model's tensors, or the reason why they cannot be streamed.

    Tied tensors may be stored under either name.
    """
    if getattr(network, "_keep_in_fp32_modules", None) or getattr(network, "_keep_in_fp32_modules_strict", None):
        return "transformers keeps some of its layers in float32"
    state = network.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(network)
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in transforms if not isinstance(entry, WeightConverter)]
    embeddings = {id(end.weight) for end in _ends(network) if end is not None}
    found: dict[str, tuple[Path, str]] = {}
    for path in (folder / name for name in resolve.weight_files(folder, {p.name for p in folder.iterdir()})):
        with safe_open(path, "pt") as stored:
            for key in sorted(stored.keys()):
                name, converter = rename_source_key(key, renamings, converters, network.base_model_prefix, state)
                if name not in state and key in state:
                    name, converter = key, None
                if converter is not None:
                    return f"transformers makes {name} of several tensors of its files"
                if name not in state:
                    return f"its files hold {key}, which is no tensor of the model"
                shape, expected = tuple(stored.get_slice(key).get_shape()), tuple(state[name].shape)
                grows = added and id(state[name]) in embeddings and shape[1:] == expected[1:]
                if shape != expected and not grows:
                    return f"{key} has the shape {shape} in its files, and {expected} in the model"
                found[name] = (path, key)
    by_tensor = {id(state[name]): location for name, location in found.items()}
    missing = [name for name, tensor in state.items() if id(tensor) not in by_tensor]
    if missing:
        return f"its files lack {missing[0]}"
    return {name: found.get(name) or by_tensor[id(tensor)] for name, tensor in state.items()}


def _through_codes(weight: Tensor, quant: config.Quant, device: torch.device) -> Tensor:
    """Quantize a weight [out, in] and dequantize it again, on the CPU."""
    nn_ = quantize.import_bitsandbytes().nn
    out_features, in_features = weight.shape
    if quant.kind is QuantKind.int8:
        layer = nn_.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = nn_.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        layer = nn_.Linear4bit(in_features, out_features, bias=False, compress_statistics=quant.double,
                               quant_type=quant.kind.value, device="meta")  # fmt: skip
        layer.weight = nn_.Params4bit(weight.to(device), **layer.weight.__dict__).to(device)
    return dequantized(layer).cpu()
