"""Attacks by configs: folders for --config-dir, run folders and overrides that would run code."""

from collections.abc import Callable

from attacks import Attack, Paths
from lora_ft.cli import composition
from lora_ft.errors import ConfigError, LoraFtError, SecurityError

GLOBAL = "# @package _global_\n"
_CALL = "{_target_: builtins.open, file: CANARY, mode: w}"


def _compose(paths: Paths, overrides: list[str], folder: bool) -> object:
    typed = [override.replace("CANARY", str(paths.canary)) for override in overrides]
    folders = [f"hydra.run.dir={paths.folder}/run", f"hydra.sweep.dir={paths.folder}/sweep"]
    command = composition.CommandLine("train", ["data.path=x", *typed, *folders], "hydra.mode=MULTIRUN" in typed,
                                  paths.folder if folder else None)  # fmt: skip
    return composition.run(command, lambda cfg, folder, typed: None, lambda sweep: 0)


def _files(files: dict[str, str]) -> Callable[[Paths], None]:
    def build(paths: Paths) -> None:
        for name, text in files.items():
            path = paths.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("CANARY", str(paths.canary)).replace("OUTSIDE", str(paths.outside)))

    return build


def _folder_of_configs(
    name: str,
    files: dict[str, str],
    says: str,
    overrides: tuple[str, ...] = (),
    error: type[LoraFtError] | None = SecurityError,
) -> Attack:
    """Choose the file experiment/mine.yaml, and others by the overrides given."""
    chosen = ["experiment=mine"] if "experiment/mine.yaml" in files else []
    return Attack(name, _files(files), lambda paths: _compose(paths, [*chosen, *overrides], folder=True), error, says)


def _mine(name: str, text: str, says: str, error: type[LoraFtError] = SecurityError) -> Attack:
    return _folder_of_configs(name, {"experiment/mine.yaml": text}, says, error=error)


def _typed(
    name: str, *overrides: str, says: str = "never code to run", error: type[LoraFtError] = SecurityError
) -> Attack:
    return Attack(name, lambda paths: None, lambda paths: _compose(paths, [*overrides], folder=False), error, says)


def _linked(paths: Paths) -> None:
    (paths.outside / "mine.yaml").write_text(GLOBAL + "seed: 3\n")
    (paths.folder / "experiment").mkdir()
    (paths.folder / "experiment" / "mine.yaml").symlink_to(paths.outside / "mine.yaml")


def _elsewhere(paths: Paths) -> None:
    (paths.outside / "mine.yaml").write_text(GLOBAL + "seed: 3\n")
    _files({"experiment/mine.yaml": GLOBAL + "defaults:\n  - ../../outside/mine\n"})(paths)


def _stored(name: str, text: str, says: str, command: str = "eval", error: type[LoraFtError] = SecurityError) -> Attack:
    """Give the run folder of somebody else as run= or resume=."""

    def run(paths: Paths) -> object:
        key = "run" if command == "eval" else "resume"
        line = composition.CommandLine(command, [f"{key}={paths.folder}"])
        return composition.run(line, lambda cfg, folder, typed: None, lambda sweep: 0)

    return Attack(name, _files({"config.yaml": text}), run, error, says)


def _linked_run(paths: Paths) -> None:
    (paths.outside / "config.yaml").write_text("seed: 3\n")
    (paths.folder / "config.yaml").symlink_to(paths.outside / "config.yaml")


_CODE = "never code to run"
_TRAIN = f"hydra:\n  callbacks:\n    c: {_CALL}\n"
_LOGGING = "version: 1\nhandlers:\n  h: {(): builtins.open, file: CANARY, mode: w}\nroot: {handlers: [h]}\n"

