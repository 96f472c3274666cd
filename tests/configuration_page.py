"""Write docs/configuration.md: every setting of every command, from `config.py`. `make docs` runs it.

python tests/configuration_page.py
"""

from pathlib import Path

from lora_ft import config, validation
from lora_ft.cli import choices, help

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Every setting, generated from `lora_ft/config.py` by `make docs`. `lora-ft COMMAND --help` shows the same. Settings of
a group are written `group.name=value`; `group=NAME` selects a choice, a YAML file in `conf/group/`. Unknown settings
are errors that name the nearest one.
"""
SHARED = ("train", "eval", "chat", "merge", "publish", "report")  # check has the settings of train, sweep has more


def page() -> str:
    parts, seen = [HEAD, "## Choices\n", _choices()], set[str]()
    for command in SHARED:
        schema = config.SCHEMAS["sweep" if command == "train" else command]
        new = [s for s in validation.settings(schema) if (s.key, s.meaning) not in seen]
        seen |= {(s.key, s.meaning) for s in new}
        also = " (and `check`, `sweep`)" if command == "train" else ""
        parts.append(f"## lora-ft {command}{also}\n")
        parts.append(_table(["setting", "default", "type", "meaning"], [_row(s) for s in new]))
    launcher = [_row(s) for s in validation.settings(config.Launcher, "hydra.launcher.")]
    parts += ["## The launcher of sweeps\n", _table(["setting", "default", "type", "meaning"], launcher)]
    return "\n".join(parts)


def _choices() -> str:
    rows = []
    for group in choices.groups("train"):
        rows += [[f"`{group}={name}`", meaning] for name, meaning in choices.of(group).items()]
    return _table(["choice", "meaning"], rows)


def _row(setting: validation.Setting) -> list[str]:
    kind = help.type_words(setting.type)
    return [
        f"`{setting.key}`",
        f"`{help.show(setting.default)}`",
        kind + (f", {setting.unit}" if setting.unit else ""),
        setting.meaning,
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
