"""A run's state between two steps: saved so that it is whole or not there, loaded so that training goes on exactly.

    run/checkpoints/step-00000200/
      state.safetensors    values [P], optimizer.0.exp_avg, ..., losses [steps], best_values [P] with train.keep=best
      state.json           the rest: evaluations, tokens, seconds, length of metrics.jsonl, inputs
      manifest.json        size and sha256 of both

A folder is a checkpoint if the manifest that its files give is, byte by byte, the one it holds. No generator is in it:
the order of rows and every draw of dropout are functions of seed and position (data/sampler.py), and the learning rate
is one of the step, so that the number of steps done says where all of them stand.

Older checkpoints go when the newest has been read back; the newest `train.keep_checkpoints` and the one with the lowest
eval loss stay. What a folder of unreadable files costs is the steps since the one before it.
"""

import contextlib
import hashlib
import json
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lora_ft import config, runs
from lora_ft.errors import CheckpointError, ResourceError
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.io import durable, untrusted
from lora_ft.training import optimizers
from lora_ft.training.state import Evaluation, TrainingState

log = logging.getLogger("lora_ft")

FOLDER, TENSORS, STATE, MANIFEST = runs.CHECKPOINTS, "state.safetensors", "state.json", "manifest.json"
_FORMAT = 3
_NAME = re.compile(r"step-\d{8,}")
_MOST_HEADER_BYTES = 10**6
_HEADERS_BYTES = 4096  # of the two smaller files and of the header of the tensors

# Checkpoints that this process has read and found whole, and how their files were then: to choose which may go, they
# need not be read again at every save. To resume from one, or to prove that one was written, it always is.
_Stamp = list[tuple[int, int, int]]
_read: dict[Path, _Stamp] = {}


def is_due(state: TrainingState) -> bool:
    """Whether the step just done is the last, or one after which `train.save_every_steps` asks for a checkpoint."""
    every = state.cfg.train.save_every_steps
    return state.is_done or (every is not None and state.step % every == 0)


def save(state: TrainingState) -> Path:
    """Write the state if it is not there yet, read it back, and only then remove older checkpoints.

    Raises CheckpointError if what is read back differs, durable.WriteError where the disk is full.
    """
    path = state.folder / FOLDER / f"step-{state.step:08d}"
    if _problem(path) is None:
        return path
    contents = {TENSORS: safetensors.torch.save(_tensors(state)), STATE: _json(_state(state))}
    # Hashed as they are in memory, so that what is read back is compared with what was meant.
    meant = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in contents.items()}
    contents[MANIFEST] = _manifest(state.step, meant)
    durable.write_files(path, contents)
    if problem := _problem(path):
        raise CheckpointError(f"{path} was written, but {problem}")
    log.debug("checkpoint after step %d", state.step)
    _let_go(path.parent, state.cfg.train.keep_checkpoints)
    return path


def resume(state: TrainingState) -> None:
    """Restore a new state from its run's newest valid checkpoint, or leave it at step 0 if there is none.

    The run's metrics are cut back to that place. Raises CheckpointError where no checkpoint is valid, or where the
    valid one belongs to other inputs.
    """
    durable.clear_leftovers(state.folder / FOLDER)
    found = newest(state.folder)
    if found is None:
        if (state.folder / runs.METRICS).exists():
            log.warning("no checkpoint found; starting at step 0")
        durable.cut(state.folder / runs.METRICS, 0)
        return
    saved = _read_state(found)
    _check_inputs(found, saved["inputs"], state.inputs)
    for difference in _differences(saved["environment"], _environment(state)):
        log.warning("resuming elsewhere than the run began, which may change bytes: %s", difference)
    untrusted.tensor_header(found / TENSORS, _MOST_HEADER_BYTES, CheckpointError)
    _fill(state, saved, safetensors.torch.load((found / TENSORS).read_bytes()))
    durable.cut(state.folder / runs.METRICS, saved["metrics_bytes"])
    for path in _all(found.parent):
        if path.name > found.name:  # named in the log as no checkpoint any more
            durable.remove_folder(path)
    _let_go(found.parent, state.cfg.train.keep_checkpoints)  # what the run did not come to
    log.info("resuming after step %d of %d", state.step, len(state.steps))


def newest(run: Path) -> Path | None:
    """The newest valid checkpoint of a run, None where it has none; those that are not valid are named in the log."""
    problems = []
    untrusted.check_place(run / FOLDER, run)
    for path in reversed(_all(run / FOLDER)):
        untrusted.check_place(path, run)
        problem = _problem(path) or _metrics_problem(path, run)
        if problem is None:
            return path
        problems.append(f"{path}: {problem}")
        log.warning("not a checkpoint any more: %s", problems[-1])
    if problems:
        problems.append(f"to begin again, remove {run / FOLDER} and {run / runs.METRICS}")
        raise CheckpointError("no checkpoint is valid:\n" + "\n".join(problems))
    return None


def bytes_needed(num_parameters: int, num_steps: int, cfg: config.TrainRun) -> int:
    """What a run's checkpoints and adapter will be at most at one time; in bytes.

    A new checkpoint stands beside those that stay until it has been read back: the newest, and the one of the lowest
    eval loss where that is measured on the way.
    """
    train, values = cfg.train, 4 * num_parameters
    state = optimizers.state_bytes(num_parameters, cfg.optim.name)
    best = values if train.keep is config.Keep.best else 0
    checkpoint = values + state + best + 8 * num_steps + _HEADERS_BYTES
    written = 1 if train.save_every_steps is None else num_steps // train.save_every_steps + 1
    stay = train.keep_checkpoints + (train.eval_every_steps is not None)
    return max(min(written, stay + 1) * checkpoint, min(written, stay) * checkpoint + values)


