"""Checkpoints: the state of a run between two steps, written atomically and restored exactly.

    run/checkpoints/step-00000200/
      state.safetensors    values [P], optimizer.0.exp_avg, ..., losses [steps], best_values [P] with train.keep=best
      state.json           the rest: evaluations, tokens, seconds, length of metrics.jsonl, inputs, loss scale
      manifest.json        size and sha256 of both

A folder is a valid checkpoint if the manifest computed from its files equals the stored one, byte by byte. Random
states are not stored: the order of rows and every dropout mask are functions of seed and step (data/sampler.py), and
the learning rate is a function of the step.

Older checkpoints are removed after the new one has been read back; the newest `train.keep_checkpoints` and the one with
the best evaluation (train.best_metric) are kept. If a checkpoint is damaged, the one before it is used.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ft import config, runs
from lora_ft.data.streamed import Position
from lora_ft.errors import CheckpointError, ResourceError
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.io import durable, untrusted
from lora_ft.io.hashing import sha256
from lora_ft.models import tensor_files
from lora_ft.models.device import describe
from lora_ft.training import optimizers
from lora_ft.training.loss_scale import LossScale
from lora_ft.training.state import Evaluation, TrainingState

log = logging.getLogger("lora_ft")

FOLDER, TENSORS, STATE, MANIFEST = runs.CHECKPOINTS, "state.safetensors", "state.json", "manifest.json"
_FORMAT = 5
_NAME = re.compile(r"step-\d{8,}")
_MOST_HEADER_BYTES = 10**6
_HEADERS_BYTES = 4096  # of the two smaller files and of the header of the tensors

# Checkpoints that this process has verified, with the stamp of their files: choosing which to remove need not read them
# again at every save. Resuming from one and verifying a new one always do.
_Stamp = list[tuple[int, int, int]]
_read: dict[Path, _Stamp] = {}


def is_due(state: TrainingState) -> bool:
    """Return True after the last step, and after every `train.save_every_steps` steps."""
    every = state.cfg.train.save_every_steps
    return state.is_done or (every is not None and state.step % every == 0)


def save(state: TrainingState) -> Path:
    """Write the state unless it is saved already, verify it, then remove older checkpoints; return its folder.

    The main rank writes. Raises CheckpointError if the files read back differ, durable.WriteError if the disk is full.
    """
    path = state.folder / FOLDER / f"step-{state.step:08d}"
    if not state.ranks.is_main or _problem(path) is None:
        return path
    intended: dict[str, dict[str, Any]] = {}
    durable.write_files(path, {
        TENSORS: _described_while_read(tensor_files.chunks(_tensors(state)), TENSORS, intended),
        STATE: _described_while_read([_json(_state(state))], STATE, intended),
        MANIFEST: _manifest_of_written(state.step, intended),
    })  # fmt: skip
    if problem := _problem(path):
        raise CheckpointError(f"{path} was written, but {problem}")
    log.debug("checkpoint after step %d", state.step)
    _remove_old(path.parent, state.cfg.train.keep_checkpoints)
    return path


def resume(state: TrainingState) -> None:
    """Restore a new state from its run's newest valid checkpoint, or leave it at step 0 if there is none.

    metrics.jsonl is cut to its length at the checkpoint. Every rank reads the checkpoint that the main one has chosen.
    Raises CheckpointError if there are checkpoints and none is valid, or if the newest valid one has other settings,
    data, base or adapter shapes.
    """
    name = state.ranks.on_main(_chosen, state.folder)
    if name is None:
        return
    found = state.folder / FOLDER / name
    saved = _read_state(found)
    _check_inputs(found, saved["inputs"], state.inputs)
    _fill(state, saved, found / TENSORS)
    if state.ranks.is_main:
        for difference in _differences({"ranks": 1} | saved["environment"], _environment(state)):
            log.warning("resuming in another environment, so the result may differ in its last bits: %s", difference)
        durable.cut(state.folder / runs.METRICS, saved["metrics_bytes"])
        for path in _all(found.parent):
            if path.name > found.name:  # damaged; the log names it
                durable.remove_folder(path)
        _remove_old(found.parent, state.cfg.train.keep_checkpoints)
    log.info("resuming after step %d of %d", state.step, len(state.steps))


def _chosen(run: Path) -> str | None:
    """Return the name of the newest valid checkpoint; without one, cut metrics.jsonl to the length of step 0."""
    durable.clear_leftovers(run / FOLDER)
    if found := newest(run):
        return found.name
    if (run / runs.METRICS).exists():
        log.warning("no checkpoint found; starting at step 0")
    durable.cut(run / runs.METRICS, 0)
    return None


def newest(run: Path) -> Path | None:
    """Return the newest valid checkpoint of a run, or None if it has no checkpoints; log those that are damaged.

    Raises CheckpointError if there are checkpoints and none is valid.
    """
    problems = []
    untrusted.check_place(run / FOLDER, run)
    for path in reversed(_all(run / FOLDER)):
        untrusted.check_place(path, run)
        problem = _problem(path) or _metrics_problem(path, run)
        if problem is None:
            return path
        problems.append(f"{path}: {problem}")
        log.warning("damaged checkpoint: %s", problems[-1])
    if problems:
        problems.append(f"to start over, remove {run / FOLDER} and {run / runs.METRICS}")
        raise CheckpointError("no checkpoint is valid:\n" + "\n".join(problems))
    return None


def bytes_needed(num_parameters: int, num_steps: int, cfg: config.TrainRun) -> int:
    """Return the peak disk space of a run's checkpoints and adapter, in bytes.

    A new checkpoint exists beside the kept ones until it is verified.
    """
    train, values = cfg.train, 4 * num_parameters
    state = optimizers.state_bytes(num_parameters, cfg.optim.name)
    best = values if train.keep is config.Keep.best else 0
    checkpoint = values + state + best + 8 * num_steps + _HEADERS_BYTES
    written = 1 if train.save_every_steps is None else num_steps // train.save_every_steps + 1
    kept = train.keep_checkpoints + (train.eval_every_steps is not None)
    return max(min(written, kept + 1) * checkpoint, min(written, kept) * checkpoint + values)


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise ResourceError if the disk has no room for `num_bytes`; existing checkpoints of the run count as room."""
    free = durable.free_bytes(folder)
    reusable = sum(path.stat().st_size for path in (folder / FOLDER).glob("*/*"))
    if num_bytes > free + reusable:
        raise ResourceError(
            f"{folder}: adapter and checkpoints need {num_bytes:,} bytes, {free + reusable:,} are free: make room "
            "or lower train.keep_checkpoints"
        )


