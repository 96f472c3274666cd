"""Walk and check the settings of a command's schema. No torch here.

for setting in settings(TrainRun): ...      # Setting("adapter.r", int, 16, "rank", unit="", text=False, path=False)
locate_paths(cfg)                           # data.path: rows.jsonl -> /home/me/rows.jsonl
validate(cfg)                               # ConfigError: adapter.r must be at least 1, got 0
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lora_ft import metric_table, mixing
from lora_ft.config import (
    Data,
    DistMode,
    Dtype,
    Keep,
    Launcher,
    MergeRun,
    PlanRun,
    PublishRun,
    ReportRun,
    SweepRun,
    TrainRun,
)
from lora_ft.conversion import escape as escape
from lora_ft.conversion import from_plain as from_plain
from lora_ft.conversion import plain_value
from lora_ft.conversion import to_plain as to_plain
from lora_ft.conversion import typed as typed
from lora_ft.errors import ConfigError
from lora_ft.settings.setting import OnResume


@dataclass(frozen=True)
class Setting:
    """One declared setting of a schema."""

    key: str
    type: Any
    default: Any
    meaning: str
    unit: str
    text: bool
    path: bool
    on_resume: OnResume


def settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a schema with dotted keys, in order of declaration."""
    for f in dataclasses.fields(schema):
        if group := _group(f):
            yield from settings(group, f"{prefix}{f.name}.")
        else:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            kinds = {name: f.metadata[name] for name in ("meaning", "unit", "text", "path", "on_resume")}
            yield Setting(prefix + f.name, f.type, default, **kinds)


def groups(schema: type) -> dict[str, type]:
    """Return the config groups of a schema: field name to dataclass."""
    return {f.name: group for f in dataclasses.fields(schema) if (group := _group(f))}


def _group(field: "dataclasses.Field[Any]") -> type | None:
    """Return the dataclass of a group; its default may be of a subclass of the declared type."""
    default: Any = field.default_factory
    return default if isinstance(default, type) and dataclasses.is_dataclass(default) else None


def locate_paths(cfg: Any) -> None:
    """Expand `~` in the paths of a config, and make existing paths absolute, so it works in every folder.

    Other values (hub ids, `package:...`, missing files) are unchanged. An existing folder takes precedence over a hub
    id of the same name.
    """
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            locate_paths(value)
        elif value and f.metadata["path"]:
            setattr(cfg, f.name, _located(value))
    if isinstance(cfg, Data):
        paths = {f.name for f in dataclasses.fields(cfg) if f.metadata["path"]}
        for source in cfg.sources.values():
            source |= {key: _located(source[key]) for key in paths & source.keys() if isinstance(source[key], str)}


def _located(path: str) -> str:
    path = expand_home(path)
    # not pathlib, which raises for invalid file names
    return os.path.abspath(path) if path and os.path.exists(path) else path  # noqa: PTH100, PTH110


def expand_home(path: str) -> str:
    """Replace `~` and `~name` at the start of a path by the home folder; an unknown `~name` is unchanged."""
    return os.path.expanduser(path)  # noqa: PTH111  (pathlib raises for an unknown name)


def validate(cfg: Any, prefix: str = "") -> None:
    """Check every rule of a config; raise one ConfigError that lists all violations."""
    of_sources = [*_broken_sources(cfg)]
    of_mix = [] if of_sources else _broken_mix(cfg)
    problems = [*_broken_rules(cfg, prefix), *of_sources, *of_mix, *_broken_combinations(cfg)]
    if problems:
        raise ConfigError("\n".join(problems))


def validate_values(cfg: Any) -> None:
    """Check the rule of each setting, but no rules about several settings; raise one ConfigError."""
    if problems := [*_broken_rules(cfg), *_broken_sources(cfg)]:
        raise ConfigError("\n".join(problems))


