"""Read the config groups of `conf/` and their choices without Hydra, which would take a second. No torch here.

conf/train.yaml            defaults: [..., quant: none, ...]     groups("train")["quant"] == "none"
conf/quant/nf4.yaml        # 4-bit NormalFloat, as in QLoRA      of("quant")["nf4"] == "4-bit NormalFloat, ..."
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from lora_ft import config


def groups(command: str) -> dict[str, str | None]:
    """Return the config groups of a command with their default choices, in the order of its defaults list."""
    primary = yaml.safe_load((config.CONF / f"{command}.yaml").read_text("utf-8"))
    named = [entry for entry in primary["defaults"] if isinstance(entry, dict)]
    return {
        group: choice for entry in named for group, choice in entry.items() if not group.startswith("override hydra/")
    }


def of(group: str, more: Sequence[Path] = ()) -> dict[str, str]:
    """Return the choices of a group and their meanings, from conf/ and from the folders in `more`."""
    folders = [folder / group for folder in (config.CONF, *more)]
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in folder.rglob("*.yaml")
    }
    return {name: meaning(files[name]) for name in sorted(files)}


def meaning(path: Path) -> str:
    """Return the first comment of a YAML file that is not a directive to Hydra, or an empty string."""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            return line.removeprefix("#").strip()
    return ""
