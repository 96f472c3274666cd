"""Advice: every piece makes the run fit when it is planned again, changes only what has an effect, and is minimal."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from zoo import zoo_config

from lora_ft import config
from lora_ft.config import Optimizer, QuantKind
from lora_ft.memory import cards, levers, workload
from lora_ft.memory.advice import _with, advise, nearest_hardware, recut
from lora_ft.memory.machine import Machine, resolve
from lora_ft.memory.prediction import Prediction, Traces, predict
from lora_ft.memory.shallow import extrapolated
from lora_ft.ops.device import CPU, GPU
from lora_ft.settings.plan import Hardware

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from shapes import config_of

GIB = 2**30


def settings(**groups: Any) -> config.TrainRun:
    train = config.Train(tokens_per_step=256, gradient_checkpointing="off")
    return config.TrainRun(
        **{"train": train, "data": config.Data(max_length=192), "adapter": config.Adapter(r=32)} | groups
    )


def machine(kind: str, budget: int) -> Machine:
    return Machine("test", {"cuda": GPU, "cpu": CPU}[kind], budget)


def test_experts_can_be_left_frozen_where_they_are_trained() -> None:
    gpu, moe = machine("cuda", 2**40), zoo_config("qwen3_moe")

    def options(model_config: Any = moe, **adapter: Any) -> list[levers.Change]:
        cfg = settings(adapter=config.Adapter(**adapter))
        found = levers.levers(cfg, model_config, workload.of_settings(cfg), gpu)
        return [option for lever in found if lever.name == "experts" for option in lever.options]

    assert options() == options(experts=True, target_modules=["q_proj"]) == [{"adapter.experts": False}]
    assert options(experts=False) == options(target_modules=["q_proj"]) == options(lora_dropout=0.1) == []
    assert options(zoo_config("llama")) == []
    trained = predict(settings(), moe, workload.of_settings(settings()), gpu)
    assert planned_again(settings(), ["adapter.experts=false"], moe, gpu).peak_bytes < trained.peak_bytes


def planned_again(cfg: config.TrainRun, changes: list[str], model_config: Any, device: Machine) -> Prediction:
    """Predict with the overrides as they are typed."""
    for change in changes:
        key, _, value = change.partition("=")
        now = cfg
        for name in key.split("."):
            now = getattr(now, name)
        kind = type(now) if not isinstance(now, str | int | None) or isinstance(now, bool) else None
        typed: Any = value
        if kind is bool or key == "adapter.experts":
            typed = value == "true"
        elif isinstance(now, (Optimizer, QuantKind, config.TooLong)):
            typed = type(now)(value)
        elif value.isdigit():
            typed = int(value)
        cfg = _with(cfg, key, typed)
    return predict(cfg, model_config, workload.of_settings(cfg), device)


@pytest.mark.parametrize(
    "kind, family, quant, share",
    [
        ("cuda", "llama", "nf4", 0.98),
        pytest.param("cuda", "gpt2", "none", 0.75, marks=pytest.mark.nightly),
        pytest.param("cpu", "llama", "none", 0.9, marks=pytest.mark.nightly),
        pytest.param("cpu", "gpt2", "int8", 0.8, marks=pytest.mark.nightly),
    ],
)
def test_each_piece_fits_when_planned_again(kind: str, family: str, quant: str, share: float) -> None:
    cfg, model_config = settings(quant=config.Quant(kind=QuantKind(quant))), tiny_model(family).config
    work, traces = workload.of_settings(cfg), {}
    peak = predict(cfg, model_config, work, machine(kind, GIB), traces)
    fixed = sum(term.bytes for term in peak.terms if term.source != "traced")
    device = machine(kind, fixed + int(share * (peak.peak_bytes - fixed)))
    found = advise(cfg, model_config, work, device, traces)
    assert found
    for each in found:
        again = planned_again(cfg, each.changes, model_config, device)
        assert again.fits and again.peak_bytes == each.prediction.peak_bytes
        assert kind == "cuda" or not any("cpu" in change or "offload" in change for change in each.changes)
    lists = [each.changes for each in found]
    assert len({tuple(changes) for changes in lists}) == len(lists)
    # No piece contains another: then it would not be minimal.
    assert not [(a, b) for a in lists for b in lists if a is not b and set(a) < set(b)]


def test_nothing_is_advised_where_nothing_helps() -> None:
    cfg, model_config = settings(), tiny_model("llama").config
    assert advise(cfg, model_config, workload.of_settings(cfg), machine("cuda", 1000)) == []
    unknown = Machine("test", GPU, None)
    assert advise(cfg, model_config, workload.of_settings(cfg), unknown) == []


def names(cfg: config.TrainRun, kind: str, tie: bool = False) -> list[str]:
    found = levers.levers(cfg, tiny_model("llama", tie=tie).config, workload.of_settings(cfg), machine(kind, GIB))
    return [lever.name for lever in found]


def test_only_levers_with_an_effect_are_used() -> None:
    every = ["embedding", "offload", "micro-batch", "recompute", "8-bit optimizer", "int8", "nf4", "rank", "rows"]
    assert names(settings(), "cuda") == every
    assert names(settings(), "cpu") == every[2:]
    assert "embedding" not in names(settings(), "cuda", tie=True)
    used = settings(
        model=config.Model(embedding_device="cpu"),
        optim=config.Optim(offload=True),
        quant=config.Quant(kind=QuantKind.nf4),
        adapter=config.Adapter(r=4),
        train=config.Train(tokens_per_step=256, tokens_per_microbatch=128, gradient_checkpointing="every_1"),
        data=config.Data(max_length=128),
    )
    assert names(used, "cuda") == []
    assert "nf4" in names(settings(quant=config.Quant(kind=QuantKind.int8)), "cuda")
    assert "int8" not in names(settings(quant=config.Quant(kind=QuantKind.int8)), "cuda")
    assert "8-bit optimizer" not in names(settings(optim=config.Optim(name=Optimizer.paged_adamw)), "cuda")
    unpacked = dataclasses.replace(settings().train, packing=False)
    assert "micro-batch" not in names(settings(train=unpacked), "cuda")


def test_what_training_does_by_itself_is_used_but_not_listed() -> None:
    train = config.Train(tokens_per_step=256, gradient_checkpointing="auto", tokens_per_microbatch="auto")
    cfg, model_config = settings(train=train), tiny_model("llama").config
    work, traces = workload.of_settings(cfg), {}
    frugal = dataclasses.replace(cfg.train, gradient_checkpointing="every_1", tokens_per_microbatch=192)
    least = dataclasses.replace(cfg, train=frugal)
    peak = predict(least, model_config, workload.of_settings(least), machine("cuda", GIB), traces).peak_bytes
    found = advise(cfg, model_config, work, machine("cuda", peak - 100_000), traces)
    assert found and all(not change.startswith("train.gradient") for each in found for change in each.changes)
    assert all(each.prediction.fits for each in found)


def test_micro_batch_holds_the_longest_row() -> None:
    cfg = settings()
    rows = workload.Workload([60, 50, 40], [[60, 50, 40]], 3, 450, longest=90)
    sizes = [change["train.tokens_per_microbatch"] for change in levers._micro_batches(cfg, rows)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 128 and max(sizes) < 150
    long = dataclasses.replace(rows, longest=140)
    assert [change["train.tokens_per_microbatch"] for change in levers._micro_batches(cfg, long)] == [140]
    shorter = _with(_with(cfg, "data.max_length", 30), "train.tokens_per_microbatch", 64)
    cut = recut(rows, shorter)
    assert sum(cut.largest) == 64 and cut.longest == 30 and sum(map(sum, cut.typical)) >= 150


@pytest.mark.parametrize("setting, error", [("off", 0), ("every_1", 0), ("every_4", 0.02)])
def test_few_layers_tell_the_peak_of_many(setting: str, error: float) -> None:
    cfg = config.TrainRun(train=config.Train(gradient_checkpointing=setting))
    traces: Traces = {}
    device = machine("cuda", 100 * GIB)

    def peak(setting: str, model_config: Any) -> float:
        chosen = _with(cfg, "train.gradient_checkpointing", setting)
        return predict(chosen, model_config, workload.of_settings(chosen), device, traces).trace.peak_bytes

    model_config = config_of("smollm2_135m", 12)
    assert extrapolated(peak, setting, model_config) == pytest.approx(peak(setting, model_config), rel=error or 1e-9)


def test_nearest_hardware_is_the_smallest_that_fits() -> None:
    cfg, model_config = settings(), tiny_model("llama").config
    found = predict(cfg, model_config, workload.of_settings(cfg), resolve(Hardware(memory="24GiB"), "cuda"))
    for size, limit in ((5 * GIB, 8), (15 * GIB, 24), (40 * GIB, 48)):
        terms = (dataclasses.replace(found.terms[0], bytes=size),)
        name = nearest_hardware(dataclasses.replace(found, terms=terms))
        card = next(card for card in cards.cards() if card.choice == name)
        assert size < card.memory_bytes <= limit * GIB
    terms = (dataclasses.replace(found.terms[0], bytes=2000 * GIB),)
    assert nearest_hardware(dataclasses.replace(found, terms=terms)) is None