def _broken_rules(cfg: Any, prefix: str = "") -> Iterator[str]:
    for f in dataclasses.fields(cfg):
        key, value = prefix + f.name, getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            yield from _broken_rules(value, key + ".")
        elif value is not None:
            nested = {"sources": (), "where": (dict,)}.get(f.name, (list, dict))  # of the settings that are mappings
            if isinstance(value, dict) and any(isinstance(item, nested) for item in value.values()):
                yield f"{key} must be a mapping to true, false, numbers, text or null, got {value}"
                continue
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for name, item in entries:
                of_entry = f"{key}.{name}" if name else key
                yield from (f"{of_entry} must be {rule}, got {item}" for rule in _violations(f.metadata, item))


def _broken_sources(cfg: Any) -> Iterator[str]:
    """Yield the broken rules of the settings of `data.sources`; those that a source inherits are checked in `data`."""
    data = getattr(cfg, "data", None)
    if not isinstance(data, Data):
        return
    try:
        sources = mixing.sources(data)
    except ConfigError as error:
        yield str(error)
        return
    for name, source in sources.items():
        own = tuple(f"data.sources.{name}.{setting} " for setting in data.sources[name])
        yield from (rule for rule in _broken_rules(source, f"data.sources.{name}.") if rule.startswith(own))


def _broken_mix(cfg: Any) -> Iterator[str]:
    if isinstance(data := getattr(cfg, "data", None), Data):
        yield from mixing.problems(data)


