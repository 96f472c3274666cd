"""The run folder: what a run leaves behind, and the only thing one verb hands to another. No torch here.

runs/2026-11-23_10-15-00-123456/
  config.yaml        the composed config, resolved; never rewritten
  overrides.txt      the overrides of the command line, one a line
  environment.json   versions, machine, command
  metrics.jsonl      one object a step: {"step": 1, "loss": ..., ...}
  result.json        the outcome: losses, tokens per second, peak memory, where the adapter is
  adapter/           stock PEFT files, tokenizer, lora_ft.json
  tensorboard/       event files, with track=tensorboard
  eval.json          written by lora-ft eval
"""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lora_ft import durable
from lora_ft.errors import ConfigError

PACKAGES = ("lora_ft", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "hydra-core")

_BEFORE_TRAINING = {"config.yaml", "overrides.txt", "environment.json", "log.txt"}


def create(folder: Path, config: dict[str, Any], overrides: list[str]) -> None:
    """Start a run: refuse a folder that holds anything, then write what is known before training.

    What a start that failed before its first step left behind is no obstacle to the next.
    """
    durable.make_folder(folder)
    if not {path.name for path in folder.iterdir()} <= _BEFORE_TRAINING:
        raise ConfigError(f"the run folder must be empty, but {folder} is not: choose another hydra.run.dir")
    durable.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    durable.write_text(folder / "overrides.txt", "".join(f"{o}\n" for o in overrides))
    durable.write_json(folder / "environment.json", environment())


def environment() -> dict[str, Any]:
    """Versions and machine of this process: what a reader needs to repeat the run; no paths, no names."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions(),
        "verb": Path(sys.argv[0]).stem,
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def append_metrics(folder: Path, values: dict[str, Any]) -> None:
    durable.append_line(folder / "metrics.jsonl", json.dumps(values, allow_nan=False))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def read_config(folder: Path) -> dict[str, Any]:
    """The stored config of a run; ConfigError where the folder is not one."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run={folder} is not a run folder: it has no config.yaml")
    loaded = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(loaded, dict):
        raise ConfigError(f"run={folder}: config.yaml holds no settings")
    return loaded


def adapter_folder(folder: Path) -> Path:
    """The adapter of a finished run; ConfigError where the run has not written one."""
    path = folder / "adapter"
    if not (path / "adapter_config.json").is_file():
        raise ConfigError(f"run={folder} has no adapter: the run did not finish (see {folder / 'log.txt'})")
    return path
