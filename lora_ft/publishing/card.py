"""The model card, README.md: front matter that the hub accepts, and what a user of the adapter has to know.

    ---
    base_model: HuggingFaceTB/SmolLM2-135M-Instruct       ids only, never a path of this machine
    model-index: ...                                      held-out results
    ---
    # LoRA for SmolLM2-135M-Instruct
    ## Results | ## Load it | ## Training | ## Limits | ## Proof

Every text that is not ours (names, settings, metrics) is shown as code, so that nothing in it is Markdown or HTML;
the front matter is written by a YAML library. The same adapter gives the same bytes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lora_ft import config
from lora_ft.adapters.provenance import Loading
from lora_ft.publishing.facts import Level
from lora_ft.publishing.lint import FILES, Verdict
from lora_ft.publishing.proof import Proof
from lora_ft.publishing.story import Scores, Story

CURVE = "loss.png"
_LONGEST = 300  # characters of a setting


@dataclass(frozen=True)
class Subject:
    """What a card is about: the adapter's config and record, its base by a public id, and what was found of both.

    `name` is by what the package is loaded: its hub id, or a folder's placeholder. `extras` are the names of all files.
    """

    name: str
    config: dict[str, Any]
    record: dict[str, Any]
    loading: Loading  # place: the base's public id
    license: str | None
    story: Story | None
    verdicts: list[Verdict]
    files: frozenset[str]
    proof: Proof


def render(about: Subject) -> str:
    """The whole card."""
    sections = [_head(about), _results(about), _load(about), _training(about), _limits(about), _proof(about)]
    return (
        f"---\n{_front(about)}\n---\n\n"
        + "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)
        + "\n"
    )


def _method(about: Subject) -> str:
    names = [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if about.config.get(key)]
    return " with ".join(names) or "LoRA"


def _front(about: Subject) -> str:
    base, story = about.loading.place, about.story
    tags = [f"base_model:adapter:{base}", "lora", *_method(about).lower().split(" with "), "transformers"]
    data = ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", tags=list(dict.fromkeys(tags)),
        license=about.license, datasets=[story.dataset] if story and story.dataset else None,
        model_name=f"{base.rpartition('/')[2]}-{_method(about).lower().replace(' ', '-')}",
        eval_results=list(_evaluations(story)) if story and story.heldout else None,
        base_model_relation="adapter",
    )  # fmt: skip
    if not data.eval_results:
        data.model_name = None
    return data.to_yaml()


def _evaluations(story: Story) -> Iterator[EvalResult]:
    """The last of the held-out results, in the hub's schema."""
    last = story.heldout[-1]
    for name, value in last.adapter.items():
        yield EvalResult(
            task_type="text-generation", dataset_type=story.dataset or "private", dataset_name="held-out rows",
            dataset_config=story.dataset_config, dataset_split=story.dataset_split,
            dataset_revision=story.dataset_revision, metric_type=name, metric_name=name,
            metric_value=_rounded(value),
        )  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _head(about: Subject) -> Iterator[str]:
    quant = about.record.get("quant") or {}
    base, kind = about.loading.place, quant.get("kind", "none")
    on = "" if kind == "none" else f", which was quantized to {kind} while it trained"
    yield f"# {_method(about)} adapter for {code(base)}"
    yield ""
    revision = about.loading.revision
    at = f" at commit {code(revision)}" if revision else ""
    yield f"An adapter ({_method(about)}) in PEFT's format for the base model {code(base)}{at}{on}."
    if about.license:
        yield f"License: {code(about.license)}; the base's own terms hold as well."


def _results(about: Subject) -> Iterator[str]:
    if not about.story or not (about.story.heldout or about.story.merge or CURVE in about.files):
        return
    yield "## Results"
    for scores in about.story.heldout:
        yield from ("", f"On rows that were held out, {scores.when} ({_counted(scores)}):", "")
        yield from _table(("", "base", "adapter"), [
            (code(name), _figure(scores.base.get(name)), _figure(value)) for name, value in scores.adapter.items()
        ])  # fmt: skip
    if CURVE in about.files:
        yield from ("", f"![loss by step]({CURVE})")
    if about.story.merge:
        yield from ("", "Merged into its base and measured on held-out rows:", "")
        yield from _table(("", ""), [(code(k), code(v)) for k, v in _flat(about.story.merge)])


def _counted(scores: Scores) -> str:
    return f"{scores.tokens:,} tokens" + (f" of {scores.rows:,} rows" if scores.rows is not None else "")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "infinite"


def _load(about: Subject) -> Iterator[str]:
    yield "## Load it"
    levels = {verdict.consumer: verdict for verdict in about.verdicts}
    base, name = about.loading.place, about.name
    imported = [
        "AutoModelForCausalLM",
        "AutoTokenizer",
        *(["BitsAndBytesConfig"] if about.loading.quantization else []),
    ]
    python = ["import torch", "from peft import PeftModel", f"from transformers import {', '.join(imported)}", "",
              *about.loading.lines(name), f"tokenizer = AutoTokenizer.from_pretrained({name!r})"]  # fmt: skip
    ways: list[tuple[str, str, list[str]]] = [("PEFT", "python", python)]
    direct = [f"model = AutoModelForCausalLM.from_pretrained({name!r})  # finds the base by the adapter's config"]
    ways.append(("transformers", "python", ["from transformers import AutoModelForCausalLM", *direct]))
    rank = max([about.config.get("r", 0), *(about.config.get("rank_pattern") or {}).values()])
    flag = levels["vLLM"].reason.rpartition("--max-lora-rank ")[2] if "--max-lora-rank" in levels["vLLM"].reason else ""
    ranks = f" --max-lora-rank {flag}" if flag else ""
    ways.append(("vLLM", "bash", [f"vllm serve {base} --enable-lora{ranks} --lora-modules adapter={name}"]))
    if "adapter.gguf" in about.files:
        ways.append(("llama.cpp", "bash", ["llama-cli -m BASE.gguf --lora adapter.gguf  # a GGUF file of the base"]))
    if "mlx/adapters.safetensors" in about.files:
        ways.append(("MLX", "bash", [f"mlx_lm.generate --model {base} --adapter-path mlx --prompt '...'"]))
    for consumer, language, lines in ways:
        if levels[consumer].level is not Level.REFUSED:
            yield from ("", f"With {consumer}:", "", f"```{language}", *lines, "```")
    yield from ("", f"Rank {rank}. Who can load it, by what their sources say:", "")
    yield from _table(("consumer", "", "why", "what helps"), [
        (v.consumer, v.level.name, text(v.reason), text(v.remedy)) for v in about.verdicts if v.consumer != FILES
    ])  # fmt: skip