def _described_while_read(
    chunks: Iterable[durable.Buffer], name: str, described: dict[str, dict[str, Any]]
) -> Iterator[durable.Buffer]:
    """Yield the contents of a file, then add its size and sha256 to `described`.

    So the files read back are compared with the intended bytes, of which memory holds only a part.
    """
    size, found = 0, hashlib.sha256()
    for chunk in chunks:
        size += memoryview(chunk).nbytes
        found.update(chunk)
        yield chunk
    described[name] = {"bytes": size, "sha256": found.hexdigest()}


def _manifest_of_written(step: int, described: dict[str, dict[str, Any]]) -> Iterator[durable.Buffer]:
    """Yield the manifest; it is made when the files before it are written."""
    yield _manifest(step, described)


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {"values": state.flat.values, "losses": torch.tensor(state.losses, dtype=torch.float64)}
    if state.best_values is not None:
        tensors["best_values"] = state.best_values
    return tensors | {f"optimizer.{key}": value for key, value in optimizers.state(state.optimizer).items()}


def _state(state: TrainingState) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "evaluations": [asdict(evaluation) for evaluation in state.evaluations],
        "eval_loss": _evaluated(state, lambda last: last.result.loss),
        "cost": _evaluated(state, lambda last: last.cost(state.cfg.train.best_metric)),
        "stopped_by": state.stopped_by,
        "tokens_per_microbatch": state.tokens_per_microbatch,
        "shrinks": state.shrinks,
        "loss_scale": asdict(state.loss_scale) if state.loss_scale else None,
        **({"stream": asdict(state.stream.position_of(state.step))} if state.stream else {}),
        "metrics_bytes": durable.settle(state.folder / runs.METRICS),
        "inputs": state.inputs,
        "environment": _environment(state),
    }


def _evaluated(state: TrainingState, number: Callable[[Evaluation], float]) -> float | None:
    """Return a number of the current state's evaluation, or None if the last step was not evaluated."""
    last = state.evaluations[-1] if state.evaluations else None
    return number(last) if last and last.step == state.step else None


def _environment(state: TrainingState) -> dict[str, Any]:
    cpu = torch.backends.cpu.get_cpu_capability()  # kernels for AVX2 and AVX-512 round differently
    threads, ranks = torch.get_num_threads(), state.ranks.world_size
    return {**describe(state.base.device), "cpu": cpu, "threads": threads, "ranks": ranks, **runs.versions()}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = sorted(before.keys() | now.keys())
    return [f"{n} was {before.get(n)}, is {now.get(n)}" for n in names if before.get(n) != now.get(n)]


