"""The command line: `lora-ft COMMAND key=value ...`, or `python -m lora_ft.COMMAND key=value ...`. No torch here.

A command is a module with a function `main`. It is imported, and torch with it, once the config is valid.

    def main(cfg: config.TrainRun, invocation: entry.Invocation) -> float | None: ...
    def end(sweep: Path) -> int: ...           # in lora_ft.sweep only: called after all jobs, returns the exit code

    if __name__ == "__main__":
        entry.run("train")
"""

import argparse
import contextlib
import difflib
import gc
import importlib
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from lora_ft import config
from lora_ft.cli import completion, help
from lora_ft.errors import ConfigError, Interrupted, LoraFtError
from lora_ft.io import process, redact, streams

INTERRUPTED = 130
READER_LEFT = 141  # the exit code of a process that SIGPIPE stops


@dataclass(frozen=True)
class Invocation:
    """The absolute folder of the run, and the overrides as typed, without those of Hydra's settings.

    folder: the current folder for commands that make no run folder.
    """

    folder: Path
    overrides: list[str]


@streams.usable()
@redact.shown()
def run(command: str | None = None, arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code. `arguments` follow the command's name; default: those of the process."""
    arguments = [_as_utf8(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    try:
        process.prepare()
        code = _command(arguments if command is None else [command, *arguments])
        sys.stdout.flush()  # here: if the reader has left, Python would print a traceback while it shuts down
    except (LoraFtError, Interrupted) as error:
        code = error.exit_code
        if not _is_repeated(error):
            with contextlib.suppress(BrokenPipeError):
                sys.stderr.write(f"lora-ft: {error}\n")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads the rest
        code = READER_LEFT
    sys.exit(code)


def _is_repeated(error: BaseException) -> bool:
    """Return True for a wrong setting that rank 0 of torchrun reports: every rank composes the same config."""
    is_main = os.environ.get("RANK", "0") == "0"
    return isinstance(error, ConfigError) and not (is_main or str(error).startswith("rank "))


def _as_utf8(argument: str) -> str:
    """Return an argument that Python has decoded with another encoding than UTF-8, decoded as UTF-8 if it is that."""
    with contextlib.suppress(UnicodeError):
        return os.fsencode(argument).decode("utf-8") if not argument.isprintable() else argument
    return argument


def _command(arguments: list[str]) -> int:
    flags = _parser().parse_intermixed_args(arguments)
    command, *overrides = flags.arguments or [""]
    if flags.complete:
        _complete(flags.arguments)
    elif flags.version:
        sys.stdout.write(f"lora_ft {metadata.version('lora_ft')}\n")
    elif not command:
        sys.stdout.write(help.overview())
    elif command not in config.SCHEMAS:
        raise _unknown_command(command)
    elif flags.help:
        sys.stdout.write(help.page(command, [flags.config_dir] if flags.config_dir else []))
    else:
        return _compose(command, overrides, flags)
    return 0


def _compose(command: str, overrides: list[str], flags: argparse.Namespace) -> int:
    from lora_ft.cli import composition  # here: Hydra takes a third of a second, too long for help and completion
    from lora_ft.cli.overrides import names_several

    multirun = flags.multirun or command == "sweep" or "hydra.mode=MULTIRUN" in overrides
    command = "sweep" if multirun and command == "train" else command
    line = composition.CommandLine(command, overrides, multirun, flags.config_dir)
    if flags.cfg or flags.info:
        composition.show(line, part=flags.cfg, package=flags.package, resolve=flags.resolve, info=flags.info)
        return 0
    if command == "plan" and (multirun or names_several(command, overrides)):
        from lora_ft.cli import grid

        jobs = grid.jobs(line)
        _import("lora_ft.plan").plan_jobs(jobs)
        return 0
    return composition.run(
        line,
        lambda cfg, folder, typed: _import(f"lora_ft.{command}").main(cfg, Invocation(folder, typed)),
        lambda sweep: _import(f"lora_ft.{command}").end(sweep),
    )


def _import(name: str) -> Any:
    """Import a command and exclude its modules from garbage collection, which would walk a million permanent objects.

    Only at the first import: in a sweep, freezing again would keep the garbage of an earlier job.
    """
    if name not in sys.modules:
        gc.disable()
        try:
            importlib.import_module(name)
        finally:
            gc.freeze()
            gc.enable()
    return sys.modules[name]


def _parser() -> argparse.ArgumentParser:
    """Parse Hydra's flags anywhere on the line, except its --experimental-rerun, which unpickles a file."""
    parser = argparse.ArgumentParser(prog="lora-ft", add_help=False, allow_abbrev=False,
                                     usage="lora-ft COMMAND key=value ... (lora-ft --help)")  # fmt: skip
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--info", "-i", nargs="?", const="all",
                        choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"])  # fmt: skip
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true", dest="complete")
    return parser


def _unknown_command(command: str) -> ConfigError:
    near = difflib.get_close_matches(command, config.SCHEMAS, n=1, cutoff=0.5)
    nearest = f"; nearest: {near[0]}" if near else ""
    return ConfigError(f"{command} is not a command{nearest} (there are {', '.join(config.SCHEMAS)})")


def _complete(arguments: list[str]) -> None:
    if arguments == ["install=bash"]:
        sys.stdout.write(completion.SCRIPT)
    elif arguments == ["uninstall=bash"]:
        sys.stdout.write("complete -r lora-ft; unset -f _lora_ft\n")
    elif arguments == ["query=bash"]:
        reply = completion.reply(os.environ.get("COMP_LINE", ""), os.environ.get("COMP_WORDBREAKS", ""))
        sys.stdout.writelines(f"{candidate}\n" for candidate in reply)
    else:
        raise ConfigError(f"-sc takes install=bash, uninstall=bash or query=bash, got {' '.join(arguments)}")
