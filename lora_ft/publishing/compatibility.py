"""Programs that can load an adapter: one verdict for each, with the reason and a remedy.

    program        verdict   reason
    PEFT           OK        0.14.0 or newer, according to the keys of its config
    vLLM           WARN      rank 64 is above its default of 16: start it with --max-lora-rank 64
    Ollama         REFUSED   loads no adapters since 0.34.1              remedy: merge it: lora-ft merge ... gguf=q8_0

The check reads an adapter folder and, if it is known, the config of its base; no program is run. To support another
program, add it to PROGRAMS and its limits to _RULES.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lora_ft.classes import SEQ_CLS
from lora_ft.errors import ConfigError
from lora_ft.export.gguf.layout import layout_of
from lora_ft.export.merge import hindrance
from lora_ft.models import families
from lora_ft.publishing import adapter_checks, adapter_facts
from lora_ft.publishing.adapter_facts import AdapterFacts, Level

FILES = "the files"
PROGRAMS = ("PEFT", "transformers", "vLLM", "SGLang", "llama.cpp", "Ollama", "MLX")

_MERGE = "merge it: lora-ft merge"
_MERGE_GGUF = "merge it: lora-ft merge ... gguf=q8_0"
_REWRITE = "publish it (to=dir:FOLDER), which writes the names of PEFT"
_CONVERT = (
    "publish it with its initial matrices beside it (pissa_changed_base, ...), or convert it to a plain LoRA "
    "(PEFT: path_initial_model_for_weight_conversion)"
)

# Programs that take adapters of language models only; what to do with one of a classifier.
_ONLY_TEXT = {"SGLang": "merge it, and serve the folder: lora-ft merge", "llama.cpp": "", "Ollama": "", "MLX": ""}

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_UNCHANGED_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_HEADS, _EMBEDDINGS = ("lm_head", "embed_out"), ("embed_tokens", "wte", "embed_in")

# The first release x.y.0 of PEFT whose LoraConfig has a key; "init" is init_lora_weights.
_SINCE = {
    (0, 6): ("rank_pattern", "alpha_pattern"),
    (0, 7): ("loftq_config", "megatron_config", "megatron_core", "init=gaussian", "init=loftq"),
    (0, 8): ("use_rslora",),
    (0, 9): ("use_dora",),
    (0, 10): ("layer_replication",),
    (0, 11): ("init=pissa",),
    (0, 12): ("init=olora",),
    (0, 14): ("eva_config", "exclude_modules", "lora_bias", "init=eva"),
    (0, 15): ("corda_config", "trainable_token_indices", "init=corda"),
    (0, 16): ("use_qalora", "qalora_group_size", "init=orthogonal"),
    (0, 18): ("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "peft_version"),
    (0, 19): ("target_parameters", "lora_ga_config", "use_bdlora", "init=lora_ga"),  # 0.17 laid out A and B otherwise
    (0, 20): ("monteclora_config", "velora_config", "init=mica"),
    (0, 21): ("kasa_config",),
}
_TOLERANT = (0, 14)  # since this release PEFT drops unknown keys with a warning; before, it raises (peft 2038)
_FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}
_DESCRIPTIVE = ("peft_version", "qalora_group_size")  # the result does not depend on these keys


_Reason = Callable[[AdapterFacts], str | None]  # describes the limit that an adapter exceeds; None if it exceeds none


@dataclass(frozen=True)
class Verdict:
    """The result for one program, or a fault of the files; `remedy` is empty if nothing can be done."""

    program: str
    level: Level
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class _Rule:
    """A limit of one program, and what to do if an adapter exceeds it."""

    program: str
    level: Level
    reason: _Reason
    remedy: str


def verdicts(folder: Path, base_config: dict[str, Any] | None) -> list[Verdict]:
    """Return the faults of the files of an adapter folder, then one verdict for each of PROGRAMS.

    `base_config` is the base's config.json; rules that need it are skipped without it. The content of the files never
    makes this function raise.
    """
    facts = adapter_facts.read(folder, base_config)
    faults = [Verdict(FILES, f.level, f.reason, f.remedy) for f in adapter_checks.check(folder, facts)]
    is_broken = any(fault.level is Level.REFUSED for fault in faults)
    merging = {remedy: _merging(facts, remedy, is_broken) for remedy in (_MERGE, _MERGE_GGUF)}
    return [*faults, *(_verdict(program, facts, merging) for program in PROGRAMS)]


def is_unusable(found: list[Verdict]) -> bool:
    """Return True if the files are broken or no program can load them."""
    refused = {v.program for v in found if v.level is Level.REFUSED}
    return FILES in refused or refused.issuperset(PROGRAMS)


def _merging(facts: AdapterFacts, remedy: str, is_broken: bool) -> str:
    """Return the advice to merge, or another one for an adapter that `merge` refuses."""
    if is_broken:
        return "repair the files first"
    if facts.saved and (found := hindrance(facts.saved)):
        return f"{found[1]} (lora-ft merge refuses {found[0].partition(':')[0]})"
    if _more_tokens(facts) and not (facts.rows or facts.has_tokens):
        return "load it with PEFT, after base.resize_token_embeddings"
    if remedy == _MERGE_GGUF and facts.base_config:
        try:
            layout_of(facts.base_config)
        except ConfigError:
            return f"{_MERGE}, and convert the result with a program of llama.cpp (gguf= does not write this base)"
    return remedy


def _verdict(program: str, facts: AdapterFacts, merging: dict[str, str]) -> Verdict:
    """Return the worst level among the rules of a program, with all reasons of that level."""
    if not facts.config or not (facts.layers or facts.whole):
        return Verdict(program, Level.REFUSED, "there is no adapter that can be read")
    if program in _ONLY_TEXT and _is_classifier(facts):
        return Verdict(program, Level.REFUSED, "it runs language models, and this is a classifier", _ONLY_TEXT[program])
    hits = [(rule, reason) for rule in _RULES if rule.program == program and (reason := rule.reason(facts))]
    worst = max((rule.level for rule, _ in hits), default=Level.OK)
    if worst is Level.OK:
        return Verdict(program, worst, _requirement(program, facts))
    reasons = "; ".join(reason for rule, reason in hits if rule.level is worst)
    remedies = dict.fromkeys(rule.remedy for rule, _ in hits if rule.level is worst and rule.remedy)
    return Verdict(program, worst, reasons, "; ".join(merging.get(remedy, remedy) for remedy in remedies))


def _requirement(program: str, facts: AdapterFacts) -> str:
    """Return the condition under which a program without objections loads the adapter."""
    match program:
        case "PEFT":
            return f"{minimum_peft(facts.config)} or newer, according to the keys of its config"
        case "llama.cpp":
            return "adapter.gguf" if "adapter.gguf" in facts.names else "after conversion: publish with formats=[gguf]"
        case "MLX":
            is_converted = "mlx/adapters.safetensors" in facts.names
            return "the folder mlx" if is_converted else "after conversion: publish with formats=[mlx]"
    return "no conversion needed"


def minimum_peft(config: dict[str, Any]) -> str:
    """Return the first release of PEFT that accepts a config's keys and supports what they ask for."""
    since = {key: release for release, keys in _SINCE.items() for key in keys}
    init = config.get("init_lora_weights")
    wanted = [since.get(f"init={init.partition('_niter')[0]}", (0, 5))] if isinstance(init, str) else []
    for key, value in config.items():
        release = since.get(key, (0, 5) if key in _FIELDS else _TOLERANT)
        wanted.append(release if value and key not in _DESCRIPTIVE else min(release, _TOLERANT))
    return "{}.{}.0".format(*max(wanted, default=(0, 5)))


