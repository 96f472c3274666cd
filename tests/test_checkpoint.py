"""Checkpoints: damage is detected, an older one is used instead, resume is exact, and rotation keeps the best."""

import contextlib
import random
import shutil
import signal
import tempfile
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults.shim import Fault, Shim
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file
from states import SETTINGS, Observer, some_rows, state_on
from tiny import tiny_model, tiny_tokenizer

from lora_ft import config, runs
from lora_ft.adapters import files, provenance
from lora_ft.errors import CheckpointError, Interrupted, MismatchError, ResourceError
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.io import durable
from lora_ft.models import tensor_files
from lora_ft.models.load import Identity
from lora_ft.training import checkpoint, optimizers
from lora_ft.training.signals import Stop
from lora_ft.training.state import NAME, Evaluation, TrainingState
from lora_ft.training.trainer import fit

SMALL = config.Adapter(r=1, target_modules=["q_proj"])
SOURCE = provenance.Provenance(Identity("tiny", "tiny", None, None, "c", None), config.Quant(), "d")
FILES = (checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST)


def state_in(run: Path, **settings: object) -> TrainingState:
    """Return a new state with eval rows for six steps, with a checkpoint every two steps and no rotation."""
    run.mkdir(exist_ok=True)
    train = {
        "max_steps": 6,
        "tokens_per_step": 60,
        "save_every_steps": 2,
        "keep_checkpoints": 9,
        "gradient_checkpointing": "off",
    }
    chosen = {"train": config.Train(**train | settings.pop("train", {}))} | settings
    return state_on(tiny_model("llama"), run, eval_examples=some_rows(4, seed=9), **chosen)


def fitted(state: TrainingState) -> TrainingState:
    fit(state)
    return state


def step_of(path: Path | None) -> int:
    return int(path.name.removeprefix("step-")) if path else 0


def steps_in(run: Path) -> list[int]:
    return sorted(map(step_of, (run / checkpoint.FOLDER).glob("step-*")))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of six steps with different seeds and checkpoints of 100 kB after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        fitted(state_in(folder / str(seed), seed=seed))
    return folder / "0", folder / "1"


@pytest.fixture
def run(two_runs: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(two_runs[0], tmp_path / "run")
    return tmp_path / "run"


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def flipped(data: bytes, chance: random.Random) -> bytes:
    index = chance.randrange(len(data))
    return data[:index] + bytes([data[index] ^ chance.randrange(1, 256)]) + data[index + 1 :]


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def zeroed(data: bytes, chance: random.Random) -> bytes:
    """Overwrite one page with zeros, as a file system may after a power failure."""
    pages = [start for start in range(0, len(data), 4096) if any(data[start : start + 4096])]
    start = chance.choice(pages)
    return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]


@pytest.mark.closes("C01")
@pytest.mark.parametrize(("damaged", "times"), [(flipped, 150), (truncated, 60), (zeroed, 30)])
def test_damaged_file_is_detected_and_the_previous_checkpoint_is_used(
    damaged, times: int, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, chance = run / checkpoint.FOLDER / "step-00000006", random.Random(0)
    whole = {name: (newest / name).read_bytes() for name in FILES}
    for number in range(times):
        name = FILES[number % 3]
        caplog.clear()
        (newest / name).write_bytes(damaged(whole[name], chance))
        assert step_of(checkpoint.newest(run)) == 4, (number, name)
        assert str(newest) in caplog.text
        (newest / name).write_bytes(whole[name])
    caplog.clear()
    assert step_of(checkpoint.newest(run)) == 6
    assert not caplog.records


@pytest.mark.closes("C01")
def test_file_of_another_checkpoint_is_detected(two_runs: tuple[Path, Path], run: Path) -> None:
    """Files are swapped between steps, runs and file names; then a whole checkpoint gets another name."""
    newest = run / checkpoint.FOLDER / "step-00000006"
    others = [path for other in two_runs for path in (other / checkpoint.FOLDER).glob("step-*/*")]
    whole = {name: (newest / name).read_bytes() for name in FILES}
    swapped = [(n, o) for n in FILES for o in others if o.read_bytes() != whole[n]]
    assert len(swapped) >= 50
    for name, other in swapped:
        (newest / name).write_bytes(other.read_bytes())
        assert step_of(checkpoint.newest(run)) == 4, (name, other)
        (newest / name).write_bytes(whole[name])
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name("step-00000002"), newest)
    assert step_of(checkpoint.newest(run)) == 4