def check_free_space(folder: Path, num_bytes: int) -> None:
    """ResourceError where a run's folder has no room for `num_bytes`; what its checkpoints take is room, too."""
    free = durable.free_bytes(folder)
    there = sum(path.stat().st_size for path in (folder / FOLDER).glob("*/*"))
    if num_bytes > free + there:
        raise ResourceError(
            f"{folder}: adapter and checkpoints need {num_bytes:,} bytes, {free + there:,} are free: make room, or "
            "lower train.keep_checkpoints"
        )


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {"values": state.flat.values, "losses": torch.tensor(state.losses, dtype=torch.float64)}
    if state.best_values is not None:
        tensors["best_values"] = state.best_values
    tensors |= {f"optimizer.{key}": value for key, value in optimizers.state(state.optimizer).items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _state(state: TrainingState) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "evaluations": [asdict(evaluation) for evaluation in state.evaluations],
        "eval_loss": _eval_loss(state),
        "stopped_by": state.stopped_by,
        "metrics_bytes": durable.settle(state.folder / runs.METRICS),
        "inputs": state.inputs,
        "environment": _environment(state),
    }


def _eval_loss(state: TrainingState) -> float | None:
    """The loss of the state as it is now, where the step just done was evaluated."""
    last = state.evaluations[-1] if state.evaluations else None
    return last.result.loss if last and last.step == state.step else None


def _environment(state: TrainingState) -> dict[str, Any]:
    return {"device": str(state.base.device), "threads": torch.get_num_threads(), **runs.versions()}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = sorted(before.keys() | now.keys())
    return [f"{n} was {before.get(n)}, is {now.get(n)}" for n in names if before.get(n) != now.get(n)]


def _check_inputs(path: Path, recorded: dict[str, str], inputs: dict[str, str]) -> None:
    if problems := _differences(recorded, inputs):
        raise CheckpointError(f"{path} belongs to other inputs than these: " + "; ".join(problems))


def _fill(state: TrainingState, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    state.flat.values.copy_(tensors["values"])
    optimizers.restore(
        state.optimizer, {k.removeprefix("optimizer."): t for k, t in tensors.items() if k.startswith("optimizer.")}
    )
    state.losses[:] = tensors["losses"].tolist()
    state.evaluations[:] = [Evaluation(e["step"], EvalLoss(**e["result"])) for e in saved["evaluations"]]
    if "best_values" in tensors:
        state.best_values = tensors["best_values"].to(state.flat.values.device)
    state.tokens, state.seconds = saved["tokens"], saved["seconds"]
    state.stopped_by = saved["stopped_by"]


def _all(folder: Path) -> list[Path]:
    """What stands under the name of a checkpoint, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _let_go(folder: Path, keep: int) -> None:
    valid = [path for path in _all(folder) if not _problem_now(path)]
    losses = {path: _read_state(path)["eval_loss"] for path in valid}
    best = min((path for path in valid if losses[path] is not None), key=lambda path: losses[path], default=None)
    for path in _all(folder):
        if path not in valid[-keep:] and path != best:
            durable.remove_folder(path)
            _read.pop(path, None)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def _described(path: Path) -> dict[str, Any]:
    """Size and hash of a plain file; OSError for anything else."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path.name} is no plain file")
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_state(path: Path) -> dict[str, Any]:
    state = untrusted.json_object(path / STATE, CheckpointError)
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"{path / STATE} must be of format {_FORMAT}, got {state.get('format')}")
    return state


def _manifest(step: int, files: dict[str, dict[str, Any]]) -> bytes:
    return _json({"format": _FORMAT, "step": step, "files": dict(sorted(files.items()))})


def _problem(path: Path) -> str | None:
    """What keeps a folder from being a checkpoint, None where nothing does; all of it is read."""
    try:
        stamp = _stamp(path)
        found = {name: _described(path / name) for name in (TENSORS, STATE)}
        recorded = (path / MANIFEST).read_bytes()
    except OSError as error:
        return str(error)
    if recorded == _manifest(int(path.name.removeprefix("step-")), found):
        _read[path] = stamp
        return None
    return f"its files do not have the sizes and hashes that {MANIFEST} names"


def _problem_now(path: Path) -> str | None:
    """As `_problem`, but files that this process has found whole, and that are as they were, are not read again."""
    with contextlib.suppress(OSError):
        if path in _read and _read[path] == _stamp(path):
            return None
    return _problem(path)


def _stamp(path: Path) -> _Stamp:
    """What changes when one of a checkpoint's files is written or replaced."""
    found = [(path / name).lstat() for name in (TENSORS, STATE, MANIFEST)]
    return [(file.st_ino, file.st_size, file.st_mtime_ns) for file in found]


def _metrics_problem(path: Path, run: Path) -> str | None:
    written = _read_state(path)["metrics_bytes"]
    metrics = run / runs.METRICS
    found = metrics.stat().st_size if metrics.exists() else 0
    if found >= written:
        return None
    return f"{runs.METRICS} was {written:,} bytes long when it was written, and has {found:,}"