def _feature(name: str, holds: Callable[[AdapterFacts], Any]) -> _Reason:
    return lambda facts: name if holds(facts) else None


_dora = _feature("DoRA", lambda f: f.config.get("use_dora"))
_saved = _feature("layers trained in full (modules_to_save)", lambda f: f.config.get("modules_to_save") or
                  (f.whole and f.config.get("bias", "none") == "none"))  # fmt: skip
_biases = _feature(
    "biases", lambda f: f.config.get("bias", "none") != "none" or f.config.get("lora_bias") or f.has_biases
)
_tokens = _feature("trained rows of tokens", lambda f: f.has_tokens or f.config.get("trainable_token_indices"))
_activated = _feature("activated LoRA", lambda f: f.config.get("alora_invocation_tokens"))
_tied_head = _feature(
    "the head is adapted, and shares its matrix with the embedding", lambda f: f.is_tied and f.adapts(*_HEADS)
)
_tied_ends = _feature("embedding or head are adapted, and share one matrix",
                      lambda f: f.is_tied and f.adapts(*_HEADS, *_EMBEDDINGS))  # fmt: skip
_varying = _feature("ranks or alphas that differ between layers",
                    lambda f: f.config.get("rank_pattern") or f.config.get("alpha_pattern"))  # fmt: skip


