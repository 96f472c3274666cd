"""Find out which layers and experts of a model an adapter can train, by running text through a copy without values.

    text_path(model).reasons   {"model.layers.0.self_attn.q_proj": "",
                                "model.layers.0.mlp.experts.gate_up_proj": "",
                                "vision_tower.layers.0.q_proj": "not called by a text forward", ...}
    text_path(model).unused    {"vision_tower.patch_embedding.weight", ...}

A vision tower runs on images only, a router may subclass Linear and return a tuple, a state-space layer may multiply by
the weight of a layer that it never calls: a matrix on such a layer would learn nothing, or stop the run. The copy is
built from the model's class and config, so a loaded, a quantized and a meta model give the same answer, and share one
trace. An 8B model takes half a second.
"""

import contextlib
import copy
import functools
import inspect
import json
import logging
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.adapters.experts import expert_parameters, use_wrappers_that_keep_the_base

log = logging.getLogger("lora_ft")

NOT_CALLED = "not called by a text forward"
NO_TENSOR = "with several results instead of one tensor"
NO_GRADIENT = "without a gradient"
WEIGHT_READ = "other code multiplies by the weight, past an adapter"
REFUSED = "PEFT does not adapt this name in this model type"
NO_WRAPPER = "the model does not run with PEFT's adapter of its experts"

LINEAR = (nn.Linear, Conv1D)  # bitsandbytes' layers are subclasses of the first

_TOKENS = 8
_known: "weakref.WeakKeyDictionary[PreTrainedModel, TextPath]" = weakref.WeakKeyDictionary()
# By class and config, and by config and name: a run has a meta and a loaded model, a plan one for each trace of a step.
_traces: dict[tuple[type, str], tuple[dict[str, str], frozenset[str]]] = {}
_ways: dict[tuple[str, str], str | None] = {}
# Entries of a config that tell how weights are stored, not what text runs through.
_STORED = {"dtype", "torch_dtype", "quantization_config", "_name_or_path", "architectures", "transformers_version"}

# The settings by which PEFT adapts a linear layer of a name, by the way in which it does.
_TARGETS = {"layer": {"target_modules": ["{}"]}, "weight": {"target_modules": [], "target_parameters": ["{}.weight"]}}

# The code of a module that hands the weight of one of its layers to a function, as fused kernels need it. Not its
# dtype, and not a part of it.
_READ_WEIGHT = re.compile(r"\bself\.(\w+)\.weight(?=\s*[,)@])")


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that LoRA can adapt, by name: linear (also quantized), Conv1D and embeddings."""
    return {n: module for n, module in model.named_modules() if isinstance(module, (*LINEAR, nn.Embedding))}


@dataclass(frozen=True)
class TextPath:
    """reasons: why an adapter could not train a layer or a parameter of experts, "" if it could.

    unused: parameters that no logit depends on. bypassed: layers that are not called though a logit depends on their
    weights, which other code reads. by_weight: layers that PEFT adapts only as a parameter, NAME.weight.
    """

    reasons: dict[str, str]
    unused: frozenset[str]
    bypassed: frozenset[str]
    by_weight: frozenset[str]


def text_path(model: PreTrainedModel) -> TextPath:
    """Trace a base without adapter; a second call for the same base returns the same object.

    If a model's code does not run without values, all layers that PEFT adapts are on the path; the log says so.
    """
    if model not in _known:
        with torch.random.fork_rng(devices=[]), _disable_current_modes(), torch.device("meta"):
            _known[model] = _text_path(model)
    return _known[model]


def _text_path(model: PreTrainedModel) -> TextPath:
    layers, experts = adaptable_layers(model), expert_parameters(model)
    found, unused = dict.fromkeys([*layers, *experts], ""), frozenset[str]()
    structure = json.dumps([_structure(model.config.to_dict()), list(experts)], sort_keys=True, default=str)
    key = type(model), structure
    try:
        if key not in _traces:
            _traces[key] = _traced(model, list(experts))
        traced, unused = _traces[key]
        found |= traced
    except Exception as error:  # code of a model family, which may raise anything
        log.info("%s does not run without values (%r): every linear layer is adapted", type(model).__name__, error)
    bypassed = frozenset(n for n in layers if found[n] == NOT_CALLED and f"{n}.weight" not in unused)
    found |= dict.fromkeys(_read_elsewhere(model), WEIGHT_READ)
    linear = [name for name, layer in layers.items() if not isinstance(layer, nn.Embedding)]
    ways = {leaf: _way_of_peft(model.config, structure, leaf) for leaf in dict.fromkeys(map(_leaf, linear))}
    found |= {name: REFUSED for name in linear if ways[_leaf(name)] is None and not found[name]}
    by_weight = frozenset(name for name in linear if ways[_leaf(name)] == "weight" and not found[name])
    return TextPath({name: found[name] for name in [*layers, *experts]}, unused, bypassed, by_weight)


def _structure(settings: Any) -> Any:
    """Return the entries of a config, and of the configs in it, that shape the model."""
    if not isinstance(settings, dict):
        return settings
    return {key: _structure(value) for key, value in settings.items() if key not in _STORED}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _traced(model: PreTrainedModel, experts: list[str]) -> tuple[dict[str, str], frozenset[str]]:
    """Return the reasons of layers and experts, and the unused parameters; experts may prevent PEFT's adapters."""
    if experts:
        try:
            return _trace(model, experts)
        except Exception as error:  # from here on, only the model's own code can raise
            log.info("%s does not run with PEFT's adapters of its experts (%r)", type(model).__name__, error)
    reasons, unused = _trace(model, [])
    return reasons | dict.fromkeys(experts, NO_WRAPPER), unused


