"""Read the public facts of a training run from its folder, for the model card; paths are left out.

    summary = read(Path("my_run"))
    summary.data            "openassistant/oasst1 on the ... hub", or "a local file (.jsonl)": never its path
    summary.settings        {"adapter.r": 16, "optim.lr": 0.0001, ...}     settings that differ from the defaults
    summary.evaluations     [Scores("at the end of training", {"loss": 3.25, ...}, {"loss": 2.4, ...}, 859 tokens, ...)]

An adapter from another program has no run and no summary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft import config, runs, validation
from lora_ft.config import TrainRun
from lora_ft.errors import ConfigError
from lora_ft.io import untrusted
from lora_ft.models import resolve
from lora_ft.models.gguf import reader
from lora_ft.publishing.adapter_facts import front_matter
from lora_ft.settings.setting import OnResume

# The card shows these under other headings.
_SHOWN_ELSEWHERE = (
    "data.revision", "data.name", "data.split", "data.sources", "data.mix", "model.revision", "model.hub_id",
)  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Results of base and adapter on the same eval rows: loss in nats per token, perplexity, metrics."""

    when: str
    base: dict[str, float]
    adapter: dict[str, float]
    tokens: int
    rows: int | None


@dataclass(frozen=True)
class TrainingSummary:
    """The public facts of a run.

    `data` describes the source of the rows; `dataset` is their hub id, None if they are not on the hub. `rows` are the
    numbers of training and eval documents. `curves` are the (step, loss) points of training and evaluation.
    """

    settings: dict[str, Any]
    data: str
    dataset: str | None
    dataset_config: str | None
    dataset_split: str | None
    dataset_revision: str | None
    rows: tuple[int, int] | None
    steps: int | None
    tokens: int | None
    evaluations: list[Scores]
    merge: dict[str, Any] | None
    curves: tuple[list[tuple[float, float]], list[tuple[float, float]]]


def read(run: Path) -> TrainingSummary:
    """Read the summary of a finished run; raises ConfigError for files that lora-ft did not write."""
    stored = runs.read_config(run)
    data = stored.get("data") or {}
    described, dataset = _describe_sources(data) if data.get("sources") else _describe_source(str(data.get("path", "")))
    hub = data if dataset else {}
    result, check = _json(run / runs.RESULT), _json(run / runs.CHECK)
    counts = check.get("rows") or {}
    rows = (counts["train_documents"], counts["eval_documents"]) if "eval_documents" in counts else None
    return TrainingSummary(
        _settings(stored), described, dataset, hub.get("name"), hub.get("split"), hub.get("revision"),
        rows, result.get("steps"), result.get("tokens"), _scores(run, result, stored),
        _json(run / "merge.json") or None, _curves(run),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    untrusted.check_place(path, path.parent)
    return untrusted.json_object(path, ConfigError)


def _settings(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that affect the result and differ from the default, without paths."""
    plain = validation.to_plain(TrainRun())
    found: dict[str, Any] = {}
    for setting in validation.settings(TrainRun):
        group, _, name = setting.key.rpartition(".")
        values = stored.get(group) if group else stored
        value = values.get(name) if isinstance(values, dict) else None
        default = (plain[group] if group else plain)[name]
        if (
            setting.on_resume is OnResume.same
            and not setting.path
            and setting.key not in _SHOWN_ELSEWHERE
            and value is not None
        ):
            found |= {setting.key: value} if value != default else {}
    return found


def _describe_source(path: str) -> tuple[str, str | None]:
    """Return a description of the source of rows without a path of this machine, and its hub id or None."""
    if path.startswith("package:"):
        return f"files of the package {path.removeprefix('package:').partition('/')[0]}", None
    if path.startswith("cache:"):
        return f"rows made by a script ({path.removeprefix('cache:')})", None
    if Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".yml", ".yaml", ".tsv"):
        return f"a local file ({Path(path).suffix.lower()})", None
    if untrusted.is_public_id(path):
        return f"{path} on the Hugging Face hub", path
    return "a local folder", None


def _describe_sources(data: dict[str, Any]) -> tuple[str, None]:
    """Return a description of several sources with their shares; no single hub id."""
    sources, mix = data["sources"], data.get("mix") or {}
    if not (isinstance(sources, dict) and isinstance(mix, dict) and all(isinstance(s, dict) for s in sources.values())):
        raise ConfigError("config.yaml: data.sources and data.mix must be mappings")
    described = {name: _describe_source(str(sources[name].get("path", data.get("path", ""))))[0] for name in sources}
    return "; ".join(f"{name} (share {mix.get(name)}): {text}" for name, text in sorted(described.items())), None


def _scores(run: Path, result: dict[str, Any], stored: dict[str, Any]) -> list[Scores]:
    is_of_head = (stored.get("objective") or {}).get("name") == "classification"
    evaluated, found = _json(run / "eval.json"), []
    try:
        if result.get("eval_loss") is not None:
            base, adapter = (
                _losses(float(result[loss]), is_of_head)
                | _of_sources(result.get(f"{loss}es") or {})
                | _figures(result.get(metrics) or {})
                for loss, metrics in (("base_eval_loss", "base_metrics"), ("eval_loss", "metrics"))
            )
            found.append(Scores("at the end of training", base, adapter, int(result["eval_tokens"]), None))
        if evaluated:
            base, adapter = (_figures(evaluated[name]) for name in ("base", "adapter"))
            found.append(Scores("by lora-ft eval", base, adapter, int(evaluated["tokens"]), int(evaluated["rows"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{run}: {runs.RESULT} or eval.json was not written by lora-ft: {error!r}") from error
    return found


def _losses(loss: float, is_of_head: bool) -> dict[str, float]:
    """Return the loss and, unless it is that of a classifier, the perplexity."""
    return {"loss": loss} | ({"perplexity": math.exp(loss)} if loss < 100 and not is_of_head else {})


def _of_sources(losses: dict[str, Any]) -> dict[str, float]:
    return {f"loss of {name}": float(loss) for name, loss in losses.items()}


def _figures(measured: dict[str, Any]) -> dict[str, float]:
    sources = {name: source["loss"] for name, source in measured.get("sources", {}).items()}
    found = {name: float(value) for name, value in measured.items() if value is not None and name != "sources"}
    return found | _of_sources(sources)


def _curves(run: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    path = run / runs.METRICS
    untrusted.check_place(path, run)
    found = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # an incomplete last line of a killed process
            continue
    return tuple([(m["step"], m[key]) for m in found if m.get(key) is not None] for key in ("loss", "eval_loss"))  # type: ignore[return-value]


def license_of(model: config.Model, folder: str | None) -> str | None:
    """Return the license that a base's GGUF file or model card states; None if it states no license."""
    path = Path(model.path).expanduser()
    if model.path.startswith("package:"):
        path = resolve.package_file(model.path)
    if path.suffix == ".gguf":
        stated = reader.read(path).metadata.get("general.license")
    else:
        stated = front_matter(Path(folder or path) / "README.md").get("license")
    return stated if isinstance(stated, str) and stated else None
