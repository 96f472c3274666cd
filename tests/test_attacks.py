"""Attacks: none of their code runs, no file outside the given folder is opened, and each raises its expected error."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from attacks import Attack, Paths, adapters, bases, configs, opened_in, rows, templates
from finished import finished_run
from tiny import tiny_folder

from lora_ft.cli import entry
from lora_ft.errors import ConfigError, DataError, MismatchError, SecurityError

CORPUS = {module.__name__.rpartition(".")[2]: module.ATTACKS for module in (bases, adapters, configs, templates, rows)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid base and a run on it, of which each attack changes a copy."""
    folder = tmp_path_factory.mktemp("made")
    finished_run(folder, "llama")
    (folder / "llama").rename(folder / "base")
    return folder


@pytest.fixture
def paths(made: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.chdir(tmp_path)
    paths = Paths(tmp_path / "given", tmp_path / "outside", tmp_path / "canary")
    kind = next(kind for kind, attacks in CORPUS.items() if request.getfixturevalue("attack") in attacks)
    paths.outside.mkdir()
    if kind == "bases":
        shutil.copytree(made / "base", paths.folder)
        shutil.copy(made / "base" / "model.safetensors", paths.outside)
    elif kind == "adapters":
        shutil.copytree(made / "run", paths.folder)
        (tmp_path / "base").symlink_to(made / "base")
    else:
        paths.folder.mkdir()
    return paths


ATTACKS = [attack for attacks in CORPUS.values() for attack in attacks]


@pytest.mark.closes("G04")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_runs_no_code_and_opens_no_outside_file(attack: Attack, paths: Paths) -> None:
    attack.build(paths)
    with opened_in(paths.outside) as opened:
        if attack.error is None:
            attack.run(paths)
        else:
            with pytest.raises(attack.error, match=attack.says) as caught:
                attack.run(paths)
            assert type(caught.value) is attack.error
    assert not paths.canary.exists()
    assert opened == []


def test_most_attacks_are_refused_as_security_errors() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40
    ends = Counter(attack.error for attack in ATTACKS)
    assert set(ends) == {SecurityError, MismatchError, ConfigError, DataError, None}
    assert ends[SecurityError] > len(ATTACKS) / 2


def test_opened_in_reports_opened_files(tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("x")
    with opened_in(tmp_path) as opened:
        (tmp_path / "seen").read_text()
    assert opened == ["seen"]


def test_security_page_names_existing_tests() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)`", (tests.parent / "docs" / "security.md").read_text("utf-8"))
    assert len(set(named)) >= 4 and all((tests / name).is_file() for name in named)


def test_security_error_exits_with_code_9(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(configs.GLOBAL + "adapter: {_target_: os.getcwd}\n")
    with pytest.raises(SystemExit) as ended:
        entry.run("train", ["--config-dir", str(tmp_path), "experiment=mine", "data.path=x"])
    assert ended.value.code == 9
    assert "mine.yaml: _target_: a folder of configs holds settings" in capfd.readouterr().err


def test_hydra_rerun_from_a_pickle_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.run("train", ["--experimental-rerun", "config.pickle"])
    assert ended.value.code == 2
    assert "--experimental-rerun" in capfd.readouterr().err


def test_linked_folder_and_hub_cache_are_read(made: Path, tmp_path: Path) -> None:
    """The folder itself may be a link, and the hub's cache links the files of a snapshot to its blobs."""
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted((made / "base").iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "named").symlink_to(snapshot)
    bases._load(Paths(tmp_path / "named", tmp_path, tmp_path))


def test_valid_bases_and_adapters_load(made: Path, tmp_path: Path) -> None:
    bases._load(Paths(made / "base", tmp_path, tmp_path))
    adapters._open(Paths(made / "run", tmp_path, tmp_path))
    for family in ("gpt2", "qwen3", "gpt_neox"):
        bases._load(Paths(tiny_folder(tmp_path, family), tmp_path, tmp_path))
