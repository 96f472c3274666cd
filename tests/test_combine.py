"""Combined and truncated adapters: the written update is the expected one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import adapted, call, finished_run, saved_run, settings
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import files, peft_folder
from lora_ft.export import truncate
from lora_ft.models.load import load_base


def updates(tmp_path: Path, adapter: Path) -> dict[str, Tensor]:
    """Return s B A of every layer in float64, as PEFT computes it for an adapter folder."""
    base = load_base(config.Model(path=str(tmp_path / "llama"), dtype=config.Dtype.float32), config.Quant(), "cpu")
    model = files.load(base.model, adapter, "default").double()
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)
    }  # fmt: skip


def near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    assert found.keys() == expected.keys() and found
    return all((found[n] - expected[n]).norm() <= tolerance * max(expected[n].norm(), 1e-3) for n in found)


def other_run(tmp_path: Path, name: str, factor: float = 0.0, **options: Any) -> Path:
    """Create a finished run on the same base, its matrices B multiplied by `factor`."""
    cfg = settings(tmp_path, "llama", **options)
    run = saved_run(tmp_path / name, cfg)
    if factor and factor != 1:
        path = run / "adapter" / peft_folder.WEIGHTS
        tensors = {key: t * factor if "lora_B" in key else t for key, t in load_file(path).items()}
        path.write_bytes(save(tensors, metadata={"format": "pt"}))
    return run


def merged(tmp_path: Path, name: str, *overrides: str) -> Path:
    assert call("merge", *overrides, f"out={tmp_path / name}") == 0
    return tmp_path / name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("overrides", [[], ["method=ties", "weights=[1,1]", "density=1.0"]], ids=str)
def test_adapter_combined_with_itself_keeps_its_update(tmp_path: Path, overrides: list[str], rslora: bool) -> None:
    run = finished_run(tmp_path, "llama", use_rslora=rslora)
    out = merged(tmp_path, "both", f"adapters=[{run},{run}]", *overrides)
    assert near(updates(tmp_path, out), updates(tmp_path, run / "adapter"))


@pytest.mark.parametrize("rslora", [False, True])
def test_linear_adds_matrices_and_reports_the_distance_from_the_sum_of_updates(
    tmp_path: Path, rslora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A' = sum of sqrt(w s) A, B' = sum of sqrt(w s) B: the product has cross terms that no adapter had."""
    runs = [other_run(tmp_path, name, factor, use_rslora=rslora) for name, factor in (("first", 1.0), ("second", 0.7))]
    capsys.readouterr()
    out = merged(tmp_path, "out", f"adapters=[{runs[0]},{runs[1]}]", "weights=[0.3,0.7]", "method=linear")
    shown = capsys.readouterr().out
    # Both have the same A, and B times a factor: so the product can be derived from the first one's update.
    mixed = (0.3**0.5 + 0.7**0.5) * (0.3**0.5 + 0.7**0.5 * 0.7)
    first = updates(tmp_path, runs[0] / "adapter")
    assert near(updates(tmp_path, out), {name: mixed * update for name, update in first.items()})
    summed = 0.3 + 0.7 * 0.7
    assert f"{abs(mixed - summed) / summed:.1%} away from their weighted sum" in " ".join(shown.split())


def test_svd_is_the_nearest_update_to_the_weighted_sum(tmp_path: Path) -> None:
    small, large = other_run(tmp_path, "small", r=2), other_run(tmp_path, "large", r=5)
    alone = [updates(tmp_path, run / "adapter") for run in (small, large)]
    only = merged(tmp_path, "only", f"adapters=[{small},{large}]", "weights=[0,1.5]", "method=svd")
    assert near(updates(tmp_path, only), {name: 1.5 * update for name, update in alone[1].items()})
    both = updates(tmp_path, merged(tmp_path, "both", f"adapters=[{small},{large}]", "weights=[0.3,0.7]", "method=svd"))
    for name, found in both.items():
        whole = 0.3 * alone[0][name] + 0.7 * alone[1][name]
        u, values, v = torch.linalg.svd(whole)
        best = u[:, :5] * values[:5] @ v[:5]  # the highest rank of the two
        assert (found - best).norm() < 1e-5 * whole.norm()


