"""The time of a step: arithmetic over costs made by hand, and properties of traced steps."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from lora_ft import config
from lora_ft.memory import cards, roofline
from lora_ft.memory.costs import TRANSFER, Cost
from lora_ft.memory.machine import CACHE_BYTES, Machine, resolve
from lora_ft.memory.roofline import launch_bound, run_seconds, step_time
from lora_ft.memory.trace import StepTrace, trace_step
from lora_ft.ops.device import GPU, Target

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from shapes import config_of

MATMUL = {"bfloat16": 100e12, "float32": 10e12}
ON_GPU = Machine("a GPU", GPU, 2**34, bandwidth=1e12, matmul=MATMUL, launch_seconds=5e-6, link=20e9)
ON_CPU = Machine(
    "a CPU", Target("cpu"), 2**34, bandwidth=1e10, cached_bandwidth=1e11, matmul={"float32": 1e11}, launch_seconds=1e-5
)
PRODUCT = Cost("forward", "aten.mm", "bfloat16", 10**12, 10**8, 1, 10)
SUM = Cost("backward", "aten.add", "bfloat16", 0, 10**9, 1, 4)


def seconds(cost: Cost, machine: Machine, part: str) -> float:
    found = step_time([cost], machine)
    assert found is not None
    return found.by_part[part]


def machine_of(choice: str) -> Machine:
    return resolve(next(each.hardware for each in cards.cards() if each.choice == choice), "auto")


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_operation_takes_the_longer_of_its_products_and_its_traffic() -> None:
    per_product = 1 / 100 / roofline.PRODUCT_EFFICIENCY + roofline.KERNEL_SECONDS
    assert seconds(PRODUCT, ON_GPU, "products") == pytest.approx(10 * per_product)
    assert seconds(PRODUCT, ON_GPU, "memory traffic") == 0
    moves_more = dataclasses.replace(PRODUCT, bytes=10**11)
    per_copy = 0.1 / roofline.BANDWIDTH_EFFICIENCY + roofline.KERNEL_SECONDS
    assert seconds(moves_more, ON_GPU, "memory traffic") == pytest.approx(10 * per_copy)


def test_attention_is_less_efficient_than_a_product() -> None:
    attention = dataclasses.replace(PRODUCT, op="aten._scaled_dot_product_flash_attention")
    less = roofline.PRODUCT_EFFICIENCY / roofline.ATTENTION_EFFICIENCY
    kernels = 10 * roofline.KERNEL_SECONDS
    of_product = seconds(PRODUCT, ON_GPU, "products") - kernels
    assert seconds(attention, ON_GPU, "products") - kernels == pytest.approx(less * of_product)


def test_measured_rates_are_taken_as_they_are() -> None:
    measured = dataclasses.replace(ON_GPU, sources={"matmul": "measured here", "bandwidth": "measured here"})
    assert seconds(PRODUCT, measured, "products") == pytest.approx(10 * (1 / 100 + roofline.KERNEL_SECONDS))
    assert seconds(SUM, measured, "memory traffic") == pytest.approx(4 * (1e-3 + roofline.KERNEL_SECONDS))


def test_dtype_without_a_rate_is_computed_in_float32() -> None:
    half = dataclasses.replace(PRODUCT, dtype="float16")
    single = dataclasses.replace(PRODUCT, dtype="float32")
    assert (
        seconds(half, ON_GPU, "products") == seconds(single, ON_GPU, "products") > seconds(PRODUCT, ON_GPU, "products")
    )


def test_gpu_hides_launches_behind_its_work_or_waits_for_them() -> None:
    busy = step_time([PRODUCT, SUM], ON_GPU)
    assert busy is not None and busy.bound_by == "products"
    assert busy.seconds == pytest.approx(busy.by_part["products"] + busy.by_part["memory traffic"])
    waiting = step_time([PRODUCT, dataclasses.replace(SUM, bytes=4, count=10**6)], ON_GPU)
    assert waiting is not None and waiting.bound_by == "launches"
    assert waiting.seconds == waiting.by_part["launches"] == pytest.approx((10**6 + 10) * 5e-6)


def test_cpu_adds_the_overhead_of_operations_and_reads_small_tensors_from_its_caches() -> None:
    small, large = (Cost("forward", "aten.add", "float32", 0, size, 1, 1) for size in (CACHE_BYTES, CACHE_BYTES + 1))
    assert seconds(small, ON_CPU, "memory traffic") == pytest.approx(CACHE_BYTES / 1e11)
    assert seconds(large, ON_CPU, "memory traffic") == pytest.approx(CACHE_BYTES / 1e10)
    product = dataclasses.replace(PRODUCT, dtype="float32")
    found = step_time([small, product], ON_CPU)
    assert found is not None
    assert (
        found.seconds == pytest.approx(sum(found.by_part.values())) == pytest.approx(100 + CACHE_BYTES / 1e11 + 11e-5)
    )
    assert found.bound_by == "products"


def test_copies_between_host_and_gpu_come_on_top() -> None:
    copy = Cost("forward", TRANSFER, "bfloat16", 0, 10**9, 1, 1)
    alone, with_copy = (step_time(costs, ON_GPU) for costs in ([PRODUCT], [PRODUCT, copy]))
    assert alone is not None and with_copy is not None
    assert with_copy.by_part["transfers"] == pytest.approx(1 / 20 / roofline.LINK_EFFICIENCY)
    assert with_copy.seconds - alone.seconds == pytest.approx(with_copy.by_part["transfers"])


def test_micro_batches_repeat_all_but_the_optimizer() -> None:
    update = dataclasses.replace(SUM, phase="optimizer")
    once, thrice = (step_time([PRODUCT, update], ON_GPU, micro_batches=n) for n in (1, 3))
    assert once is not None and thrice is not None
    assert thrice.by_phase["forward"] == pytest.approx(3 * once.by_phase["forward"])
    assert thrice.by_phase["optimizer"] == once.by_phase["optimizer"]
    assert thrice.seconds == pytest.approx(sum(thrice.by_phase.values()))


def test_run_is_its_steps_and_the_forwards_of_its_evaluations() -> None:
    found = step_time([PRODUCT, SUM], ON_GPU)
    assert found is not None
    assert run_seconds(found, 7) == pytest.approx(7 * found.seconds)
    assert run_seconds(found, 7, evaluated=2) == pytest.approx(7 * found.seconds + 2 * found.by_phase["forward"])


def test_time_on_a_device_of_unknown_speed_is_unknown() -> None:
    assert step_time([PRODUCT], dataclasses.replace(ON_GPU, matmul={})) is None
    assert step_time([PRODUCT], dataclasses.replace(ON_GPU, bandwidth=None)) is None


# --- traced steps -----------------------------------------------------------------------------------------------------


def traced(shape: str, tokens: int, checkpointing: str = "off", layers: int = 2, **model: str) -> StepTrace:
    train = config.Train(gradient_checkpointing=checkpointing)
    cfg = config.TrainRun(train=train, adapter=config.Adapter(r=16), model=config.Model(**model))
    return trace_step(cfg, config_of(shape, layers), [tokens], GPU)


def test_products_of_a_trace_take_at_least_their_time_at_full_rate() -> None:
    found, machine = traced("llama3_1_8b", 2048), machine_of("rtx_4090")
    time = step_time(found.costs, machine)
    assert time is not None
    assert time.by_part["products"] > found.flops / machine.matmul["bfloat16"]
    assert 0 < time.error < 1 and set(time.by_part) == set(roofline.PARTS)


def test_recomputation_costs_about_a_forward_and_a_faster_card_is_faster() -> None:
    kept, recomputed = (traced("llama3_1_8b", 2048, setting) for setting in ("off", "every_1"))
    slow, fast = machine_of("rtx_3090"), machine_of("rtx_4090")
    times = [step_time(each.costs, machine) for each in (kept, recomputed) for machine in (slow, fast)]
    kept_slow, kept_fast, recomputed_slow, recomputed_fast = (each.seconds for each in times if each)
    assert kept_fast < kept_slow and recomputed_fast < recomputed_slow
    assert 1.1 < recomputed_slow / kept_slow < 1.5


def test_embedding_on_the_cpu_is_a_transfer_of_its_rows() -> None:
    on_gpu, on_cpu = (traced("llama3_1_8b", 2048, embedding_device=place) for place in ("auto", "cpu"))
    moved = [sum(cost.bytes * cost.count for cost in each.costs if cost.op == TRANSFER) for each in (on_gpu, on_cpu)]
    rows = 2048 * 4096 * 2
    assert rows <= moved[1] - moved[0] < 1.01 * rows


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")]
)
def test_products_of_a_gpu_are_in_the_dtype_that_training_chooses(capability: tuple[int, int], dtype: str) -> None:
    cfg = config.TrainRun(train=config.Train(gradient_checkpointing="off"))
    found = trace_step(cfg, config_of("smollm2_135m", 1), [64], Target("cuda", capability))
    largest = max((cost for cost in found.costs if cost.phase == "forward"), key=lambda cost: cost.flops)
    assert largest.dtype == dtype


def test_small_model_is_bound_by_launches_until_its_step_is_large_enough() -> None:
    def sentence(tokens: int) -> str:
        return launch_bound(traced("qwen3_0_6b", tokens, layers=8), tokens, machine_of("h100_80gb"))

    enough = int(re.search(r"train\.tokens_per_step=(\d+) on", sentence(1024))[1])  # type: ignore[index]
    assert 1024 < enough <= 8192
    assert sentence(enough) == "" != sentence(enough // 4)


def test_large_step_and_unknown_speed_are_not_bound_by_launches() -> None:
    found = traced("llama3_1_8b", 4096)
    assert launch_bound(found, 4096, machine_of("h100_80gb")) == ""
    assert launch_bound(found, 4096, dataclasses.replace(ON_GPU, matmul={})) == ""
    assert launch_bound(traced("qwen3_0_6b", 128), 128, ON_CPU) == ""
