"""The flat optimizer against torch's AdamW on separate parameters; learning rate schedules against closed forms."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from lora_ft import config
from lora_ft.training import optimizers

NAMES = (
    "a.lora_A.x.weight",
    "a.lora_B.x.weight",
    "b.lora_A.x.weight",
    "b.lora_B.x.weight",
    "b.lora_magnitude_vector.x",
)


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = ((5, 2), (5, 3), (5, 4), (5, 5), (6,))
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in zip(NAMES, shapes, strict=True)}


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_flat_optimizer_matches_adamw_on_separate_parameters(ratio: float) -> None:
    """Ten steps of AdamW in float64 with weight decay, clipping and LoRA+ groups."""
    optim = config.Optim(lr=0.01, weight_decay=0.1, lora_plus_ratio=ratio, max_grad_norm=0.5)
    in_flat, separate = parameters(), parameters()
    flat = optimizers.flatten(in_flat)
    ours = optimizers.build(flat, optim)
    vector = NAMES[-1]
    groups = [
        {"params": [separate[n] for n in NAMES if "lora_A" in n], "lr": optim.lr},
        {"params": [separate[n] for n in NAMES if "lora_B" in n], "lr": optim.lr * ratio},
        {"params": [separate[vector]], "lr": optim.lr, "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)
    for step in range(10):
        flat.gradients.zero_()
        theirs.zero_grad()
        for group in (in_flat, separate):
            sum((p * math.sin(step + i)).pow(3).sum() for i, p in enumerate(group.values())).backward()
        norm = optimizers.clip(flat.gradients, optim.max_grad_norm)
        expected = nn.utils.clip_grad_norm_(list(separate.values()), optim.max_grad_norm)
        assert norm == pytest.approx(float(expected), rel=1e-13)
        optimizers.set_learning_rate(ours, optim.lr)
        ours.step()
        theirs.step()
    for name in NAMES:
        torch.testing.assert_close(in_flat[name], separate[name], rtol=1e-12, atol=1e-14)


def test_parameters_become_views_of_the_flat_tensor_with_equal_values() -> None:
    tensors, copies = parameters(), parameters()
    flat = optimizers.flatten(tensors)
    assert all(torch.equal(tensors[n], copies[n]) for n in NAMES)
    flat.values.zero_()
    assert all(p.abs().sum() == 0 for p in tensors.values())
    assert flat.values.numel() == sum(p.numel() for p in tensors.values())


def test_clip_keeps_gradients_below_the_limit_and_zero_disables_it() -> None:
    gradients = torch.tensor([3.0, 4.0])
    assert optimizers.clip(gradients, 6.0) == 5.0
    assert optimizers.clip(gradients, 0.0) == 5.0
    assert gradients.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_clip_in_float32_gives_the_bits_of_torch(max_norm: float) -> None:
    gradients = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = nn.Parameter(gradients.clone())
    expected.grad = gradients.clone()
    assert torch.equal(optimizers.clip(gradients, max_norm), nn.utils.clip_grad_norm_([expected], max_norm))
    assert torch.equal(gradients, expected.grad)


def test_clip_reports_the_norm_of_a_nonfinite_gradient() -> None:
    assert optimizers.clip(torch.tensor([float("inf"), 4.0]), 1.0) == math.inf


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw"])
@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")
def test_bitsandbytes_optimizers_lower_the_loss(name: str) -> None:
    tensors = {n: nn.Parameter(torch.randn(80, 80)) for n in NAMES[:2]}
    flat = optimizers.flatten(tensors)
    optimizer = optimizers.build(flat, config.Optim(name=config.Optimizer[name], lr=0.05))
    losses = []
    for _ in range(20):
        flat.gradients.zero_()
        loss = sum(p.pow(2).sum() for p in tensors.values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 4


def steps_of(optimizer: torch.optim.Optimizer, flat: optimizers.Flat, first: int, last: int) -> None:
    """Take steps `first` to `last` with gradients that depend on the step and the current values."""
    for step in range(first, last):
        flat.gradients.copy_((flat.values * math.sin(step + 1)).tanh())
        optimizer.step()


def many_small() -> dict[str, nn.Parameter]:
    """Return matrices of 1,800 numbers each; bitsandbytes uses 8-bit states from 4,096 numbers on."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layer{i}.lora_{part}.x.weight" for i in range(4) for part in "AB"]
    return {name: nn.Parameter(torch.randn(30, 60, generator=generator)) for name in names}


