"""The trace: the run's own step on tensors without values, and what the fast paths must keep on a GPU in bfloat16."""

import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import packed
from peft.tuners.lora import LoraLayer
from states import detach, state_on
from tiny import MIXTURES, tiny_model
from torch import nn

from lora_ft import config
from lora_ft.memory.meter import HostDeviceMix, Meter
from lora_ft.memory.trace import PHASES, StepTrace, trace_loaded, trace_step
from lora_ft.memory.twin import on_meta
from lora_ft.models.meta_quantize import quantize_meta
from lora_ft.models.quantize import import_bitsandbytes
from lora_ft.ops.device import CPU, GPU, standing_for, target
from lora_ft.ops.gradient_checkpointing import recomputed_layers
from lora_ft.ops.token_loss import token_loss_sum
from lora_ft.values import BlockKernels

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from shapes import SHAPES, config_of

GIB = 2**30
META = torch.device("meta")


def settings(quant: str = "none", checkpointing: str = "every_1", **groups: Any) -> config.TrainRun:
    train = config.Train(gradient_checkpointing=checkpointing)
    return config.TrainRun(quant=config.Quant(kind=config.QuantKind(quant)), train=train, **groups)


def traced(shape: str, tokens: int, num_layers: int | None = None, quant: str = "none", **options: Any) -> StepTrace:
    return trace_step(settings(quant, **options), config_of(shape, num_layers), [tokens])


@pytest.fixture(scope="module")
def llama_8b() -> StepTrace:
    return traced("llama3_1_8b", 4096, quant="nf4")


# The limits that the fast paths must keep.


def test_8b_nf4_step_of_4096_tokens_fits_in_less_than_8_gib(llama_8b: StepTrace) -> None:
    assert llama_8b.peak_bytes <= 7.7 * GIB


def test_8b_step_makes_few_launches(llama_8b: StepTrace) -> None:
    """With Liger's or compiled kernels, which fast.kernels=auto takes on a GPU."""
    assert sum(llama_8b.dispatches.values()) < 6500


def test_8b_step_with_eager_kernels_needs_the_same_memory_and_more_launches(llama_8b: StepTrace) -> None:
    eager = traced("llama3_1_8b", 4096, quant="nf4", fast=config.Fast(kernels=BlockKernels.eager))
    assert eager.peak_bytes <= 1.001 * llama_8b.peak_bytes
    assert sum(llama_8b.dispatches.values()) < sum(eager.dispatches.values()) < 10_000


def test_8b_nf4_step_of_2048_tokens_with_the_embedding_on_the_cpu_fits_in_less_than_6_gib() -> None:
    model = config.Model(embedding_device="cpu")
    assert traced("llama3_1_8b", 2048, quant="nf4", model=model).peak_bytes <= 5.9 * GIB


def test_8b_nf4_step_of_2048_tokens_fits_in_less_than_7_gib() -> None:
    assert traced("llama3_1_8b", 2048, quant="nf4").peak_bytes <= 6.85 * GIB


def test_loss_of_an_8b_step_makes_few_launches(llama_8b: StepTrace) -> None:
    assert llama_8b.dispatches["loss"] <= 100


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_no_lora_layer_computes_as_peft_does_and_a_step_synchronises_once(shape: str, quant: str) -> None:
    found = traced(shape, 64, 2, quant)
    assert (found.plain_lora_layers, found.reasons) == ([], [])
    # Gemma 2 caps its attention scores, so it takes transformers' attention, which reads positions for its two masks.
    assert len(found.synchronisations) <= (3 if shape == "gemma2_2b" else 1), found.synchronisations


# The trace itself.