def _training(about: Subject) -> Iterator[str]:
    yield "## Training"
    yield ""
    story, saved = about.story, about.config
    if story:
        counted = f", {story.rows[0]:,} of its rows trained on and {story.rows[1]:,} held out" if story.rows else ""
        yield f"Rows: {code(story.data)}{counted}."
        if story.steps:
            tokens = f" over {story.tokens:,} tokens" if story.tokens else ""
            yield f"Optimizer steps: {story.steps:,}{tokens}."
    else:
        yield "The adapter was made elsewhere: of its training no more is known than its files say."
    if sha256 := about.record.get("data_sha256"):
        yield f"sha256 of all token ids and masks: {code(sha256)}."
    targets = saved.get("target_modules")
    given = {"r": saved.get("r"), "lora_alpha": saved.get("lora_alpha"), "target_modules": targets}
    yield ""
    yield from _table(("setting", "value"), [(code(k), code(_json(v))) for k, v in (given | _told(story)).items()])
    yield ""
    versions = about.record.get("packages") or {}
    yield "Versions: " + (", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown") + "."


def _told(story: Story | None) -> dict[str, Any]:
    """Settings that differ from the defaults; r, alpha and targets are PEFT's own above."""
    known = ("adapter.r", "adapter.alpha", "adapter.targets")
    return {key: value for key, value in story.settings.items() if key not in known} if story else {}


def _limits(about: Subject) -> Iterator[str]:
    yield "## Limits"
    yield ""
    record, base = about.record, about.loading.place
    kind = (record.get("quant") or {}).get("kind", "none")
    yield f"- It is a difference from one base: on any other than {code(base)} it means nothing."
    if not about.loading.revision:
        yield "- The base's commit is not recorded; hashes of the weights that it was trained on are in `lora_ft.json`."
    if _from_gguf(about):
        yield ("- It was trained on the weights of a GGUF file of the base, which are rounded: on the base's own it "
               "computes slightly otherwise.")  # fmt: skip
    if kind != config.QuantKind.none.value:
        yield (f"- The base was quantized to {kind} while it trained. On the unquantized base it computes slightly "
               "otherwise, and merged into it, too: `lora-ft merge` measures both.")  # fmt: skip
    if about.loading.rows:
        yield f"- It has tokens that the base lacks: its embedding is resized to {about.loading.rows} rows first."
    yield "- It keeps what the base knows, says and gets wrong, but for what the rows above taught it."


def _from_gguf(about: Subject) -> bool:
    return any(name.endswith(".gguf") for name in (about.record.get("base") or {}).get("weights_sha256") or {})


def _proof(about: Subject) -> Iterator[str]:
    proof = about.proof
    yield "## Proof"
    yield ""
    packages = ", ".join(f"{name} {version}" for name, version in sorted(proof.versions.items()))
    rounded = " (the weights of the GGUF file)" if _from_gguf(about) else ""
    yield f"A fresh process loaded these files with PEFT alone ({packages}) onto the base{rounded}:"
    yield ""
    moved = proof.outputs - proof.zero_outputs
    yield f"- all {proof.keys} tensors were found, and no other; {moved} of {proof.outputs} matrices B are not zero;"
    if proof.distance is not None:
        yield (f"- its logits on `probe.safetensors` lie within {_at_most(proof.distance)} of the trained model's, as "
               f"a share of these; {proof.allowed:.1e} is allowed in {about.loading.dtype};")  # fmt: skip
    yield f"- the adapter moves its base's logits by {proof.effect:.2g}, in the same measure."
    yield ""
    yield "`SHA256SUMS` lists every file; `sha256sum -c SHA256SUMS` checks them. To prove it again:"
    yield ""
    yield from ("```bash", f"lora-ft publish verify_only=true adapter_path={about.name}", "```")


def _at_most(distance: float) -> str:
    """The next power of ten: what lies below it differs from machine to machine."""
    return f"1e{math.ceil(math.log10(max(distance, 1e-7))):+03d}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flat(child, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), f"{value:.6g}" if isinstance(value, float) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        cells = (cell.replace("|", "\\|") for cell in row)  # a bar ends a cell, in code, too
        yield f"| {' | '.join(cells)} |"


def text(words: str) -> str:
    """Words of our own as Markdown text: nothing in them is markup."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#" else c for c in words)


def code(value: Any) -> str:
    """Anybody's text as a code span of one line, cut where it is long."""
    line = "".join(c if c.isprintable() else " " for c in str(value)).strip() or " "
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in line).split()), default=0)
    fence = "`" * (longest + 1)
    pad = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{pad}{line}{pad}{fence}"
