"""Devices of predictions: figures of conf/hardware/, this machine, and where each figure comes from."""

import dataclasses
import re
import time

import pytest
import torch

from lora_ft import config
from lora_ft.errors import ConfigError
from lora_ft.memory import cards, machine, measure
from lora_ft.memory.machine import GIB, Machine, resolve
from lora_ft.memory.measure import Rates
from lora_ft.ops.device import Target
from lora_ft.settings.plan import Hardware

ALL = cards.cards()
RATES = Rates({"float32": 2e11}, 4e10, 1e11, 2e-5)


def card(choice: str) -> Hardware:
    return next(each.hardware for each in ALL if each.choice == choice)


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets torch report a GPU: name, memory in GiB, of which `free` are free."""

    def report(name: str, total: float, free: float, capability: tuple[int, int] = (8, 6)) -> None:
        monkeypatch.setattr(machine, "resolve_device", lambda _: torch.device("cuda:0"))
        monkeypatch.setattr(machine, "target", lambda _: Target("cuda", capability, has_flash=True))
        monkeypatch.setattr(machine, "rates_of", lambda _: dataclasses.replace(RATES, launch_seconds=None))
        fakes = {"get_device_name": name, "mem_get_info": (int(free * GIB), int(total * GIB)),
                 "memory_allocated": 0, "memory_reserved": 0}  # fmt: skip
        for function, value in fakes.items():
            monkeypatch.setattr(torch.cuda, function, lambda _, value=value: value)

    return report


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.choice)
def test_card_has_every_figure_and_a_source(each: cards.Card) -> None:
    hardware = each.hardware
    assert hardware.kind == "cuda" and hardware.name and each.source.startswith("https://")
    assert hardware.memory and hardware.bandwidth and hardware.fp32_tflops and hardware.link
    major, minor = map(int, hardware.capability.split("."))
    assert bool(hardware.fp16_tflops) == (major >= 7)  # tensor cores
    assert bool(hardware.bf16_tflops) == (major >= 8)
    assert hardware.bf16_tflops in (None, hardware.fp16_tflops)
    found = resolve(hardware, "auto")
    assert set(found.sources.values()) >= {f"specified: {each.source}"}
    assert found.target == Target("cuda", (major, minor), has_flash=major >= 8)


@pytest.mark.parametrize(
    "each", [card for card in ALL if "GeForce RTX" in str(card.hardware.name)], ids=lambda each: each.choice
)
def test_tensor_cores_of_geforce_cards_have_half_the_rate_with_float32_sums(each: cards.Card) -> None:
    """Twice the rate of float32 from Ampere on, four times before; NVIDIA's tables round to 0.1."""
    times = 4 if each.hardware.capability == "7.5" else 2
    assert each.hardware.fp16_tflops == pytest.approx(times * each.hardware.fp32_tflops, rel=0.01)


def test_entries_have_distinct_names_or_sizes_in_rising_order() -> None:
    assert len({(each.hardware.name, each.hardware.memory) for each in ALL}) == len(ALL) >= 40
    assert [each.memory_bytes for each in ALL] == sorted(each.memory_bytes for each in ALL)


@pytest.mark.parametrize(
    ("choice", "reported"),
    [("rtx_4090", 23.64), ("rtx_4060", 7.75), ("rtx_3070", 7.78), ("rtx_2060", 5.79), ("rtx_a4000", 15.61),
     ("rtx_5090", 31.37), ("t4", 14.74), ("h100_80gb", 79.2)],
)  # fmt: skip
def test_budget_is_what_cuda_reports_of_the_nominal_size(choice: str, reported: float) -> None:
    """As quoted in out-of-memory messages of torch."""
    assert (resolve(card(choice), "auto").budget_bytes or 0) / GIB == pytest.approx(reported, rel=0.012)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_specified_figures_become_bytes_and_flop_per_second() -> None:
    found = resolve(card("rtx_4090"), "auto")
    assert (found.name, found.memory_bytes, found.bandwidth) == ("NVIDIA GeForce RTX 4090", 24 * GIB, 1008e9)
    assert found.matmul == {"bfloat16": 165.2e12, "float16": 165.2e12, "float32": 82.6e12}
    assert found.link == 32e9 and not found.is_measured("bandwidth")


def test_memory_alone_is_a_gpu_of_unknown_speed() -> None:
    found = resolve(Hardware(memory="16GB"), "auto")
    assert (found.target, found.memory_bytes) == (Target("cuda", (8, 0), has_flash=True), 16 * 10**9)
    assert found.matmul == {} and found.bandwidth is None
    assert 0 < found.context_bytes < found.budget_bytes < found.memory_bytes
    assert found.sources["memory_bytes"] == "given: hardware.memory" and "assumed" in found.sources["used_bytes"]