def _violations(metadata: Any, value: Any) -> Iterator[str]:
    holds = {
        "at least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    if isinstance(value, float) and not math.isfinite(value):
        yield "finite"
        return
    bounds = {rule: bound for rule, bound in metadata["bounds"].items() if bound is not None}
    if isinstance(value, str):
        if metadata["pattern"] and not re.fullmatch(metadata["pattern"], value):
            yield f"{'a number or' if bounds else 'of the form'} {metadata['pattern']}"
        return
    for rule, bound in bounds.items():
        if not holds[rule](bound):
            yield f"{rule} {bound:g}"


def _broken_combinations(cfg: Any) -> Iterator[str]:
    if isinstance(cfg, TrainRun):
        if not cfg.model.path:
            yield "model.path is empty: choose a base with model=NAME, or model=local model.path=FOLDER"
        if not mixing.has_rows(cfg.data) and not isinstance(cfg, PlanRun):
            yield "data.path is empty: choose data with data=NAME or data.path=FILE"
        if mixing.unused_path(cfg.data):
            yield (
                f"data.path={cfg.data.path} is the path of no source: make it one, data.sources.NAME.path="
                f"{cfg.data.path}, or leave it out"
            )
        if cfg.optim.warmup_steps and cfg.train.max_steps and cfg.optim.warmup_steps >= cfg.train.max_steps:
            yield (
                f"optim.warmup_steps must be below train.max_steps ({cfg.train.max_steps}), "
                f"got {cfg.optim.warmup_steps}"
            )
        if cfg.data.stream and cfg.train.max_steps is None:
            yield "data.stream=true needs train.max_steps: the number of rows is not known"
        if cfg.data.stream and cfg.data.deduplicate:
            yield "data.deduplicate needs all rows, and data.stream=true never has them: choose one"
        if not cfg.adapter.target_modules:
            yield "adapter.target_modules must name at least one layer, got []"
        if (cfg.train.keep is Keep.best or cfg.train.patience) and not mixing.has_eval_rows(cfg.data):
            yield "train.keep=best and train.patience need eval rows: data.eval_fraction or data.eval_path"
        if (cfg.train.eval_metrics or cfg.train.best_metric != "loss") and not mixing.has_eval_rows(cfg.data):
            yield "train.eval_metrics and train.best_metric need eval rows: data.eval_fraction or data.eval_path"
        if cfg.train.patience and not cfg.train.eval_every_steps:
            yield "train.patience needs train.eval_every_steps, got null"
        named = [name for name in (*cfg.train.eval_metrics, cfg.train.best_metric) if name in metric_table.METRICS]
        answers = metric_table.of(metric_table.Source.answers, named)
        if answers and cfg.dist.mode is DistMode.shard:
            yield f"train.eval_metrics: {', '.join(answers)} needs generated answers, which dist=shard does not allow"
        if isinstance(cfg, SweepRun) and cfg.dist.mode in (DistMode.ddp, DistMode.shard):
            yield f"dist={cfg.dist.mode.value} is for one training: each job of a sweep trains in one process"
        if isinstance(cfg, SweepRun) and cfg.sweep.halving and not mixing.has_eval_rows(cfg.data):
            yield "sweep.halving needs eval rows: data.eval_fraction or data.eval_path"
    elif isinstance(cfg, Launcher):
        if cfg.time_limit and cfg.notice >= 60 * cfg.time_limit:
            yield (
                f"hydra.launcher.notice must be below hydra.launcher.time_limit ({cfg.time_limit} minutes), got "
                f"{cfg.notice} seconds"
            )
    elif isinstance(cfg, ReportRun):
        if not cfg.sweep:
            yield "sweep is empty: give the folder of a sweep, sweep=FOLDER"
    elif isinstance(cfg, MergeRun) and cfg.adapters:
        if cfg.run or cfg.adapter_path:
            yield "adapters lists the adapters to combine: leave out run and adapter_path"
    elif not (cfg.run or cfg.adapter_path):
        yield "give a run with run=FOLDER, or an adapter with adapter_path=FOLDER_OR_HUB_ID"
    elif cfg.run and cfg.adapter_path:
        yield "run and adapter_path are two adapters: give one of them"
    if isinstance(cfg, MergeRun):
        yield from _broken_merge(cfg)
    elif isinstance(cfg, PublishRun) and not (cfg.to or cfg.lint_only or cfg.verify_only):
        yield "to is empty: give a destination, to=dir:PATH, hf:OWNER/NAME or a URL (s3://BUCKET/PREFIX)"


def _broken_merge(cfg: MergeRun) -> Iterator[str]:
    if not cfg.out:
        yield "out is empty: give the folder to write, out=FOLDER"
    if cfg.gguf and cfg.dtype is not Dtype.auto:
        yield f"gguf={cfg.gguf.value} sets the dtype of the file: leave out dtype, got {cfg.dtype.value}"
    if cfg.weights and len(cfg.weights) != len(cfg.adapters):
        yield f"weights must have one value per adapter ({len(cfg.adapters)}), got {len(cfg.weights)}"
    if cfg.gguf and (cfg.adapters or cfg.truncate_rank):
        yield "gguf writes a merged model, but adapters and truncate_rank write an adapter: give one of them"
    if cfg.adapters and cfg.truncate_rank:
        yield "adapters and truncate_rank cannot be combined: combine the adapters first, then truncate the result"


def lasting(cfg: Any) -> dict[str, Any]:
    """Return the settings that decide a run's result, by dotted key, where they differ from the default.

    Defaults are omitted, so adding an option does not change existing config hashes.
    """
    plain = to_plain(cfg)
    chosen = {s.key: _at(plain, s) for s in settings(type(cfg)) if s.on_resume is OnResume.same}
    return {s.key: chosen[s.key] for s in settings(type(cfg)) if chosen.get(s.key, _at({}, s)) != _at({}, s)}


def changes(stored: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """Return the settings of a resumed run that differ from `stored` (a result of `to_plain`), by dotted key.

    Raises ConfigError with all settings that cannot change, and both values.
    """
    plain, changed, refused = to_plain(cfg), {}, []
    for setting in settings(type(cfg)):
        before, now = plain_value(_at(stored, setting)), _at(plain, setting)
        if before == now or setting.key == "resume":
            continue
        higher = None not in (before, now) and setting.on_resume is OnResume.higher
        if setting.on_resume is OnResume.free or (higher and now > before):
            changed[setting.key] = now
        else:
            refused.append(f"  {setting.key}: {before} -> {now}" + (" (can only be raised)" if higher else ""))
    if refused:
        raise ConfigError("a resumed run cannot change the settings that decide its result:\n" + "\n".join(refused))
    return changed


def _at(plain: dict[str, Any], setting: Setting) -> Any:
    """Return the plain value of a setting, or its default if the stored config does not have it."""
    node: Any = plain
    for part in setting.key.split("."):
        if not isinstance(node, dict) or part not in node:
            return setting.default.value if isinstance(setting.default, Enum) else setting.default
        node = node[part]
    return node
