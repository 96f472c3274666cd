"""Terms, timeline and costs of a traced step: what live bytes belong to, and the work of its operations."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import Case, predicted
from torch.nn.functional import scaled_dot_product_attention

from lora_ft import config
from lora_ft.memory import parts
from lora_ft.memory.costs import Cost
from lora_ft.memory.decompositions import _FUNCTIONS, decomposition
from lora_ft.memory.fused_attention import fused_attention
from lora_ft.memory.meter import Meter
from lora_ft.memory.timeline import TERMS, Record, Storage
from lora_ft.memory.trace import PHASES, StepTrace, trace_step
from lora_ft.memory.workspaces import allocator_slack, workspaces
from lora_ft.ops.device import CPU, GPU, Target, standing_for

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from shapes import config_of

META = torch.device("meta")
T4, H100 = Target("cuda", (7, 5)), Target("cuda", (9, 0), has_flash=True)


def traced(
    lengths: tuple[int, ...] = (312, 200),
    quant: str = "nf4",
    recompute: str = "every_1",
    device: Target = GPU,
    shape: str = "smollm2_135m",
    layers: int = 2,
    **groups: Any,
) -> StepTrace:
    cfg = config.TrainRun(
        quant=config.Quant(kind=config.QuantKind(quant)),
        train=config.Train(gradient_checkpointing=recompute),
        **groups,
    )
    return trace_step(cfg, config_of(shape, layers), lengths, device)


@pytest.fixture(scope="module")
def found() -> StepTrace:
    return traced()


def test_terms_at_the_peak_and_of_the_base_add_up(found: StepTrace) -> None:
    for each in (found, traced(device=CPU, quant="none"), traced(recompute="off", quant="int8")):
        assert tuple(each.terms_at_peak) == TERMS
        assert sum(each.terms_at_peak.values()) == each.peak_bytes
        assert sum(each.base_bytes.values()) == each.terms_at_peak["base weights"] == each.resident["base"]
        assert each.terms_at_peak["gradients"] == each.resident["gradient"]


def test_base_is_split_by_quantization_and_dtype(found: StepTrace) -> None:
    assert set(found.base_bytes) == {"nf4", "bfloat16", "float32"}  # and a buffer of the rotary embedding
    linear = 2 * 576 * (576 * 2 + 192 * 2 + 3 * 1536)
    assert found.base_bytes["nf4"] == pytest.approx(linear * 4.127 / 8, rel=0.02)
    embedding_and_norms = 2 * (49152 * 576 + 5 * 576)
    assert found.base_bytes["bfloat16"] == pytest.approx(embedding_and_norms, rel=1e-3)


def test_timeline_has_the_peak_and_the_phases_in_order(found: StepTrace) -> None:
    timeline = found.timeline
    assert 100 <= len(timeline.phases) <= 400
    assert max(timeline.totals) == found.peak_bytes
    for name in PHASES:
        most = max(t for t, phase in zip(timeline.totals, timeline.phases, strict=True) if phase == name)
        assert most <= found.peaks[name]
    changes = [p for p, before in zip(timeline.phases, ["", *timeline.phases], strict=False) if p != before]
    assert [name for name in changes if name in PHASES] == list(PHASES)
    assert timeline.at_peak == found.terms_at_peak
    assert all(len(counts) == len(timeline.phases) for counts in timeline.terms.values())


def test_activations_kept_grow_with_layers_and_are_gone_after_the_backward() -> None:
    two, four = (traced(recompute="off", layers=layers).timeline.terms["activations kept"] for layers in (2, 4))
    assert max(four) > 1.8 * max(two)
    assert four[-1] == 0


def test_a_layer_is_recomputed_only_with_checkpointing(found: StepTrace) -> None:
    assert max(found.timeline.terms["recomputed"]) > 0
    assert max(traced(recompute="off").timeline.terms["recomputed"]) == 0
    kept = max(traced(recompute="off").timeline.terms["activations kept"])
    # What two layers keep is recomputed for one of them at a time.
    assert max(found.timeline.terms["recomputed"]) < kept < 3 * max(found.timeline.terms["recomputed"])


def test_dequantization_holds_the_weights_that_are_in_use(found: StepTrace) -> None:
    largest = 2 * 576 * 1536
    most = max(found.timeline.terms["dequantization"])
    assert largest <= most <= 1.2 * largest
    assert max(traced(quant="none").timeline.terms["dequantization"]) == 0
    assert max(traced(quant="none", device=CPU).timeline.terms["attention"]) > 0


def test_loss_holds_its_chunk_of_logits() -> None:
    found = traced((4096,), quant="none")
    rows = 192 * 2**20 // (4 * 49152)
    assert max(found.timeline.terms["loss"]) == pytest.approx(6 * min(rows, 4095) * 49152, rel=0.1)
    assert found.terms_at_peak["loss"] > 0 and found.peak_phase == "loss"


def test_files_and_functions_that_parts_are_found_by_exist() -> None:
    for file, (_, functions) in parts.PARTS.items():
        text = Path(file).read_text("utf-8")
        for name in functions:
            assert "lambda" in text if name == "<lambda>" else f"def {name}(" in text
    assert "def with_copies(" in Path(parts.RECOMPUTES).read_text("utf-8")
    assert "def _call_impl(" in Path(parts.MODULE).read_text("utf-8")
    assert "def _engine_run_backward(" in Path(parts.ENGINE).read_text("utf-8")
    assert set(name for name, _ in parts.PARTS.values()) <= set(TERMS)


def test_functions_of_bitsandbytes_exist() -> None:
    class Func:
        def __init__(self, name: str) -> None:
            self._schema = type("Schema", (), {"name": name})

    for name, device in _FUNCTIONS:
        assert decomposition(Func(name), device or "cuda") is not None
    assert decomposition(Func("bitsandbytes::optimizer_update_8bit_blockwise"), "cuda") is None


# Timelines of made-up storages.


def record(*storages: tuple[int, str, str, int], events: list[int], phases: list[tuple[int, str]]) -> Record:
    made = [Storage(size, torch.float32, phase, part, number) for size, phase, part, number in storages]
    return Record(made, events, phases, recomputed=[0, 6])


def test_storages_belong_to_the_first_term_that_applies() -> None:
    life = record(
        (1, "base", "", 0),
        (10, "forward", "attention", 0),  # lives until the backward
        (100, "forward", "attention", 0),  # does not
        (1000, "backward", "", 1),  # recomputed, and used after that
        (10_000, "backward", "dequantization", 1),  # within the recomputation
        (100_000, "backward", "", 0),
        events=[0, 1, 2, ~2, 3, 4, ~4, 5, ~5, ~3, ~1],
        phases=[(0, "base"), (1, "forward"), (4, "backward")],
    )
    life.first = 1
    life.recomputed = [0, 7]
    terms = {name: max(counts) for name, counts in life.timeline().terms.items()}
    assert {name: most for name, most in terms.items() if most} == {
        "base weights": 1, "activations kept": 10, "attention": 100, "recomputed": 1000, "dequantization": 10_000,
        "other": 100_000,
    }  # fmt: skip
    assert life.timeline().phases == ["forward"] * 3 + ["backward"] * 7


def test_points_stand_for_the_most_of_their_events() -> None:
    life = record(
        *[(1, "forward", "", 0)] * 50,
        events=[event for number in range(50) for event in (number, ~number)],
        phases=[(0, "forward")],
    )
    assert life.timeline(points=10).totals == [1] * 10
    assert len(life.timeline(points=1000).totals) == 100


# Costs.


def costs_of(found: StepTrace, *names: str) -> Iterator[Cost]:
    return (cost for cost in found.costs if any(name in cost.op for name in names))


def test_costs_have_all_operations_and_products(found: StepTrace) -> None:
    for phase in PHASES:
        launched = [cost.count for cost in found.costs if cost.phase == phase and cost.launches]
        assert sum(launched) == found.dispatches[phase]
    assert sum(c.flops * c.count for c in costs_of(found, "mm", "bmm")) == found.flops
    assert {c.dtype for c in costs_of(found, "addmm_")} == {"bfloat16"}
    assert len(found.costs) == len({dataclasses.replace(cost, count=1) for cost in found.costs})


def test_attention_is_counted_by_documents() -> None:
    """312 and 200 tokens, 9 heads of 64 columns: two products over half of the scores of each document."""
    scores = 9 * (312 * 313 + 200 * 201) // 2
    found = traced(recompute="off")
    (forward,) = (cost for cost in found.costs if cost.op.endswith("_varlen_attn"))
    assert (forward.flops, forward.count) == (4 * 64 * scores, 2)
    (backward,) = costs_of(found, "_varlen_attn_backward")
    assert backward.flops == int(2.5 * 4 * 64 * scores) and backward.launches == 3


@pytest.mark.parametrize(("device", "op"), [(CPU, "flash_attention_for_cpu"), (T4, "efficient_attention")])
def test_attention_per_document_is_counted_as_one_operation(device: Target, op: str) -> None:
    found = traced((1024,), recompute="off", device=device, quant="none")
    forward = [cost for cost in costs_of(found, op) if "backward" not in cost.op]
    assert sum(cost.flops * cost.count for cost in forward) == 2 * 4 * 64 * 9 * 1024 * 1024 // 2
    assert not list(costs_of(found, "softmax_backward"))


def test_tiles_of_attention_are_products_and_their_terms_are_attention() -> None:
    found = traced((600,), device=CPU, quant="none")
    assert sum(cost.count for cost in costs_of(found, "bmm")) > 2 * 10
    assert max(found.timeline.terms["attention"]) > 4 * 9 * 600 * 64


def test_bytes_of_an_operation_are_what_it_reads_and_writes() -> None:
    with Meter() as meter:
        meter.phase = "forward"
        a, b = torch.empty(8, 16, device=META), torch.empty(16, 4, device=META)
        table, ids = torch.empty(1000, 4, device=META), torch.empty(5, dtype=torch.int64, device=META)
        a @ b
        a.add_(1)
        a.zero_()
        torch.nn.functional.embedding(ids, table)
        a + torch.empty(1, 16, device=META).expand(8, 16)
    found = {cost.op.removeprefix("aten."): cost for cost in meter.costs()}
    assert (found["mm"].flops, found["mm"].bytes) == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4))
    assert found["add_"].bytes == 4 * 2 * 8 * 16
    assert found["zero_"].bytes == 4 * 8 * 16
    assert found["embedding"].bytes == 8 * 5 + 2 * 4 * 5 * 4
    assert found["add"].bytes == 4 * (2 * 8 * 16 + 16)
    assert found["mm"].dtype == "float32" and found["mm"].phase == "forward"


# Attention on the meta device.


def ops_of(device: Target, heads: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> set[str]:
    with Meter() as meter, standing_for(device), fused_attention():
        query = torch.empty(1, 4, 128, 64, dtype=dtype, device=META, requires_grad=True)
        key = torch.empty(1, heads, 128, 64, dtype=dtype, device=META, requires_grad=True)
        if options.pop("masked", False):
            options["attn_mask"] = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=META)
        else:
            options["is_causal"] = True
        result = scaled_dot_product_attention(query, key, key, enable_gqa=heads != 4, **options)
        assert result.shape == query.shape
        result.sum().backward()
        assert key.grad.shape == key.shape
    return {cost.op.rpartition(".")[2] for cost in meter.costs()}


def test_attention_takes_the_kernel_of_the_device() -> None:
    half = torch.bfloat16
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in ops_of(CPU, heads=2)
    assert "_scaled_dot_product_flash_attention_for_cpu" in ops_of(CPU, masked=True)
    assert "_softmax" in " ".join(ops_of(CPU, dropout_p=0.1))
    assert "_scaled_dot_product_flash_attention_backward" in ops_of(GPU, 2, half)
    assert "_scaled_dot_product_efficient_attention_backward" in ops_of(GPU, 4, half, masked=True)
    assert "_scaled_dot_product_efficient_attention" in ops_of(GPU)
    assert "_scaled_dot_product_efficient_attention" not in ops_of(GPU, 2)


def test_attention_of_the_meta_device_is_torchs_own_after_the_block() -> None:
    ops_of(CPU)
    with Meter() as meter, standing_for(CPU):
        query = torch.empty(1, 2, 8, 8, device=META)
        scaled_dot_product_attention(query, query, query)
    assert not [cost for cost in meter.costs() if "for_cpu" in cost.op]


# What a trace does not see.


def test_buffers_inside_attention_raise_the_peak_where_attention_is_the_peak() -> None:
    """A long document, heads that are wide for the MLP: float32 gradients of queries, and expanded keys and values."""
    small = config_of("qwen3_0_6b", 1)
    small.intermediate_size, small.vocab_size = 256, 512
    cfg = config.TrainRun(train=config.Train(gradient_checkpointing="off"))
    found = trace_step(cfg, small, [4096], GPU)
    assert 0 < found.bytes_inside <= 4 * (4096 + 128) * 16 * 129 + 2 * 4096 * 16 * 128 * 2
    assert workspaces(found, GPU) == found.bytes_inside + 2 * (8 * 2**20 + 2**17)
    assert workspaces(found, H100) == found.bytes_inside + 2 * 32 * 2**20


def test_slack_grows_with_what_a_step_allocates_and_passes() -> None:
    short, long = (traced((length,), device=CPU) for length in (128, 2048))
    assert 0 < allocator_slack(short, CPU) < allocator_slack(long, CPU)
    assert allocator_slack(long, GPU) % (2 * 2**20) == 0


def test_bfloat16_checkpoint_is_stored_so_on_a_cpu() -> None:
    stored, whole = (predicted(Case("llama", (64,), checkpoint=dtype)) for dtype in ("bfloat16", "float32"))
    assert stored.base_bytes["bfloat16"] == whole.base_bytes["float32"] / 2 - stored.base_bytes["float32"] / 2
    assert predicted(Case("llama", (64,), "nf4", checkpoint="bfloat16")).base_bytes.keys() == {"nf4", "float32"}
    slow = dataclasses.replace(Case("llama", (64,), checkpoint="bfloat16").settings, fast=config.Fast(storage=False))
    assert trace_step(slow, Case("llama", (64,)).config, [64], CPU).base_bytes.keys() == {"float32"}


def test_paged_state_is_on_the_device_only_if_it_is_a_cpu() -> None:
    optim = config.Optim(name=config.Optimizer.paged_adamw)
    assert "optimizer" not in traced(optim=optim).resident
    assert traced(optim=optim, device=CPU).resident["optimizer"] > 0