ATTACKS = [
    _mine("_target_ in a group", f"{GLOBAL}adapter: {_CALL}\n", _CODE),
    _mine("_target_ at the top", f"{GLOBAL}_target_: builtins.open\n", _CODE),
    _mine("_target_ in quotes", f'{GLOBAL}adapter: {{"_target_": builtins.open}}\n', _CODE),
    _mine("_target_ in escapes", f'{GLOBAL}adapter: {{"\\x5ftarget\\u005f": builtins.open}}\n', _CODE),
    _mine("_target_ merged in", f"{GLOBAL}x: &x {_CALL}\nadapter: {{<<: *x}}\n", _CODE),
    _mine("_target_ in a list", f"{GLOBAL}adapter: {{targets: [{_CALL}]}}\n", _CODE),
    _mine("_target_ by its package", "# @package adapter._target_\nx: 1\n", _CODE),
    _mine("_target_ by a package in the defaults", f"{GLOBAL}defaults:\n  - /model@x._target_: gpt2\n", _CODE),
    _typed("_target_ typed", "adapter._target_=builtins.open", says="is not a setting", error=ConfigError),
    _typed("_target_ added", "+adapter._target_=builtins.open", says="is not a setting", error=ConfigError),
    _typed("_target_ forced", "++x._target_=builtins.open", says="is not a setting", error=ConfigError),
    _typed("_target_ in a mapping", "+x={_target_:builtins.open}"),
    _typed("_target_ of a callback", f"+hydra.callbacks.c={_CALL.replace(': ', ':')}"),
    _typed("_target_ of the launcher", "hydra.launcher._target_=builtins.open", "hydra.mode=MULTIRUN"),
    _typed("_target_ in a sweep", "+hydra.callbacks.c=choice({_target_:os.getcwd},{a:1})", "hydra.mode=MULTIRUN"),
    _mine("callbacks", f"{GLOBAL}hydra:\n  callbacks:\n    c: {_CALL}\n", _CODE),
    _mine("callbacks without a target", f"{GLOBAL}hydra: {{callbacks: {{c: {{x: 1}}}}}}\n", _CODE),
    _mine("a launcher", f"{GLOBAL}hydra:\n  launcher: {_CALL}\n", _CODE),
    _mine("the environment", f"{GLOBAL}hydra:\n  job: {{env_set: {{HF_ENDPOINT: 'http://evil'}}}}\n", _CODE),
    _mine("a search path", f"{GLOBAL}hydra:\n  searchpath: ['pkg://evil']\n", _CODE),
    Attack("a config instead of lora_ft's own", _files({"train.yaml": _TRAIN, "hydra_settings.yaml": _TRAIN}),
           lambda paths: _compose(paths, [], folder=True), None),
    _typed("a search path typed", "hydra.searchpath=[pkg://evil]"),
    _typed("callbacks typed without a target", "+hydra.callbacks.c={x:1}"),
    _typed("logging to a class typed", "++hydra.job_logging.handlers.h.class=evil.Evil"),
    _folder_of_configs("logging to a class, by its group", {"hydra/job_logging/evil.yaml": _LOGGING},
                       _CODE, ("hydra/job_logging=evil",)),
    _folder_of_configs("logging to a class, by a choice in a file", {
        "experiment/mine.yaml": f"{GLOBAL}defaults:\n  - /hydra/job_logging/evil\n",
        "hydra/job_logging/evil.yaml": _LOGGING}, _CODE, ("hydra.mode=MULTIRUN",)),
    _folder_of_configs("logging to a class, by a package in a file", {
        "experiment/mine.yaml": f"{GLOBAL}defaults:\n  - /other/evil@hydra.job_logging\n",
        "other/evil.yaml": _LOGGING}, _CODE, ("hydra.mode=MULTIRUN",)),
    _folder_of_configs("the environment, by a package in a file", {
        "experiment/mine.yaml": f"{GLOBAL}defaults:\n  - /other/env@hydra.job.env_set\n",
        "other/env.yaml": "PYTHONPATH: /evil\n"}, _CODE, ("hydra.mode=MULTIRUN",)),
    _folder_of_configs("logging to a class, in place of lora_ft's settings of Hydra", {
        "hydra_settings.yaml": "# @package _global_\nhydra: {job_logging: {handlers: {h: {(): builtins.open}}}}\n"},
        "", ("hydra.mode=MULTIRUN",), error=None),
    _mine("a config of 1 MiB", GLOBAL + "# " + "x" * 2**20, "larger than 1 MiB"),
    _mine("a tag of Python's", GLOBAL + "a: !!python/object/apply:builtins.open [CANARY, w]\n", "is not plain"),
    _mine("a tag of its own", GLOBAL + "a: !evil 1\n", "is not plain data"),
    Attack("a config that is a link", _linked,
           lambda paths: _compose(paths, ["experiment=mine"], folder=True), SecurityError, "outside of its folder"),
    Attack("a config of another folder", _elsewhere,
           lambda paths: _compose(paths, ["experiment=mine"], folder=True), SecurityError, "outside of its folder"),
    _stored("a stored run with a tag", "a: !!python/name:os.system\n", "is not plain data"),
    _stored("a stored run with _target_", "model: {_target_: builtins.open}\n", "is not a setting", error=ConfigError),
    _stored("a stored run with _target_, resumed", "model: {_target_: builtins.open}\n", "is not a setting", "train",
            ConfigError),
    Attack("a stored run that is a link", _linked_run,
           lambda paths: composition.run(
               composition.CommandLine("eval", [f"run={paths.folder}"]), lambda *_: None, lambda _: 0),
           SecurityError, "outside of its folder"),
]  # fmt: skip