@pytest.mark.parametrize(("kind", "device"), [("cpu", "auto"), ("auto", "cpu"), ("cpu", "cpu")])
def test_memory_of_a_cpu_is_one_with_the_rates_of_this_machine(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "rates_of", lambda _: RATES)
    found = resolve(Hardware(kind=kind, memory="4GiB", bandwidth=10), device)
    assert (found.target.kind, found.budget_bytes, found.matmul) == ("cpu", 4 * GIB, RATES.matmul)
    assert found.bandwidth == 10e9 and found.sources["bandwidth"] == "given: hardware"
    assert found.sources["matmul"] == "assumed: as here"


@pytest.mark.parametrize(
    ("given", "device", "message"),
    [
        ({"kind": "cuda"}, "auto", "hardware.memory=24GiB"),
        ({"kind": "cuda"}, "cpu", "leave out device="),
        ({"kind": "cpu", "memory": "8GiB"}, "cuda:1", "hardware.kind=cpu and device=cuda:1"),
        ({"memory": "0GiB"}, "auto", "hardware.memory=0GiB is nothing"),
        ({"memory": "8GiB"}, "mps", "leave out hardware.memory"),
    ],
)
def test_contradictory_or_incomplete_settings_are_errors_with_advice(
    given: dict[str, str], device: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(Hardware(**given), device)


# --- this machine -----------------------------------------------------------------------------------------------------


def test_this_machine_has_its_free_memory_and_the_imports_as_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "total_bytes", lambda _: 10 * GIB)
    monkeypatch.setattr(machine, "available_bytes", lambda _: 6 * GIB)
    monkeypatch.setattr(machine, "resident_bytes", lambda: GIB // 2)
    found = resolve(Hardware(), "cpu", rates=False)
    assert (found.memory_bytes, found.context_bytes) == (10 * GIB, GIB // 2)
    assert found.budget_bytes == 6 * GIB + found.context_bytes
    assert found.matmul == {} and found.is_measured("memory_bytes")
    monkeypatch.setattr(machine, "resident_bytes", lambda: 3 * GIB)  # a process that holds a model as well
    assert resolve(Hardware(), "cpu", rates=False).context_bytes == machine.LIBRARIES_BYTES


def test_gpu_of_this_machine_gets_its_rates_from_the_table_and_its_memory_from_cuda(gpu_here) -> None:
    gpu_here("NVIDIA GeForce RTX 4060 Ti", 15.6, 14.0, (8, 9))
    found = resolve(Hardware(), "auto")
    assert found.matmul["bfloat16"] == 44.1e12 and found.link == 16e9
    assert found.memory_bytes == int(15.6 * GIB) and found.sources["memory_bytes"] == "measured here"
    assert found.sources["matmul"].startswith("specified: https://")
    assert found.budget_bytes == 14 * GIB + found.context_bytes
    assert found.launch_seconds == machine.LAUNCH_SECONDS


@pytest.mark.parametrize(("name", "memory"), [("NVIDIA GeForce RTX 4070 Ti", 12), ("NVIDIA GeForce RTX 4060 Ti", 8)])
def test_gpu_that_the_table_does_not_have_is_measured(gpu_here, name: str, memory: float) -> None:
    gpu_here(name, memory, memory)
    found = resolve(Hardware(bandwidth=500), "auto")
    assert found.matmul == RATES.matmul and found.is_measured("matmul")
    assert found.bandwidth == 500e9 and not found.is_measured("bandwidth")


def test_measuring_is_quick_and_done_once() -> None:
    measure.rates_of.cache_clear()
    begun = time.perf_counter()
    found = measure.rates_of(torch.device("cpu"))
    assert time.perf_counter() - begun < 30  # a tenth of a second, but tests share their cores
    assert measure.rates_of(torch.device("cpu")) is found
    assert min(*found.matmul.values(), found.bandwidth, found.cached_bandwidth, found.launch_seconds or 0) > 0


def test_machine_without_memory_has_no_budget() -> None:
    assert Machine("a device", Target("mps"), None).budget_bytes is None


def test_plan_schema_and_the_machine_name_the_same_rates() -> None:
    names = {each.name for each in dataclasses.fields(Hardware) if each.name.endswith("tflops")}
    assert names == set(machine._RATES)
    assert set(machine._RATES.values()) == {dtype.value for dtype in config.Dtype} - {"auto"}
