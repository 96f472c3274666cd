"""benchmarks/gpu.py runs to its end without a GPU, checks what it times, and counts operations as torch does."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_dated_results_and_says_what_it_skips(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    words = ["--tiny", "--methods", "lora", "--trainers", "lora_ft,unsloth", "--tokens", "96", "--steps", "1"]
    assert gpu.main([*words, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["date"] and report["environment"]["versions"]["torch"] == torch.__version__
    ours, unsloth = report["results"]
    assert ours["check"]["passed"] and ours["tokens_per_second"] > 0 and ours["share"] > 0
    assert unsloth["skipped"] == "unsloth is not installed"
    assert "unsloth is not installed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of the plain loop
@pytest.mark.parametrize("trainer", ["lora_ft", "peft"])
@pytest.mark.parametrize("rows", ["equal", "mixed"])
def test_every_trainer_learns_in_nf4(gpu: ModuleType, trainer: str, rows: str) -> None:
    torch.manual_seed(0)
    result = gpu.measure(gpu.Case("tiny", "qlora", trainer, rows, tokens=200, steps=3))
    assert "failed" not in result, result["failed"]
    assert result["losses"][-1] < result["losses"][0]
    assert len(result["seconds"]) == gpu.WARM_UP + 3


def test_trainers_are_given_the_same_model_and_see_the_same_loss(gpu: ModuleType) -> None:
    case = gpu.Case("tiny", "lora", "peft", "mixed", tokens=300, steps=1)
    batch, documents = gpu.draw(case)
    assert torch.equal(batch.ids, torch.cat(documents)) and len(batch.ids) == 300
    model = gpu.build(case, quantized=False)
    assert all(map(torch.equal, model.parameters(), gpu.build(case, quantized=False).parameters()))
    paths = gpu.choose_paths(model, gpu.config.Fast())
    packed = gpu.token_loss_sum(model, batch, paths) / int((batch.targets != -100).sum())
    model.set_attn_implementation("sdpa")
    padded, _ = gpu.padded_loop(model.requires_grad_(True), case)(1)
    assert padded[0] == pytest.approx(float(packed), rel=1e-5)


def test_a_wrong_fast_path_is_not_timed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "compared", lambda *_: {"passed": False})
    result = gpu.measure(gpu.Case("tiny", "lora", "lora_ft", "equal", tokens=64, steps=1))
    assert "differs" in result["failed"] and "tokens_per_second" not in result


@pytest.mark.parametrize("changed", ["loss", "direction", "length", "nan"])
def test_the_check_notices_each_difference(gpu: ModuleType, changed: str) -> None:
    plain = (2.0, torch.tensor([1.0, 2.0]))
    assert gpu.compared(plain, plain, torch.float32)["passed"]
    found = {
        "loss": (2.1, plain[1]),
        "direction": (2.0, torch.tensor([2.0, 1.0])),
        "length": (2.0, 1.1 * plain[1]),
        "nan": (2.0, torch.tensor([float("nan"), 2.0])),
    }[changed]
    assert not gpu.compared(plain, found, torch.float32)["passed"]


def test_operations_are_those_that_torch_counts(gpu: ModuleType) -> None:
    """Plain paths over one document: torch counts dense attention and no checkpointing; the rest must agree."""
    case = gpu.Case("tiny", "lora", "lora_ft", "equal", tokens=64, steps=1)
    model = gpu.build(case, quantized=False)
    peft_model = gpu.attach.attach(model, gpu.config.Adapter(r=gpu.RANK), "adapter0", 0, [])
    model.set_attn_implementation("eager")
    batch, _ = gpu.draw(case)
    with FlopCounterMode(display=False) as counter:
        peft_model(input_ids=batch.ids[None], labels=batch.ids[None]).loss.backward()
    shape = gpu.SHAPES["tiny"]
    # Six products in eager attention's forward and backward, not seven: nothing is computed again; and no mask halves.
    square = 2 * 64 * shape["hidden_size"] * shape["num_hidden_layers"]
    counted = counter.get_total_flops() / 64 - 6 * square + 7 * square / 2
    assert gpu.flops_per_token(case) == pytest.approx(counted, rel=1e-9)