@pytest.mark.parametrize("damage", ["missing", "link", "file", "empty"])
def test_folder_without_all_three_files_is_not_a_checkpoint(damage: str, run: Path) -> None:
    newest = run / checkpoint.FOLDER / "step-00000006"
    state = newest / checkpoint.STATE
    match damage:
        case "missing":
            state.unlink()
        case "link":
            state.rename(run / "elsewhere")
            state.symlink_to(run / "elsewhere")
        case "file":
            shutil.rmtree(newest)
            newest.write_text("")
        case "empty":
            shutil.rmtree(newest)
            newest.mkdir()
    assert step_of(checkpoint.newest(run)) == 4


def test_hidden_files_in_a_checkpoint_are_ignored(run: Path) -> None:
    newest = run / checkpoint.FOLDER / "step-00000006"
    (newest / ".DS_Store").write_text("")
    (newest / ".ipynb_checkpoints").mkdir()
    assert step_of(checkpoint.newest(run)) == 6


def test_checkpoint_is_invalid_if_metrics_are_truncated(run: Path) -> None:
    metrics = run / runs.METRICS
    metrics.write_bytes(metrics.read_bytes()[:-1])
    assert step_of(checkpoint.newest(run)) == 4
    metrics.unlink()
    with pytest.raises(
        CheckpointError, match=r"step-00000002: metrics\.jsonl had [\d,]+ bytes at this checkpoint and has 0"
    ):
        checkpoint.newest(run)


@pytest.mark.closes("C05")
def test_resume_fails_if_no_checkpoint_is_valid(run: Path) -> None:
    for path in (run / checkpoint.FOLDER).iterdir():
        (path / checkpoint.TENSORS).write_bytes(b"")
    state, before = state_in(run), (run / runs.METRICS).read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint is valid") as caught:
        checkpoint.resume(state)
    assert caught.value.exit_code == 6
    assert all(f"step-0000000{step}: the sizes and hashes of" in str(caught.value) for step in (2, 4, 6))
    assert state.step == 0
    assert (run / runs.METRICS).read_bytes() == before


# --- exact resume -----------------------------------------------------------------------------------------------------


def test_checkpoints_of_another_format_are_named_as_such(run: Path) -> None:
    """The files of another version are not damaged."""
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes().replace(b'"format": 5', b'"format": 4'))
    with pytest.raises(CheckpointError, match="it has format 4; this version of lora_ft reads 5"):
        checkpoint.resume(state_in(run))