@pytest.mark.closes("B07")
def test_8_bit_states_cover_small_matrices_and_stay_close_to_float32() -> None:
    moved = {}
    for name in ("adamw", "adamw_8bit"):
        flat = optimizers.flatten(many_small())
        start, optimizer = flat.values.clone(), optimizers.build(flat, config.Optim(name=config.Optimizer[name]))
        steps_of(optimizer, flat, 0, 10)
        moved[name] = flat.values - start
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    assert [state[moment].dtype for state in states for moment in ("state1", "state2")] == [torch.uint8] * 4
    error = (moved["adamw_8bit"] - moved["adamw"]).norm() / moved["adamw"].norm()
    assert 0 < error < 0.05


@pytest.mark.closes("B07")
@pytest.mark.parametrize("name", [optimizer.name for optimizer in config.Optimizer])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")
def test_restored_optimizer_continues_exactly(name: str, offload: bool) -> None:
    optim = config.Optim(name=config.Optimizer[name], lr=0.01, offload=offload)
    flat = optimizers.flatten(many_small())
    optimizer = optimizers.build(flat, optim)
    steps_of(optimizer, flat, 0, 5)
    values, saved = flat.values.clone(), {n: t.clone() for n, t in optimizers.state(optimizer).items()}
    steps_of(optimizer, flat, 5, 10)
    again = optimizers.flatten(many_small())
    again.values.copy_(values)
    continued = optimizers.build(again, optim)
    for key, value in saved.items():
        optimizers.restore(continued, key, value)
    steps_of(continued, again, 5, 10)
    assert torch.equal(again.values, flat.values)


def rates(steps: int, **settings: object) -> list[float]:
    optim = config.Optim(lr=1.0, **{k: config.Schedule[v] if k == "schedule" else v for k, v in settings.items()})
    return [optimizers.learning_rate(optim, step, steps) for step in range(steps)]


def test_offloading_keeps_no_parameter_alive() -> None:
    flat = optimizers.flatten(parameters())
    optimizer = optimizers.build(flat, config.Optim(offload=True))
    optimizer.step()
    freed = weakref.ref(flat.values.untyped_storage())
    gc.disable()
    try:
        del flat, optimizer
        assert freed() is None
    finally:
        gc.enable()


def test_offloaded_state_is_on_the_device_during_a_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps are those of an optimizer that keeps its state on the device."""
    moves: list[str] = []
    move = optimizers._move_state
    monkeypatch.setattr(optimizers, "_move_state", lambda o, device: moves.append(device.type) or move(o, device))
    results = []
    for offload in (False, True):
        flat = optimizers.flatten(parameters())
        optimizer = optimizers.build(flat, config.Optim(offload=offload))
        for step in range(3):
            flat.gradients.fill_(0.1 * step + 0.1)
            optimizer.step()
            moves.append("step")
        results.append((flat.values, optimizers.state(optimizer)))
    device = flat.values.device.type
    assert moves == ["step"] * 3 + [device, "cpu", "step"] * 3
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.closes("A13")
def test_constant_schedule_with_warmup() -> None:
    assert rates(4, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.closes("A13")
def test_linear_schedule_matches_transformers_after_warmup() -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, 10)
    expected = []
    for _ in range(10):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    result = rates(10, schedule="linear", warmup_steps=3)
    assert result[3:] == pytest.approx(expected[3:], rel=1e-12)
    assert result[:3] == pytest.approx([1 / 3, 2 / 3, 1])


def test_cosine_schedule_is_symmetric() -> None:
    result = rates(9, schedule="cosine")
    assert result[0] == 1
    assert all(a + b == pytest.approx(1) for a, b in zip(result[1:], reversed(result[1:]), strict=True))


def test_wsd_schedule_is_constant_and_then_decays_linearly() -> None:
    result = rates(10, schedule="wsd", decay_fraction=0.4)
    assert result == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", [s.name for s in config.Schedule])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_rates_stay_in_range_and_never_rise_after_warmup(schedule: str, steps: int) -> None:
    result = rates(steps, schedule=schedule, warmup_steps=min(2, steps), min_lr_ratio=0.1)
    assert all(0.1 <= rate <= 1 or step < 2 for step, rate in enumerate(result))
    assert result[2:] == sorted(result[2:], reverse=True)