def test_8b_base_in_nf4_has_its_known_size(llama_8b: StepTrace) -> None:
    """Codes of 4 bits, nested scales, and in 16 bits: embedding, head and norms."""
    linear = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14336)
    rest = 2 * (2 * 128256 * 4096 + 65 * 4096)
    scales = linear // 64 + 4 * linear // 64 // 256
    assert llama_8b.resident["base"] == pytest.approx(linear // 2 + scales + rest, rel=1e-3)
    adapter = 4 * 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert llama_8b.resident["gradient"] == adapter
    assert llama_8b.resident["optimizer"] == pytest.approx(2 * adapter, rel=1e-3)
    assert llama_8b.loaded_bytes == llama_8b.resident_bytes - llama_8b.resident["optimizer"]


def test_products_of_an_8b_step_are_counted(llama_8b: StepTrace) -> None:
    """Forward, recomputed forward and input gradient of each frozen weight; the head once forward and once back.

    The recomputation stops before a layer's last product, whose result no backward needs.
    """
    last = 32 * 4096 * 14336
    linear = 32 * (4096 * (4096 + 1024) * 2 + 2 * 4096 * 14336) + last
    exact = 2 * 4096 * (3 * linear - last + 2 * 128256 * 4096)
    assert exact < llama_8b.flops < 1.05 * exact


@pytest.mark.parametrize(
    ("checkpointing", "depths"), [("off", (2, 3, 6)), ("every_1", (2, 3, 6)), ("every_2", (2, 4, 8))]
)
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_all_but_embedding_and_loss_is_linear_in_layers(
    quant: str, checkpointing: str, depths: tuple[int, int, int]
) -> None:
    first, second, third = (traced("smollm2_135m", 512, depth, quant, checkpointing=checkpointing) for depth in depths)
    ratio = (depths[2] - depths[0]) // (depths[1] - depths[0])
    for name in ("peak_bytes", "resident_bytes", "flops"):
        a, b, c = (getattr(each, name) for each in (first, second, third))
        assert c == a + ratio * (b - a), name
    for name in ("peaks", "dispatches", "resident"):
        a, b, c = (getattr(each, name) for each in (first, second, third))
        # Step counts of an optimizer's groups do not grow; all else does.
        assert c == {key: a[key] + ratio * (b[key] - a[key]) for key in a}, name


def test_recomputation_trades_memory_for_launches() -> None:
    kept, half, recomputed = (
        traced("smollm2_135m", 512, 4, checkpointing=each) for each in ("off", "every_2", "every_1")
    )
    assert kept.peak_bytes > half.peak_bytes > recomputed.peak_bytes
    assert kept.dispatches["backward"] < half.dispatches["backward"] < recomputed.dispatches["backward"]
    assert kept.dispatches["forward"] == recomputed.dispatches["forward"]


def test_peak_is_the_most_of_all_phases_and_is_made_of_its_parts() -> None:
    found = traced("qwen3_0_6b", 512, 2)
    assert found.peak_bytes == max(found.peaks.values()) == found.peaks[found.peak_phase]
    assert sum(found.at_peak.values()) == found.peak_bytes
    assert set(found.peaks) == set(found.dispatches) == set(PHASES)


def test_layers_that_compute_as_peft_does_are_named() -> None:
    found = traced("llama3_1_8b", 64, 1, fast=config.Fast(lora=False))
    assert len(found.plain_lora_layers) == 7
    assert found.reasons == ["plain lora: fast.lora=false"]


def test_micro_batches_of_a_step_are_traced_one_after_the_other() -> None:
    cfg = settings()
    whole = trace_step(cfg, config_of("smollm2_135m", 2), [256, 256])
    cfg.train.tokens_per_microbatch = 256
    cut = trace_step(cfg, config_of("smollm2_135m", 2), [256, 256])
    assert cut.peak_bytes < whole.peak_bytes
    assert cut.dispatches["forward"] > 1.9 * whole.dispatches["forward"]


def test_state_of_the_optimizer_on_the_cpu_is_not_resident() -> None:
    cfg = settings()
    there = trace_step(cfg, config_of("smollm2_135m", 2), [64])
    cfg.optim.offload = True
    away = trace_step(cfg, config_of("smollm2_135m", 2), [64])
    assert there.resident_bytes - away.resident_bytes == there.resident["optimizer"]


def test_kernels_of_a_gpu_are_one_launch_each() -> None:
    eager, one = (
        trace_step(settings(fast=config.Fast(kernels=kernels)), config_of("smollm2_135m", 2), [512])
        for kernels in (BlockKernels.eager, BlockKernels.auto)
    )
    assert one.dispatches["forward"] < 0.8 * eager.dispatches["forward"]


# A loaded model.


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_loaded_model_is_traced_and_does_not_change(family: str, tmp_path: Path) -> None:
    assert family in ("llama", "gpt2", *MIXTURES)
    state = state_on(tiny_model(family), tmp_path, train=config.Train(max_steps=6, tokens_per_step=60))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    drawn = torch.get_rng_state()
    found = trace_loaded(state, [20, 30], "every_1")
    assert found.peak_bytes > found.resident_bytes > 0
    assert all(torch.equal(before[name], value) for name, value in state.model.state_dict().items())
    assert not state.flat.gradients.any() and not state.optimizer.state
    assert torch.equal(torch.get_rng_state(), drawn)
    detach(state)


def test_bytes_kept_for_the_backward_are_those_of_a_real_step(tmp_path: Path) -> None:
    """Traced on the CPU's own paths, and counted by autograd in a real forward."""
    state = state_on(tiny_model("llama"), tmp_path, train=config.Train(max_steps=6, tokens_per_step=60))
    state.model.train()
    own = {p.untyped_storage().data_ptr() for p in (*state.model.parameters(), *state.model.buffers())}
    for setting in ("off", "every_1"):
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = packed(90, 110)
        with recomputed_layers(state.base, setting), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = token_loss_sum(state.base, batch, state.paths)
        found = trace_loaded(state, [90, 110], setting)
        # The trace also counts ids, positions, masks and what is in use at the peak.
        assert sum(kept.values()) < found.peaks["loss"] - found.resident_bytes
        if setting == "off":
            assert found.at_peak["forward"] == pytest.approx(sum(kept.values()), rel=0.1)
        del loss
    detach(state)


def test_copy_on_the_meta_device_has_the_forwards_and_layers_of_the_model(tmp_path: Path) -> None:
    state = state_on(tiny_model("llama"), tmp_path, train=config.Train(max_steps=6, tokens_per_step=60))
    made = on_meta(state.model)
    assert all(p.is_meta for p in made.parameters())
    layers, copies = ([m for m in model.modules() if isinstance(m, LoraLayer)] for model in (state.model, made))
    for layer, copied in zip(layers, copies, strict=True):
        assert vars(copied)["forward"].args[0] is copied
        assert copied.lora_A["default"].weight is not layer.lora_A["default"].weight
    detach(state)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantized_copy_keeps_codes_scales_and_dtypes(quant: str) -> None:
    with META:
        network = tiny_model("llama", dtype=torch.bfloat16)
    names = quantize_meta(network, config.Quant(kind=config.QuantKind(quant)), torch.bfloat16)
    assert len(names) == 14
    copied = on_meta(network)
    for name in names:
        weight, twin = network.get_submodule(name).weight, copied.get_submodule(name).weight
        assert type(weight) is type(twin) and weight is not twin and weight.dtype == twin.dtype
        if quant == "nf4":
            assert twin.quant_state.dtype == torch.bfloat16 and twin.quant_state.absmax.is_meta
            assert twin.module is copied.get_submodule(name)


def test_quantizing_without_values_leaves_real_quantization_as_it_was() -> None:
    """bitsandbytes keeps one table of levels for the process, on the device of the first weight."""
    functional = import_bitsandbytes().functional
    functional.name2qmap.clear()
    with META:
        network = tiny_model("llama")
    quantize_meta(network, config.Quant(kind=config.QuantKind.nf4), torch.float32)
    weight = torch.linspace(-1, 1, 4096).view(64, 64)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert (functional.dequantize_4bit(packed, state) - weight).abs().max() < 0.2


# The meter.


def test_live_bytes_follow_tensors_and_views() -> None:
    with Meter() as meter:
        meter.phase = "first"
        a = torch.empty(1000, device=META)
        b = a.view(10, 100)
        assert meter.live["first"] == 4096  # a multiple of 512
        del a
        assert meter.live["first"] == 4096
        meter.phase = "second"
        c = b * 2
        del b
        gc.collect()
        assert (meter.live["first"], meter.live["second"]) == (0, 4096)
        assert (meter.peaks["first"], meter.peaks["second"]) == (4096, 8192)
        assert meter.at_peak == {"first": 4096, "second": 4096}
        del c
        assert meter.live_bytes == 0


def test_views_and_allocations_launch_nothing() -> None:
    with Meter() as meter:
        x = torch.empty(4, 4, device=META)
        x.t().reshape(2, 8)[0].detach().expand(3, 8)
        assert meter.dispatches.total() == 1  # reshape copies a transposed matrix
        x.add_(1)
        assert meter.dispatches.total() == 2


def test_reads_by_the_host_are_counted() -> None:
    with Meter() as meter:
        x = torch.ones(3, device=META)
        assert float(x.sum()) == 1.0
        assert x.tolist() == [1.0, 1.0, 1.0]
        assert x.nonzero().shape == (3, 1)
        assert len(meter.synchronisations) == 3
        torch.ones(3).sum().item()  # on the CPU
        assert len(meter.synchronisations) == 3


def test_copies_from_the_host_go_to_the_device_that_the_meta_device_stands_for() -> None:
    """A model with its embedding on the CPU moves its rows to the device that it was loaded on."""
    with Meter() as meter:
        copied = meter.__torch_dispatch__(
            torch.ops.aten._to_copy.default,
            (),
            (torch.ones(3),),
            {"device": torch.device("cuda"), "non_blocking": True},
        )
        assert copied.is_meta
        assert meter.live_bytes == 512 and not meter.synchronisations


def test_copies_from_pageable_memory_are_synchronisations() -> None:
    """The host waits for them; batches and boundaries of documents are copied from pinned memory."""
    with Meter() as meter:
        torch.ones(3).to(META, non_blocking=True)
        assert not meter.synchronisations
        torch.ones(3).to(META)
        assert len(meter.synchronisations) == 1


def test_mixing_host_and_device_is_an_error() -> None:
    with Meter():
        x = torch.ones(3, 3, device=META)
        x * torch.tensor(2.0)  # a number may come from the host
        with pytest.raises(HostDeviceMix, match=r"aten\.mm"):
            x @ torch.ones(3, 3)


def test_backward_is_a_phase_of_its_own() -> None:
    with Meter() as meter:
        meter.phase = "forward"
        w = nn.Parameter(torch.ones(3, 3, device=META))
        loss = (w @ w).sum()
        loss.backward()
        w.grad.mul_(2)
        assert meter.dispatches["forward"] == 4  # ones, product, sum, and the ones that autograd starts from
        assert meter.dispatches["backward"] >= 2 and meter.dispatches["optimizer"] == 1


def test_meta_device_stands_for_another_inside_the_block_only() -> None:
    assert target(META).kind == "meta"
    with standing_for(GPU):
        assert target(META) == GPU and target(torch.device("cpu")) == CPU
    assert target(META).kind == "meta"


def test_trace_does_not_change_the_random_state() -> None:
    before = torch.get_rng_state()
    traced("qwen3_0_6b", 128, 2, "nf4")
    assert torch.equal(torch.get_rng_state(), before)


def test_trace_is_the_same_twice() -> None:
    first, second = (dataclasses.asdict(traced("qwen3_0_6b", 128, 2, "nf4")) for _ in range(2))
    assert first == second