def _check_inputs(path: Path, recorded: dict[str, str], inputs: dict[str, str]) -> None:
    if problems := _differences(recorded, inputs):
        raise CheckpointError(f"{path} does not belong to this run: " + "; ".join(problems))


def _fill(state: TrainingState, saved: dict[str, Any], path: Path) -> None:
    for name, tensor in tensor_files.read(path, _MOST_HEADER_BYTES, CheckpointError):
        if name == "values":
            state.flat.values.copy_(tensor)
        elif name == "losses":
            state.losses[:] = tensor.tolist()
        elif name == "best_values":
            state.best_values = tensor
        else:
            optimizers.restore(state.optimizer, name.removeprefix("optimizer."), tensor)
    state.evaluations[:] = [Evaluation(e["step"], EvalLoss.from_plain(e["result"])) for e in saved["evaluations"]]
    state.tokens, state.seconds = saved["tokens"], saved["seconds"]
    state.stopped_by = saved["stopped_by"]
    # A run of an earlier version has neither; its micro-batches are those of its settings. A run of one process may
    # have one for a whole step, which several ranks share unless its masks of dropout would change.
    tokens = saved.get("tokens_per_microbatch", state.tokens_per_microbatch)
    if tokens is not None or state.cfg.adapter.lora_dropout or state.ranks.world_size == 1:
        state.tokens_per_microbatch = tokens
    state.shrinks = saved.get("shrinks", 0)
    state.loss_scale = LossScale(**saved["loss_scale"]) if saved["loss_scale"] else None
    if state.stream:
        state.stream.seek(Position(**saved["stream"]), state.step)


def _all(folder: Path) -> list[Path]:
    """Return everything named like a checkpoint, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _remove_old(folder: Path, keep: int) -> None:
    valid = [path for path in _all(folder) if not _problem_now(path)]
    states = {path: _read_state(path) for path in valid}
    costs = {path: saved.get("cost", saved["eval_loss"]) for path, saved in states.items()}  # earlier: ranked by loss
    best = min((path for path in valid if costs[path] is not None), key=lambda path: costs[path], default=None)
    for path in _all(folder):
        if path not in valid[-keep:] and path != best:
            durable.remove_folder(path)
            _read.pop(path, None)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"


def _described(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a regular file; raises OSError for anything else."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path.name} is not a regular file")
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _read_state(path: Path) -> dict[str, Any]:
    return untrusted.json_object(path / STATE, CheckpointError)


def _manifest(step: int, files: dict[str, dict[str, Any]]) -> bytes:
    return _json({"format": _FORMAT, "step": step, "files": dict(sorted(files.items()))})


def _problem(path: Path) -> str | None:
    """Return why a folder is not a valid checkpoint, or None if it is; reads all of its files."""
    try:
        stamp = _stamp(path)
        found = {name: _described(path / name) for name in (TENSORS, STATE)}
        recorded = (path / MANIFEST).read_bytes()
    except OSError as error:
        return str(error)
    if recorded == _manifest(int(path.name.removeprefix("step-")), found):
        _read[path] = stamp
        return None
    if (written := re.match(rb'\{\s*"format": (\d+),', recorded)) and int(written[1]) != _FORMAT:
        return f"it has format {int(written[1])}; this version of lora_ft reads {_FORMAT}"
    return f"the sizes and hashes of its files differ from {MANIFEST}"


def _problem_now(path: Path) -> str | None:
    """As `_problem`, but skip files that this process has verified and that have not changed since."""
    with contextlib.suppress(OSError):
        if path in _read and _read[path] == _stamp(path):
            return None
    return _problem(path)


def _stamp(path: Path) -> _Stamp:
    """Return inode, size and time of each file, which change when it is written or replaced."""
    found = [(path / name).lstat() for name in (TENSORS, STATE, MANIFEST)]
    return [(file.st_ino, file.st_size, file.st_mtime_ns) for file in found]


def _metrics_problem(path: Path, run: Path) -> str | None:
    written = _read_state(path)["metrics_bytes"]
    metrics = run / runs.METRICS
    found = metrics.stat().st_size if metrics.exists() else 0
    if found >= written:
        return None
    return f"{runs.METRICS} had {written:,} bytes at this checkpoint and has {found:,} now"