def _changed_base(facts: AdapterFacts) -> str | None:
    init = facts.config.get("init_lora_weights")
    keeps_base = not isinstance(init, str) or init in _UNCHANGED_INITS
    return None if keeps_base else f"init_lora_weights={str(init)[:40]} changed the base during training"


def _rare(facts: AdapterFacts) -> str | None:
    names = [n for n in ("layer_replication", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config",
                         "velora_config", "kasa_config") if facts.config.get(n)]  # fmt: skip
    return f"{', '.join(names)} in its config" if names else None


_parameters = _feature("adapted parameters (target_parameters), such as experts",
                       lambda f: f.config.get("target_parameters"))  # fmt: skip


def _missing_layer(facts: AdapterFacts) -> str | None:
    targets = facts.config.get("target_modules")
    missing = [t for t in map(str, targets) if not facts.has_layer(t)] if isinstance(targets, list) else []
    return f"the base has no layer {missing[0]}, which target_modules names" if missing and facts.base_shapes else None


def _is_classifier(facts: AdapterFacts) -> bool:
    return facts.config.get("task_type") == SEQ_CLS


def _vllm_head(facts: AdapterFacts) -> str | None:
    if not _is_classifier(facts):
        return None
    return "it compares the head with that of the model it serves, so the base must be a classifier of as many classes"


def _vllm_rank(facts: AdapterFacts) -> str | None:
    allowed = next((r for r in _VLLM_RANKS if r >= facts.rank), None)
    if allowed is None or allowed <= 16:
        return None
    return f"rank {facts.rank} is above its default of 16: start it with --max-lora-rank {allowed}"


def _vllm_saved(facts: AdapterFacts) -> str | None:
    saved = facts.config.get("modules_to_save")
    names = {str(name) for name in saved} if isinstance(saved, list) else {str(saved)} - {"None"}
    whole = {key for key in facts.whole if not any(f".{name}." in f".{key}" for name in names)}
    return _saved(facts) if whole or names - {"classifier", "score"} else None


def _renamed(facts: AdapterFacts) -> str | None:
    return f"it would not find {facts.renamed}" if facts.renamed else None


def _more_tokens(facts: AdapterFacts) -> str | None:
    rows = facts.base_config.get("vocab_size")
    if not isinstance(rows, int) or facts.num_tokens is None or facts.num_tokens <= rows:
        return None
    return f"its tokenizer has {facts.num_tokens} tokens, the base has {rows} embedding rows"


def _resize(facts: AdapterFacts) -> str | None:
    if facts.rows and facts.rows != facts.base_config.get("vocab_size"):
        return f"its embedding has {facts.rows} rows: base.resize_token_embeddings({facts.rows}) first"
    more = _more_tokens(facts)
    return more and f"{more}: base.resize_token_embeddings({facts.num_tokens}, mean_resizing=False) first"


def _no_writer(rows: tuple[families.Family, ...]) -> _Reason:
    def reason(facts: AdapterFacts) -> str | None:
        is_known = facts.architecture is None or facts.architecture in {row.model_type for row in rows}
        return None if is_known else f"lora-ft cannot write its format for bases of type {facts.architecture}"

    return reason


def _upstream_gguf(facts: AdapterFacts) -> str | None:
    if "adapter.gguf" in facts.names:
        return None
    wrong = [feature for feature, holds in (
        ("rsLoRA's scale", facts.config.get("use_rslora")), ("alpha_pattern", facts.config.get("alpha_pattern")),
        ("GPT-2's layout", facts.architecture == "gpt2")) if holds]  # fmt: skip
    return f"its own convert_lora_to_gguf.py converts {' and '.join(wrong)} incorrectly" if wrong else None


