"""The model card, README.md: front matter that the hub accepts, and the text of card.md.jinja.

    ---
    base_model: HuggingFaceTB/SmolLM2-135M-Instruct       ids only, never a path of this machine
    model-index: ...                                      evaluation results
    ---
    # LoRA adapter for SmolLM2-135M-Instruct
    ## Results | ## Load it | ## Training | ## Limits | ## Verification

Names, settings and metrics are shown as code, so that nothing in them acts as Markdown or HTML; huggingface_hub writes
the front matter. The same adapter gives the same bytes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from lora_ft.adapters.provenance import Loading
from lora_ft.classes import MULTI_LABEL
from lora_ft.io import templates
from lora_ft.publishing.adapter_facts import Level
from lora_ft.publishing.compatibility import FILES, Verdict
from lora_ft.publishing.training_summary import TrainingSummary
from lora_ft.publishing.verification import Verification

CURVE = "loss.png"
_LONGEST = 300  # characters of a setting
_CLASSIFY = [
    'inputs = tokenizer(["A text.", "Another one."], padding=True, return_tensors="pt").to(model.device)',
    "logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits  # a row for each text",
]


@dataclass(frozen=True)
class CardContents:
    """The adapter's config and record, its base by a public id, and the findings about both.

    `name` is the hub id from which the package is loaded, or a placeholder for a folder. `files` are all file names.
    """

    name: str
    config: dict[str, Any]
    record: dict[str, Any]
    loading: Loading  # path: the base's public id
    license: str | None
    summary: TrainingSummary | None
    verdicts: list[Verdict]
    files: frozenset[str]
    verification: Verification


def render(contents: CardContents) -> str:
    """Return the whole card."""
    config, record, loading, summary = contents.config, contents.record, contents.loading, contents.summary
    base = record.get("base") or {}
    weights, stored = base.get("weights_sha256") or {}, base.get("stored") or {}
    settings = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": config.get("target_modules"),
    }
    if summary:  # r, lora_alpha and target_modules are in PEFT's config
        known = ("adapter.r", "adapter.lora_alpha", "adapter.target_modules")
        settings |= {key: value for key, value in summary.settings.items() if key not in known}
    merge, curve = summary.merge if summary else None, CURVE if CURVE in contents.files else None
    text = _template().render(
        name=contents.name, method=_method(config), base=loading.path, revision=loading.revision, dtype=loading.dtype,
        resized_rows=loading.rows, quant=(record.get("quant") or {}).get("kind", "none"),
        stored=" ".join(str(stored[key]) for key in ("method", "kind") if key in stored), license=contents.license,
        summary=summary, curve=curve, merge=list(_flat(merge)) if merge else [],
        ways=list(_ways(contents)), rank=max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()]),
        verdicts=[v for v in contents.verdicts if v.program != FILES], data_sha256=record.get("data_sha256"),
        settings=settings, packages=record.get("packages") or {}, verification=contents.verification,
        classes=list(loading.classifier.get("id2label", {}).values()),
        is_multi=loading.classifier.get("problem_type") == MULTI_LABEL,
        from_gguf=any(name.endswith(".gguf") for name in weights),
    )  # fmt: skip
    return f"---\n{_front_matter(contents)}\n---\n\n{text}"


def _template() -> jinja2.Template:
    environment = templates.environment(Path(__file__).parent, is_html=False)
    environment.filters |= {"code": code, "cell": _cell, "text": _text, "figure": _figure, "at_most": _at_most,
                            "json": lambda value: json.dumps(value, ensure_ascii=False)}  # fmt: skip
    return environment.get_template("card.md.jinja")


def _method(config: dict[str, Any]) -> str:
    names = [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
    return " with ".join(names) or "LoRA"


def _front_matter(contents: CardContents) -> str:
    base, summary, method = contents.loading.path, contents.summary, _method(contents.config)
    tags = [f"base_model:adapter:{base}", "lora", *method.lower().split(" with "), "transformers"]
    results = list(_evaluations(summary, _task(contents))) if summary and summary.evaluations else None
    data = ModelCardData(
        base_model=base, library_name="peft", pipeline_tag=_task(contents), tags=list(dict.fromkeys(tags)),
        license=contents.license, datasets=[summary.dataset] if summary and summary.dataset else None,
        model_name=f"{base.rpartition('/')[2]}-{method.lower().replace(' ', '-')}" if results else None,
        eval_results=results, base_model_relation="adapter",
    )  # fmt: skip
    return data.to_yaml()


def _task(contents: CardContents) -> str:
    return "text-classification" if contents.loading.classifier else "text-generation"


def _evaluations(summary: TrainingSummary, task: str) -> Iterator[EvalResult]:
    """Yield the last evaluation in the hub's schema."""
    for name, value in summary.evaluations[-1].adapter.items():
        yield EvalResult(
            task_type=task, dataset_type=summary.dataset or "private", dataset_name="evaluation rows",
            dataset_config=summary.dataset_config, dataset_split=summary.dataset_split,
            dataset_revision=summary.dataset_revision, metric_type=name, metric_name=name,
            metric_value=float(f"{value:.6g}"),
        )  # fmt: skip


def _ways(contents: CardContents) -> Iterator[tuple[str, str, list[str]]]:
    """Yield program, language and lines of code for each program that can load the adapter."""
    verdicts = {verdict.program: verdict for verdict in contents.verdicts}
    loading, name = contents.loading, contents.name
    classes = [loading.auto_class, "AutoTokenizer", *(["BitsAndBytesConfig"] if loading.quantization else [])]
    rank_flag = "".join(verdicts["vLLM"].reason.partition("--max-lora-rank ")[1:])
    ways = {
        "PEFT": ("python", ["import torch", "from peft import PeftModel",
                            f"from transformers import {', '.join(classes)}",
                            "", *loading.lines(name), f"tokenizer = AutoTokenizer.from_pretrained({name!r})"]),
        "transformers": ("python", [
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})  # finds the base by the adapter's config",
        ]),
        "vLLM": ("bash", [" ".join(filter(None, (
            f"vllm serve {loading.path} --enable-lora", rank_flag, f"--lora-modules adapter={name}")))]),
    }  # fmt: skip
    if "adapter.gguf" in contents.files:
        ways["llama.cpp"] = ("bash", ["llama-cli -m BASE.gguf --lora adapter.gguf  # a GGUF file of the base"])
    if "mlx/adapters.safetensors" in contents.files:
        ways["MLX"] = ("bash", [f"mlx_lm.generate --model {loading.path} --adapter-path mlx --prompt '...'"])
    if loading.classifier:
        ways = {"PEFT": (ways["PEFT"][0], [*ways["PEFT"][1], "", *_CLASSIFY])}
    for program, (language, lines) in ways.items():
        if verdicts[program].level is not Level.REFUSED:
            yield program, language, lines


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "infinite"


def _at_most(distance: float) -> str:
    """Round up to a power of ten, because smaller digits differ from machine to machine."""
    return f"1e{math.ceil(math.log10(max(distance, 1e-7))):+03d}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), f"{value:.6g}" if isinstance(value, float) else value


def _text(text: str) -> str:
    """Escape the Markdown in a text for a table cell."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|" else c for c in text)


def _cell(value: Any) -> str:
    return code(value).replace("|", "\\|")  # a bar ends a cell, even in code


def code(value: Any) -> str:
    """Return any text as a code span of one line, of at most _LONGEST characters."""
    line = "".join(c if c.isprintable() else " " for c in str(value)).strip() or " "
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in line).split()), default=0)
    fence = "`" * (longest + 1)
    pad = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{pad}{line}{pad}{fence}"
