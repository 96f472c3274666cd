"""Read the settings of several sources: each is `data` with the settings of `data.sources.NAME` over it. No torch here.

    data.max_length=512  data.sources.chat.path=chat.jsonl  data.sources.wiki={path: wiki.txt, format: text}
    data.mix.chat=0.7  data.mix.wiki=0.3

    sources(data)    {"chat": Data(path="chat.jsonl", max_length=512), "wiki": Data(path="wiki.txt", format=text, ...)}
    shares(data)     {"chat": 0.7, "wiki": 0.3}

Sources are in the order of their names, so that the order in which they were typed changes nothing.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from lora_ft.conversion import from_plain, to_plain
from lora_ft.errors import ConfigError
from lora_ft.settings.data import Data

OF_THE_MIX = ("sources", "mix", "mix_until")  # settings of `data` that a source does not have
NAME = r"[A-Za-z][\w-]*"


def settings_of_a_source() -> list[str]:
    """Return the names of the settings that a source can have."""
    return [f.name for f in dataclasses.fields(Data) if f.name not in OF_THE_MIX]


def sources(data: Data) -> dict[str, Data]:
    """Return the settings of each source by name, empty without `data.sources`.

    Raises one ConfigError for all names, settings and values that are wrong.
    """
    found, problems = {}, []
    for name in sorted(data.sources):
        try:
            found[name] = _resolved(data, name)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def named(data: Data) -> dict[str, Data]:
    """Return the sources of `data`, or `data` itself under the name "" if it has none."""
    return sources(data) or {"": data}


def shares(data: Data) -> dict[str, float]:
    """Return the share of each source in the supervised tokens; the shares of all sources sum to 1."""
    total = math.fsum(data.mix.values())
    return {name: data.mix[name] / total for name in sorted(data.mix)}


def has_rows(data: Data) -> bool:
    """Return True if the settings name rows."""
    return bool(data.path or data.sources)


def has_labels(data: Data) -> bool:
    """Return True if the answers of the rows are labels, of any source."""
    return any(source.labels is not None for source in named(data).values())


def has_eval_rows(data: Data) -> bool:
    """Return True if the settings name eval rows, of any source."""
    names = "eval_fraction", "eval_path", "eval_split"
    return any(own.get(name, getattr(data, name)) for own in data.sources.values() or [{}] for name in names)


def problems(data: Data) -> Iterator[str]:
    """Yield a sentence for each rule about several settings that a mix breaks; `sources` has not raised."""
    found = sources(data)
    if missing := [name for name in sorted(data.mix) if name not in found]:
        has = f"has {', '.join(found)}" if found else "is empty"
        yield f"data.mix.{missing[0]}={data.mix[missing[0]]:g} is the share of no source: data.sources {has}"
    if missing := [name for name in found if name not in data.mix]:
        named = f"the source{'s' * (len(missing) > 1)} {', '.join(missing)}"
        yield f"data.mix has no share for {named}: set data.mix.{missing[0]}=SHARE, 0 to evaluate it only"
    if data.mix and not any(data.mix.values()):
        yield f"data.mix must have a share above 0, got 0 for {', '.join(sorted(data.mix))}"
    streams = ["data.stream"] if data.stream else []
    streams += [f"data.sources.{name}.stream" for name, source in found.items() if source.stream]
    if found and streams:
        yield f"{streams[0]}=true reads the rows of one path, and data.sources has {', '.join(found)}: choose one"
    for name, source in found.items():
        if not source.path:
            yield f"data.sources.{name}.path is empty: give the rows of this source"
        elif data.mix.get(name) == 0 and not has_eval_rows(source):
            yield f"data.mix.{name}=0 needs eval rows, and data.sources.{name} has none: it would not be used at all"
    yield from _same_rows(data, found)


def unused_path(data: Data) -> bool:
    """Return True if there are sources and none of them takes its rows from `data.path`."""
    return bool(data.path and data.sources) and all("path" in own for own in data.sources.values())


def _same_rows(data: Data, found: dict[str, Data]) -> Iterator[str]:
    for (name, source), (other, its) in itertools.combinations(found.items(), 2):
        if source.path and source == its:
            yield f"data.sources.{name} and data.sources.{other} read the same rows in the same way, from {source.path}"
    if data.eval_path and len(inherit := [name for name in found if "eval_path" not in data.sources[name]]) > 1:
        yield (
            f"data.eval_path={data.eval_path} would be the eval rows of each of {', '.join(inherit)}: set "
            f"data.sources.{inherit[0]}.eval_path and so on instead"
        )


def _resolved(data: Data, name: str) -> Data:
    own, key = data.sources[name], f"data.sources.{name}"
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{key}: the name of a source has letters, digits, _ and -, and begins with a letter")
    if not isinstance(own, dict):
        raise ConfigError(f"{key} must be a mapping of settings, got {own}")
    known = settings_of_a_source()
    for setting in own:
        if setting in OF_THE_MIX:
            raise ConfigError(f"{key}.{setting} is not a setting: a source has no sources of its own")
        if setting not in known:
            near = difflib.get_close_matches(str(setting), known, n=1)
            raise ConfigError(f"{key}.{setting} is not a setting" + (f"; nearest: {key}.{near[0]}" if near else ""))
    inherited = {setting: value for setting, value in to_plain(data).items() if setting not in OF_THE_MIX}
    return from_plain(Data, _merged(inherited, own), f"{key}.")


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `above` over those of `below`; mappings are merged, but not data.labels."""
    both = {key: _merged(below[key], value) for key, value in above.items()
            if isinstance(value, dict) and isinstance(below.get(key), dict) and key != "labels"}  # fmt: skip
    return below | above | both