def test_combination_is_recorded_and_reproducible(tmp_path: Path) -> None:
    first, second = other_run(tmp_path, "first"), other_run(tmp_path, "second", factor=-0.5)
    overrides = (f"adapters=[{first},{second / 'adapter'}]", "method=dare_ties", "density=0.5")
    one, again = merged(tmp_path, "one", *overrides), merged(tmp_path, "again", *overrides)
    other = merged(tmp_path, "other", *overrides, "seed=1")
    weights = [(folder / peft_folder.WEIGHTS).read_bytes() for folder in (one, again, other)]
    assert weights[0] == weights[1] != weights[2]
    record = json.loads((one / "lora_ft.json").read_text())
    assert record["base"] == json.loads((first / "adapter" / "lora_ft.json").read_text())["base"]
    assert "dare_ties" in json.dumps(record) and "adapter_sha256" in json.dumps(record)


@pytest.mark.parametrize(
    ("options", "overrides", "code", "message"),
    [
        ({"r": 8}, ["method=linear"], 2, "method=svd"),
        ({"use_dora": True}, ["method=svd"], 5, "DoRA"),
        ({}, ["weights=[1]"], 2, "weights must have one value per adapter (2), got 1"),
        ({"target_modules": ["q_proj"]}, ["method=svd"], 5, "does not fit"),
    ],
)
def test_adapters_that_cannot_be_combined_are_refused(
    tmp_path: Path,
    options: dict[str, Any],
    overrides: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = other_run(tmp_path, "first"), other_run(tmp_path, "second", **options)
    assert call("merge", f"adapters=[{first},{second}]", *overrides, f"out={tmp_path / 'out'}") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 3.0}], ids=str)
def test_truncated_adapter_is_the_nearest_of_its_rank(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama", r=6, **options)
    capsys.readouterr()
    out = merged(tmp_path, "small", f"run={run}", "truncate_rank=3")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown if line.split()[-1:] and line.split()[0].isdecimal()] == [
        "1",
        "2",
        "3",
        "4",
        "6",
    ]
    saved = peft_folder.read_config(out)
    assert (saved.r, saved.lora_alpha, saved.use_rslora) == (3, 3, False)
    whole, small = updates(tmp_path, run / "adapter"), updates(tmp_path, out)
    for name, update in whole.items():
        u, values, v = torch.linalg.svd(update)
        assert (small[name] - u[:, :3] * values[:3] @ v[:3]).norm() < 1e-5 * update.norm()


def test_compare_ranks_measures_each_rank_and_restores_the_adapter(tmp_path: Path) -> None:
    _, model = adapted(settings(tmp_path, "llama", r=5))
    before = files.tensors_of(model, "first")
    found = truncate.updates(model, "first")

    def size() -> float:
        return sum(
            float(m.get_delta_weight("first").detach().norm() ** 2) for m in model.modules() if isinstance(m, LoraLayer)
        )

    whole = size()
    kept = truncate.compare_ranks(model, "first", found, 3, size)
    assert [row.rank for row in kept] == [1, 2, 3, 4, 5]
    assert kept[-1].norm == 1.0 and all(row.loss == pytest.approx(row.norm**2 * whole, rel=1e-4) for row in kept)
    assert all(torch.equal(tensor, before[key]) for key, tensor in files.tensors_of(model, "first").items())


@pytest.mark.parametrize(
    ("options", "rank", "code", "message"),
    [
        ({"r": 4}, 4, 2, "must be below the adapter's rank, 4"),
        ({"use_dora": True}, 2, 5, "DoRA"),
        ({}, 0, 2, "truncate_rank"),
    ],
)
def test_adapters_that_cannot_be_truncated_are_refused(
    tmp_path: Path, options: dict[str, Any], rank: int, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "llama", **options)
    assert call("merge", f"run={run}", f"truncate_rank={rank}", f"out={tmp_path / 'out'}") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
