"""benchmarks/gpu.py works without a GPU, gives all trainers the same input, and times no run with wrong gradients."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_trainers

from lora_ft import config
from lora_ft.models.acceleration import accelerate


def case(trainer: str = "lora_ft", method: str = "lora", checkpoint: str = "every_1", rows: str = "equal") -> gpu.Case:
    return gpu.Case("tiny", method, trainer, checkpoint, rows, tokens=200, steps=2)


def test_command_writes_dated_results_and_reports_skipped_trainers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainers run in this process, except unsloth, whose import is tested in a real subprocess."""
    in_own_process = gpu.in_own_process
    monkeypatch.setattr(
        gpu, "in_own_process", lambda c: in_own_process(c) if c.trainer == "unsloth" else gpu_trainers.measure(c)
    )
    out = tmp_path / "results.json"
    arguments = ["--tiny", "--methods", "lora", "--trainers", "lora_ft,unsloth", "--steps", "1"]
    assert gpu.main([*arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["date"] and report["environment"]["versions"]["torch"] == torch.__version__
    auto, every_1, *unsloth = report["results"]
    assert [r["case"]["checkpoint"] for r in (auto, every_1, *unsloth)] == ["auto", "every_1", "every_1", "off"]
    for ours in (auto, every_1):
        assert ours["check"]["passed"] and ours["tokens_per_second"] > 0 and ours["share"] > 0
    assert {result["skipped"] for result in unsloth} == {"unsloth is not installed"}
    assert "tiny lora unsloth off skipped: unsloth is not installed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # warnings of PEFT in the plain loop
@pytest.mark.parametrize(
    ("trainer", "checkpoint", "rows"),
    [("lora_ft", "auto", "mixed"), ("peft", "every_1", "equal"), ("peft", "off", "mixed")],
)
def test_every_trainer_learns_in_nf4(trainer: str, checkpoint: str, rows: str) -> None:
    torch.manual_seed(0)
    result = gpu_trainers.measure(case(trainer, "qlora", checkpoint, rows))
    assert "failed" not in result, result["failed"]
    assert result["losses"][-1] < result["losses"][0]
    assert len(result["seconds"]) == gpu_trainers.WARM_UP + 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_peft_follows_the_gradient_checkpointing_setting(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recomputed = {}
    for checkpoint in ("every_1", "off"):
        one = case("peft", method, checkpoint)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_trainers, "padded_loop", lambda model, _: model)
            model = gpu_trainers.peft_run(one, {})
        recomputed[checkpoint] = {m.gradient_checkpointing for m in model.modules() if hasattr(m, "self_attn")}
    assert recomputed == {"every_1": {True}, "off": {False}}


def test_packed_and_padded_trainers_have_the_same_loss() -> None:
    one = case("peft", rows="mixed")
    batch, documents = gpu_trainers.draw(one)
    assert torch.equal(batch.ids, torch.cat(documents)) and len(batch.ids) == 200
    model = gpu_trainers.build(one, quantized=False)
    assert all(map(torch.equal, model.parameters(), gpu_trainers.build(one, quantized=False).parameters()))
    paths = accelerate(model, config.Fast()).paths
    packed = gpu_trainers.token_loss_sum(model, batch, paths) / int((batch.targets != -100).sum())
    model.set_attn_implementation("sdpa")
    padded, _ = gpu_trainers.padded_loop(model.requires_grad_(True), one)(1)
    assert padded[0] == pytest.approx(float(packed), rel=1e-5)


def test_unsloth_is_imported_before_the_libraries_that_it_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = {"transformers", "peft", "trl", "lora_ft"}
    lines = ["import sys", f"loaded = {patched} & sys.modules.keys()", "raise SystemExit(f'after {sorted(loaded)}')"]
    (tmp_path / "unsloth.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.in_own_process(case("unsloth")) == {"failed": "after []"}


def test_out_of_memory_is_reported_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB.\nMore arguments")

    monkeypatch.setitem(gpu_trainers.RUNS, "peft", run)
    assert gpu_trainers.measure(case("peft")) == {"skipped": "out of memory: Tried to allocate 9 GiB."}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fast_paths_pass_the_check_and_do_not_change_the_base(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.Case, "dtype", dtype)
    built = []
    monkeypatch.setattr(
        gpu_trainers, "build", lambda *args, of=gpu_trainers.build: built.append(of(*args)) or built[-1]
    )
    facts: dict[str, dict[str, object]] = {}
    gpu_trainers.lora_ft_run(case(method=method, rows="mixed"), facts)
    assert facts["check"]["passed"], facts["check"]
    before, after = (
        {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
        for model in (gpu_trainers.build(case(method=method), method == "qlora"), built[0])
    )
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert parameter.dtype == after[name].dtype and torch.equal(parameter, after[name]), name


def test_wrong_fast_path_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_trainers.accelerate

    def wrong(model: torch.nn.Module, fast: config.Fast, **options: bool) -> object:
        if fast.norm:
            model.model.norm.variance_epsilon = 1e-4
        return right(model, fast, **options)

    monkeypatch.setattr(gpu_trainers, "accelerate", wrong)
    result = gpu_trainers.measure(case())
    assert "differs" in result["failed"] and "tokens_per_second" not in result


def gradients(dtype: torch.dtype) -> tuple[gpu_trainers.Gradient, gpu_trainers.Gradient]:
    """Return a loss and gradients of a large and a small matrix, rounded to `dtype` and exact."""
    generator = torch.Generator().manual_seed(0)
    exact = {name: torch.randn(size, generator=generator) for name, size in (("large", (64, 64)), ("small", (4, 16)))}
    return (2.0, {name: of.to(dtype).float() for name, of in exact.items()}), (2.0, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", ["nothing", "loss", "zeroed", "noise", "length", "nan", "swapped sign"])
def test_gradient_check_detects_each_difference(changed: str, dtype: torch.dtype) -> None:
    plain, reference = gradients(dtype)
    loss, small = plain[0], plain[1]["small"]
    noise = torch.randn(small.shape, generator=torch.Generator().manual_seed(1))
    changed_small = {
        "zeroed": torch.zeros_like(small),
        "noise": small + 0.05 * noise * small.norm() / noise.norm(),
        "length": 1.05 * small,
        "nan": small.where(small != small[0, 0], torch.nan),
        "swapped sign": small.where(small != small.max(), -small),
    }.get(changed, small)
    result = (2.1 if changed == "loss" else loss, plain[1] | {"small": changed_small})
    check = gpu_trainers.compared(result, plain, reference, gpu_trainers.FLOOR[dtype])
    assert check["passed"] == (changed == "nothing")
    if changed != "nothing":
        assert check["at"] == ("loss" if changed == "loss" else "small")
    json.dumps(check, allow_nan=False)


def test_zero_gradients_fail_the_check() -> None:
    idle = (2.0, {"small": torch.zeros(4, 4)})
    assert not gpu_trainers.compared(idle, idle, idle, 1e-3)["passed"]