@pytest.mark.closes("C01", "C05")
def test_resume_skips_a_damaged_checkpoint_and_repeats_its_steps_exactly(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, metrics = (run / runs.METRICS).read_text(), runs.read_metrics(run)
    values = load_file(run / "checkpoints" / "step-00000006" / checkpoint.TENSORS)
    (run / "checkpoints" / "step-00000006" / checkpoint.STATE).write_bytes(b"{}")
    state = state_in(run)
    checkpoint.resume(state)
    assert "step-00000006: the sizes and hashes of its files differ" in caplog.text
    assert (state.step, steps_in(run)) == (4, [2, 4])
    assert expected.startswith((run / runs.METRICS).read_text())
    fitted(state)
    assert torch.equal(state.flat.values, values["values"])
    assert [(m["step"], m.get("loss")) for m in runs.read_metrics(run)] == [(m["step"], m.get("loss")) for m in metrics]


def test_resuming_on_another_cpu_warns(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kernels for other instruction sets round differently."""
    state = state_in(run)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    checkpoint.resume(state)
    assert "resuming in another environment" in caplog.text and "is OTHER" in caplog.text


def test_moved_run_folder_can_be_resumed(run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "elsewhere")
    state = state_in(tmp_path / "elsewhere")
    checkpoint.resume(state)
    assert state.step == 6


@pytest.mark.closes("C06")
@pytest.mark.parametrize(
    "change", [{"seed": 3}, {"adapter": config.Adapter(r=2, lora_alpha=8)}, {"examples": some_rows(11)}]
)
def test_checkpoint_of_another_seed_adapter_or_data_is_refused(change: dict, run: Path) -> None:
    state = state_in(run, **change)
    before = state.flat.values.clone()
    if "examples" in change:
        state.inputs["data"] = "another"  # datasets of these tests have a constant hash
    with pytest.raises(CheckpointError, match=r"does not belong to this run: .* was .*, is "):
        checkpoint.resume(state)
    assert torch.equal(state.flat.values, before)


@pytest.mark.closes("B07")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", list(config.Optimizer))
def test_resume_restores_optimizer_state_exactly(name: config.Optimizer, tmp_path: Path) -> None:
    """Groups of matrices have the 4,096 numbers that 8-bit states need; the DoRA magnitudes are fewer and stay fp32."""
    optim = replace(SETTINGS["optim"], name=name, lora_plus_ratio=2.0)
    settings = {"adapter": config.Adapter(r=16, use_dora=True, lora_dropout=0.1), "optim": optim}
    expected = fitted(state_in(tmp_path / "one", train={"keep": config.Keep.best}, **settings))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / f"step-0000000{step}")
    state = state_in(tmp_path / "two", train={"keep": config.Keep.best}, **settings)
    checkpoint.resume(state)
    in_8_bits = {n for n, t in optimizers.state(state.optimizer).items() if t.dtype == torch.uint8}
    assert in_8_bits == ({f"{g}.state{n}" for g in (0, 1) for n in (1, 2)} if "8bit" in name.value else set())
    saved = load_file(tmp_path / "one/checkpoints/step-00000002" / checkpoint.TENSORS)
    for key, tensor in optimizers.state(state.optimizer).items():
        assert saved[f"optimizer.{key}"].dtype == tensor.dtype
        assert torch.equal(saved[f"optimizer.{key}"], tensor.cpu()), key
    fitted(state)
    assert torch.equal(state.flat.values, expected.flat.values)
    assert torch.equal(state.best_values, expected.best_values)
    assert (state.losses, state.evaluations) == (expected.losses, expected.evaluations)
    for key, tensor in optimizers.state(expected.optimizer).items():
        assert torch.equal(tensor, optimizers.state(state.optimizer)[key]), key


# --- rotation ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainingState:
    """A state whose checkpoints take milliseconds; `set_step` sets its step."""
    return state_in(tmp_path_factory.mktemp("small"), adapter=SMALL, train={"max_steps": 50})


def set_step(state: TrainingState, step: int, loss: float | None) -> None:
    """Set the number of steps done, and the eval loss of the last one if given."""
    state.losses[:] = [1.0] * step
    if loss is not None:
        state.evaluations.append(Evaluation(step, EvalLoss(loss, 10, 2)))


SAVES = st.lists(
    st.tuples(
        st.sampled_from([None, None, 1.0, 2.0, 3.0]),  # the eval loss after the step
        st.sampled_from([None, None, "broken", "full"]),  # the disk error while saving,
        st.integers(1, 40),  # and the number of the operation that fails
    ),
    min_size=1,
    max_size=10,
)


@pytest.mark.closes("C07")
@examples(max_examples=25, deadline=None)
@given(saves=SAVES, keep=st.integers(1, 3))
def test_rotation_keeps_newest_and_best_checkpoints_despite_disk_errors(
    small: TrainingState, saves: list[tuple[float | None, str | None, int]], keep: int
) -> None:
    small.cfg.train.keep_checkpoints, small.losses[:], small.evaluations[:] = keep, [], []
    written: dict[int, float | None] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        small.folder = Path(folder)
        for step, (loss, fault, at) in enumerate(saves, 1):
            set_step(small, step, loss)
            patch.setattr(durable, "os", Shim(Fault(at, fault) if fault else None))
            with contextlib.suppress(OSError):
                checkpoint.save(small)
            newest = step_of(checkpoint.newest(small.folder))
            assert newest in (step, max(written, default=0))
            if newest == step:
                written[step] = loss
            present = set(steps_in(small.folder))
            assert set(sorted(written)[-keep:]) <= present
            evaluated = {s: value for s, value in written.items() if value is not None}
            assert not evaluated or min(evaluated.values()) in {evaluated[s] for s in present & evaluated.keys()}
            if fault is None:
                assert len(present) <= keep + 1


@pytest.mark.closes("C07")
def test_old_checkpoint_is_kept_until_the_new_one_is_verified(
    small: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte differs on the disk; only hashes of the bytes in memory can detect that."""
    small.folder, small.evaluations[:], small.cfg.train.keep_checkpoints = tmp_path, [], 1
    set_step(small, 1, None)
    checkpoint.save(small)
    write, chance = durable.write_files, random.Random(1)

    def damaged(path: Path, contents: dict[str, Iterable[bytes]]) -> None:
        write(path, {name: flipped(b"".join(data), chance) for name, data in contents.items()})

    monkeypatch.setattr(durable, "write_files", damaged)
    set_step(small, 2, None)
    with pytest.raises(
        CheckpointError, match=r"step-00000002 was written, but the sizes and hashes of its files differ"
    ):
        checkpoint.save(small)
    assert step_of(checkpoint.newest(tmp_path)) == 1
    monkeypatch.undo()
    checkpoint.save(small)
    assert steps_in(tmp_path) == [2]


def test_each_checkpoint_is_verified_once_when_saved_and_again_on_resume(
    small: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.folder, small.evaluations[:], small.cfg.train.keep_checkpoints = tmp_path, [], 3
    described, read = checkpoint._described, []

    def recorded(path: Path) -> dict:
        read.append((path.parent.name, path.name))
        return described(path)

    monkeypatch.setattr(checkpoint, "_described", recorded)
    for step in range(1, 6):
        set_step(small, step, 9.0 - step)
        checkpoint.save(small)
    assert steps_in(tmp_path) == [3, 4, 5]
    assert read == [(f"step-0000000{n}", name) for n in range(1, 6) for name in (checkpoint.TENSORS, checkpoint.STATE)]
    read.clear()
    assert step_of(checkpoint.newest(tmp_path)) == 5
    assert len(read) == 2  # the checkpoint to resume from is always read again


@pytest.mark.closes("C07")
@pytest.mark.parametrize("name", FILES)
def test_rotation_does_not_count_a_damaged_checkpoint(name: str, small: TrainingState, tmp_path: Path) -> None:
    small.folder, small.evaluations[:], small.cfg.train.keep_checkpoints = tmp_path, [], 2
    for step in (1, 2):
        set_step(small, step, None)
        checkpoint.save(small)
    damaged = tmp_path / "checkpoints" / "step-00000002" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    set_step(small, 3, None)
    checkpoint.save(small)
    assert steps_in(tmp_path) == [1, 3]


def test_resume_completes_rotation_and_removes_temporary_folders(run: Path) -> None:
    (run / "checkpoints" / ".step-00000008.tmp-0123abcd").mkdir()
    (run / "checkpoints" / ".step-00000002.old-0123abcd").mkdir()
    checkpoint.resume(state_in(run, train={"keep_checkpoints": 1, "save_every_steps": 1}))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]


# --- disk space -------------------------------------------------------------------------------------------------------


@pytest.mark.closes("C08")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("train", "optimizer"),
    [
        ({}, "adamw"),
        ({"keep_checkpoints": 2, "save_every_steps": 2}, "paged_adamw"),
        ({"eval_every_steps": 1, "keep": config.Keep.best}, "adamw"),
        ({"eval_every_steps": 2, "keep_checkpoints": 2}, "adamw_8bit"),
        ({"save_every_steps": 6}, "adamw"),
    ],
)
def test_bytes_needed_matches_peak_disk_use(
    train: dict, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 %, tokenizer included, for a run that is stopped once and whose first eval loss is the best."""
    sizes = []
    watch = lambda: sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))  # noqa: E731
    monkeypatch.setattr(durable, "os", Shim(watch=watch))
    optim = config.Optim(lr=0.3, name=config.Optimizer(optimizer))
    settings = {"save_every_steps": 1, "keep_checkpoints": 1} | train
    state, stop = state_in(tmp_path, adapter=config.Adapter(r=64), optim=optim, train=settings), Stop()
    with pytest.raises(Interrupted):
        fit(
            state,
            [Observer(lambda *_: stop.ask(signal.SIGTERM) if state.step == 3 and not stop.signum else None)],
            stop,
        )
    fit(state)
    files.save(state.model, NAME, tmp_path / "adapter", tiny_tokenizer(), SOURCE)
    needed = checkpoint.bytes_needed(state.num_trainable, len(state.steps), state.cfg)
    assert needed == pytest.approx(max(sizes), rel=0.05)


@pytest.mark.closes("C08")
def test_too_little_disk_space_is_refused_and_existing_checkpoints_count_as_free(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    existing = sum(path.stat().st_size for path in (run / "checkpoints").glob("*/*"))
    needed = 2 * existing
    monkeypatch.setattr(durable, "free_bytes", lambda _: needed - existing)
    checkpoint.check_free_space(run, needed)
    monkeypatch.setattr(durable, "free_bytes", lambda _: needed - existing - 1)
    with pytest.raises(ResourceError, match=f"{run}: .* need {needed:,} bytes, {needed - 1:,} are free") as caught:
        checkpoint.check_free_space(run, needed)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_saving_and_resuming_hold_no_copy_of_the_state(optim: str, tmp_path: Path) -> None:
    """A checkpoint has values and moments; memory has what is there anyway, and the parts that are being written."""
    settings = {"adapter": config.Adapter(r=1024), "optim": replace(SETTINGS["optim"], name=config.Optimizer[optim])}
    train = {"max_steps": 6, "save_every_steps": None}
    state = state_in(tmp_path / "run", train=train, **settings)
    state.flat.gradients.fill_(1e-3)
    state.optimizer.step()
    state.losses.append(1.0)
    tracemalloc.start()
    try:
        path = checkpoint.save(state)
        written, read = tracemalloc.get_traced_memory()[1], state_in(tmp_path / "run", train=train, **settings)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        checkpoint.resume(read)
        loaded = tracemalloc.get_traced_memory()[1] - before
        files.save(state.model, NAME, tmp_path / "adapter", tiny_tokenizer(), SOURCE)
    finally:
        tracemalloc.stop()
    size, parts = (path / checkpoint.TENSORS).stat().st_size, 2**21
    assert size > 4 * parts
    assert written < parts and loaded < parts
    assert torch.equal(read.flat.values, state.flat.values)


# --- adapter files ----------------------------------------------------------------------------------------------------


@pytest.mark.closes("C10")
@pytest.mark.parametrize("lost", [1, 1000])
def test_adapter_file_without_all_tensors_is_refused(
    lost: int, small: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = tensor_files.chunks
    shorter = lambda tensors, metadata: chunks(dict(list(tensors.items())[lost:]), metadata)  # noqa: E731
    monkeypatch.setattr(tensor_files, "chunks", shorter)
    with pytest.raises(MismatchError, match=r"missing tensors: [1-9]"):
        files.save(small.model, NAME, tmp_path / "adapter", tiny_tokenizer(), SOURCE)
    assert list(tmp_path.iterdir()) == []