def _rules(programs: str, level: Level, remedy: str, *reasons: _Reason) -> tuple[_Rule, ...]:
    return tuple(_Rule(program, level, reason, remedy) for program in programs.split(", ") for reason in reasons)


# The comment above a rule names the source code or issue it follows. A question mark: inferred, the code was not read.
_RULES = (
    # peft 0.21.2, tuners/lora/model.py, subtract_mutated_init
    *_rules("PEFT, transformers", Level.WARN, _CONVERT, _changed_base),
    *_rules("vLLM, SGLang, llama.cpp, MLX", Level.REFUSED, _CONVERT, _changed_base),
    # peft 0.21.2, utils/save_and_load.py; transformers 5.23, integrations/peft.py; names as stored are looked up
    *_rules("PEFT, transformers, vLLM, SGLang", Level.REFUSED, _REWRITE, _renamed),
    # peft 0.21.2, tuners/trainable_tokens
    *_rules("PEFT, transformers", Level.WARN, "", _resize),
    # peft issue 2018
    *_rules("PEFT", Level.WARN, "train without it: a merge applies the change twice or not at all", _tied_head),
    # transformers 5.23, integrations/peft.py: reads A and B only
    *_rules("transformers", Level.REFUSED, "load it with PEFT", _dora, _saved, _biases, _tokens, _activated),
    # vLLM 0.32, vllm/lora/peft_helper.py; peft issue 2018; rows for an adapter's tokens?
    *_rules("vLLM", Level.REFUSED, _MERGE, _dora, _biases, _vllm_saved, _activated, _rare, _tokens, _tied_head,
            _more_tokens),
    # vLLM pull requests 41384, 52194: some models drop them without a word, others stop at their shapes?
    *_rules("vLLM", Level.REFUSED, _MERGE, _parameters),
    *_rules("vLLM", Level.REFUSED, "remove it from target_modules", _missing_layer),
    # vLLM 0.32, model_executor/models/gpt2.py: no SupportsLoRA
    *_rules("vLLM", Level.REFUSED, _MERGE, _feature("no LoRA for GPT-2", lambda f: f.architecture == "gpt2")),
    # vLLM 0.32, vllm/config/lora.py
    *_rules("vLLM", Level.REFUSED, "lora-ft merge truncate_rank=512",
            _feature("a rank above 512", lambda f: f.rank > _VLLM_RANKS[-1])),
    *_rules("vLLM", Level.WARN, "", _vllm_rank),
    # vLLM pull request 53555 (merged), which loads score and classifier of modules_to_save; 57766 lifts it (open)
    *_rules("vLLM", Level.WARN, "merge it, and serve the folder: lora-ft merge", _vllm_head),
    # SGLang 0.5.23, srt/lora?
    *_rules("SGLang", Level.REFUSED, _MERGE, _dora, _saved, _biases, _tokens, _activated, _rare, _parameters,
            _more_tokens),
    *_rules("SGLang", Level.WARN, "SGLang 0.5.23 or newer", _varying),
    # llama.cpp b10605, src/llama-adapter.cpp
    *_rules("llama.cpp", Level.REFUSED, _MERGE_GGUF, _dora, _saved, _biases, _tokens, _activated, _rare, _tied_ends,
            _no_writer(families.FAMILIES), _more_tokens),
    # llama.cpp b10605, convert_lora_to_gguf.py, compared with PEFT
    *_rules("llama.cpp", Level.WARN, "publish with formats=[gguf], which converts it correctly", _upstream_gguf),
    # ollama pull request 14969
    *_rules("Ollama", Level.REFUSED, _MERGE_GGUF, _feature("loads no adapters since 0.34.1", lambda f: True)),
    # mlx-lm 0.32.2, mlx_lm/tuner/utils.py
    *_rules("MLX", Level.REFUSED, _MERGE, _saved, _biases, _tokens, _activated, _rare, _parameters,
            _tied_ends, _no_writer(families.MLX), _more_tokens),
)  # fmt: skip
