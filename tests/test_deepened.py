"""Traces of deep models derived from traces of three layers, and results that are not computed twice: equal."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from lora_ft import config
from lora_ft.memory import results
from lora_ft.memory.deepened import FEW, MORE, are_alike, deepened
from lora_ft.memory.machine import resolve
from lora_ft.memory.prediction import predict
from lora_ft.memory.shallow import ENOUGH, num_layers, shallow
from lora_ft.memory.trace import StepTrace, trace_step
from lora_ft.memory.workload import of_settings
from lora_ft.ops.device import CPU, GPU
from lora_ft.ops.gradient_checkpointing import recomputable_layers
from lora_ft.settings.plan import Hardware

LAYERS = ENOUGH + 2


def deep(family: str, layers: int = LAYERS) -> Any:
    """Return the config of a tiny model of many layers, without lists of something of each layer."""
    found = tiny_model(family).config
    changed = {"num_hidden_layers": layers, "layer_types": None}
    kept = {key: value for key, value in found.to_diff_dict().items() if key not in changed}
    return type(found)(**kept | {"num_hidden_layers": layers})


def run(quant: str = "none", recompute: str = "off", **groups: Any) -> config.TrainRun:
    train = config.Train(gradient_checkpointing=recompute, tokens_per_step=64)
    return config.TrainRun(quant=config.Quant(kind=config.QuantKind(quant)), train=train, **groups)


CASES = {
    "llama, every_1": ("llama", run(recompute="every_1"), GPU),
    "llama, nf4": ("llama", run("nf4"), GPU),
    "gpt2, int8, CPU": ("gpt2", run("int8", "every_1"), CPU),
    "qwen3, DoRA, offloaded": (
        "qwen3", run(optim=config.Optim(offload=True), adapter=config.Adapter(use_dora=True)), GPU,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_trace_from_three_layers_equals_that_of_all(name: str) -> None:
    family, cfg, device = CASES[name]
    found = deep(family)
    assert num_layers(found) == LAYERS
    few, more, exact = (trace_step(cfg, shallow(found, count), [40, 24], device) for count in (FEW, MORE, LAYERS))
    made = deepened(few, more, LAYERS)
    assert made is not None
    for field in dataclasses.fields(StepTrace):
        made_value, exact_value = getattr(made, field.name), getattr(exact, field.name)
        if field.name == "costs":
            assert set(made_value) == set(exact_value)
        elif field.name not in ("timeline", "plain_lora_layers", "reasons", "synchronisations"):
            assert made_value == exact_value, field.name


@pytest.mark.parametrize(("optimizer", "quick_traces"), [("adamw", 2), ("adamw_8bit", 1)])
def test_quick_prediction_equals_the_exact_one(optimizer: str, quick_traces: int) -> None:
    cfg, found = run("nf4", "every_1", optim=config.Optim(name=config.Optimizer[optimizer])), deep("llama")
    machine = resolve(Hardware(memory="8GiB"), "auto", rates=False)
    traces: dict[str, StepTrace] = {}
    quick = predict(cfg, found, of_settings(cfg, 64), machine, traces, is_quick=True)
    assert len(traces) == quick_traces  # of two and of three layers, or of all
    exact = predict(cfg, found, of_settings(cfg, 64), machine, {})
    assert (quick.peak_bytes, quick.terms) == (exact.peak_bytes, exact.terms)


def test_layers_that_differ_are_found() -> None:
    layers = recomputable_layers(tiny_model("llama"))
    assert len(layers) > 1 and are_alike(layers)
    layers[1].mlp.up_proj = nn.Linear(1, 1)
    assert not are_alike(layers)
    layers = recomputable_layers(tiny_model("llama"))
    layers[1].self_attn.sliding_window = 4
    assert not are_alike(layers)


def meta(*shape: int, **options: Any) -> torch.Tensor:
    return torch.empty(*shape, device="meta", **options)


@pytest.mark.parametrize("number", [1, 1.0, True])
def test_results_of_equal_arguments_are_those_of_the_operation(number: float) -> None:
    """1, 1.0 and True are equal, but give integers, numbers with a point, and integers."""
    given = meta(3, 4, dtype=torch.int64).T
    for _ in range(2):
        made = results.run(torch.ops.aten.mul.Tensor, (given, meta(4, 1, dtype=torch.bool)), {})
        scaled = results.run(torch.ops.aten.mul.Scalar, (given, number), {})
        expected = torch.mul(given, number)
        assert (scaled.shape, scaled.stride(), scaled.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert (made.shape, made.stride(), made.dtype) == ((4, 3), given.stride(), torch.int64)
        parts = results.run(torch.ops.aten.topk.default, (given, 2), {})
        assert [part.shape for part in parts] == [(4, 2), (4, 2)]
        assert parts[0].untyped_storage()._cdata != parts[1].untyped_storage()._cdata


def test_results_that_alias_arguments_are_not_made_anew() -> None:
    given = meta(3, 4)
    for _ in range(2):
        assert results.run(torch.ops.aten.add_.Tensor, (given, meta(4)), {}) is given
        out = meta(3, 4)
        assert results.run(torch.ops.aten.add.out, (given, given), {"out": out}) is out
        grown = meta(2)
        assert results.run(torch.ops.aten.resize_.default, (grown, [5]), {}).shape == (5,)
        viewed = results.run(torch.ops.aten.view.default, (given, [12]), {})
        assert viewed.untyped_storage()._cdata == given.untyped_storage()._cdata