def _trace(model: PreTrainedModel, experts: list[str]) -> tuple[dict[str, str], frozenset[str]]:
    """Run the forward of a copy on the meta device, with adapters of these experts."""
    twin: Any = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager", dtype=torch.bfloat16)
    found: dict[str, str] = {}
    probes: dict[str, Tensor] = {}
    for name, layer in adaptable_layers(twin).items():
        found[name] = NOT_CALLED
        layer.register_forward_hook(_probe(name, found, probes))
    if experts:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[], target_parameters=experts), twin)
        use_wrappers_that_keep_the_base(twin)
    twin.requires_grad_().train()  # some code passes a layer by in this mode only
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)  # it would look at values
    try:
        with _AnyValues():
            output = twin(input_ids=torch.zeros((1, _TOKENS), dtype=torch.long), use_cache=False)
    finally:
        Distribution.set_default_validate_args(validates)
    reached = _leaves(output.logits)
    found |= {name: NO_GRADIENT for name, probe in probes.items() if id(probe) not in reached and not found[name]}
    parameters = {name.replace(".base_layer", ""): p for name, p in twin.named_parameters() if ".lora_" not in name}
    unused = frozenset(name for name, parameter in parameters.items() if id(parameter) not in reached)
    for name, module in twin.named_modules():
        if isinstance(module, ParamWrapper):
            expert = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            trains = all(id(matrix) in reached for matrix in module.lora_B.parameters())
            found[expert] = "" if trains else NOT_CALLED if expert in unused else WEIGHT_READ
    return found, unused


def _probe(name: str, found: dict[str, str], probes: dict[str, Tensor]) -> Any:
    """Return a hook that adds a scalar to a layer's output, as an adapter adds its product."""

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            found[name] = NO_TENSOR
            return None
        if name not in probes:
            found[name] = ""
            probes[name] = torch.zeros((), dtype=output.dtype, requires_grad=True)
        return output + probes[name]

    return add


def _leaves(output: Tensor) -> set[int]:
    """Return the ids of the leaf tensors that a backward from `output` reaches; runs no kernel."""
    seen, reached, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            reached.add(id(leaf))
        waiting.extend(following for following, _ in node.next_functions)
    return reached


class _AnyValues(TorchDispatchMode):
    """Answers with zero or with one element where code asks a tensor without values for them, as routing does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if func is aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty((1, args[0].dim()), dtype=torch.long)
        if func is aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        return func(*args, **kwargs)


def _read_elsewhere(model: nn.Module) -> Iterator[str]:
    """Yield the linear layers whose weight the code of their parent hands to another function."""
    for prefix, module in model.named_modules():
        module_class: Any = type(module)
        for key in _read_weights(module_class):
            if isinstance(getattr(module, key, None), LINEAR):
                yield f"{prefix}.{key}" if prefix else key


@functools.cache
def _read_weights(module_class: type) -> set[str]:
    if module_class.__module__.startswith("torch."):
        return set()
    try:
        return set(_READ_WEIGHT.findall(inspect.getsource(module_class)))
    except (OSError, TypeError):  # a class without source
        return set()


class _Named(nn.Module):
    """A model of one layer, of a name and config: PEFT decides by these two."""

    def __init__(self, config: Any, leaf: str) -> None:
        super().__init__()
        self.config = config
        self.add_module(leaf, nn.Linear(1, 1))


def _way_of_peft(config: Any, structure: str, leaf: str) -> str | None:
    """Return how PEFT adapts a linear layer of this name in a model of this config: as "layer", as "weight" or not.

    PEFT refuses names in state-space models. It takes the names that experts had before transformers 5 for their
    parameters, also where shared experts and dense layers have these names; such a layer it adapts as NAME.weight.
    """
    if (structure, leaf) not in _ways:
        _ways[structure, leaf] = next(filter(functools.partial(_takes, config, leaf), _TARGETS), None)
    return _ways[structure, leaf]


def _takes(config: Any, leaf: str, way: str) -> bool:
    model = _Named(config, leaf)
    chosen: Any = {key: [name.format(leaf) for name in names] for key, names in _TARGETS[way].items()}
    with contextlib.suppress(ValueError):
        inject_adapter_in_model(LoraConfig(r=1, **chosen), model)
    return isinstance(model.get_submodule(leaf), LoraLayer)
