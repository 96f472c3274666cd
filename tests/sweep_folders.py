"""Make sweep folders in any state, without training.

folder = sweep_folder(tmp_path, ["adapter.r=4,8"])
job(folder, 0, ["adapter.r=4"], {"adapter.r": 4}, loss=2.4)          # finished
job(folder, 1, ["adapter.r=8"], {"adapter.r": 8}, failure=("NonFiniteError", 8, "loss is nan"), steps=3)
"""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from lora_ft import config, validation

BASE_LOSS = 3.25


def sweep_folder(tmp_path: Path, overrides: list[str], name: str = "sweep", config_dir: str | None = None) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"overrides": overrides, "config_dir": config_dir}))
    return folder


def job(
    sweep: Path,
    name: int | str,
    overrides: list[str],
    settings: dict[str, Any] | None = None,
    *,
    loss: float | None = None,
    failure: tuple[str, int, str] | None = None,
    steps: int = 0,
    result: dict[str, Any] | None = None,
    adapter_bytes: int = 1000,
    base_loss: float | None = BASE_LOSS,
) -> Path:
    """Make a job: finished with a `loss` or a `result`, failed with a `failure`, else begun if it has `steps`."""
    folder = sweep / str(name)
    folder.mkdir(parents=True)
    (folder / "overrides.txt").write_text("".join(f"{override}\n" for override in overrides))
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(_config(settings), sort_keys=False))
    if loss is not None or result is not None:
        outcome = _result(math.nan if loss is None else loss, steps or 20, base_loss) | (result or {})
        (folder / "result.json").write_text(json.dumps(outcome))
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(adapter_bytes))
        steps = steps or 20
    if steps:
        end = loss if loss is not None and math.isfinite(loss) else 2.5
        metrics(folder, steps, base_loss or 3.0, end)
        (folder / "check.json").write_text(json.dumps({"steps": {"count": 40}}))
    if failure:
        kind, code, message = failure
        (folder / "failure.json").write_text(json.dumps({"kind": kind, "exit_code": code, "message": message}))
        (folder / "log.txt").write_text("10:00:00 it went wrong\n")
    return folder


def metrics(folder: Path, steps: int, begin: float, end: float, evaluations: int = 4) -> None:
    """Write a noisy curve that falls from `begin` to `end`, with `evaluations` eval losses."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": begin}]
    every = max(1, steps // evaluations)
    for step in range(1, steps + 1):
        smooth = end + (begin - end) * math.exp(-4 * step / steps)
        loss = smooth + 0.5 * (math.sin(step * 12.9898) * 43758.5453 % 1 - 0.5)
        line = {"step": step, "loss": loss, "grad_norm": 0.84, "lr": 2e-4, "rows": 20, "tokens": 1011,
                "supervised_tokens": 402, "micro_batches": 1, "seconds": 4.818006749000233,
                "tokens_per_second": 206.9320472012381}  # fmt: skip
        lines.append(line | ({"eval_loss": smooth} if step % every == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    plain = validation.to_plain(config.TrainRun())
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        (plain[group] if group else plain)[name] = value
    return plain


def _result(loss: float, steps: int, base_loss: float | None) -> dict[str, Any]:
    return {
        "eval_loss": loss,
        "base_eval_loss": base_loss,
        "eval_tokens": 859,
        "best_step": steps,
        "best_eval_loss": loss,
        "steps": steps,
        "stopped_early": False,
        "stopped_by": None,
        "tokens": 1000 * steps,
        "tokens_per_second": 259.5,
        "train_seconds": 151.5,
        "trainable_parameters": 4884480,
        "peak_memory_bytes": 3808690176,
        "adapter_sha256": "0" * 64,
    }
