"""Programs that can load an adapter: one verdict for each, with the reason and a remedy.

    program        verdict   reason
    PEFT           OK        0.14.0 or newer
    vLLM           WARN      rank 64 is above its default of 16: start it with --max-lora-rank 64
    Ollama         REFUSED   loads no adapters since 0.34.1: merge, lora-ft merge ... gguf=q8_0

This works on any adapter folder, and reads nothing else but the config of the base if it is known. Each rule names the
source code or issue of the program that it follows; no program is run. A question mark behind a source means that the
rule was inferred from other rules and that source was not read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.publishing import adapter_checks, adapter_facts
from lora_ft.publishing.adapter_facts import AdapterFacts, Level

FILES = "the files"
PROGRAMS = ("PEFT", "transformers", "vLLM", "SGLang", "llama.cpp", "Ollama", "MLX")

_MERGE = "merge it: lora-ft merge"
_MERGE_GGUF = "merge it: lora-ft merge ... gguf=q8_0"
_CONVERT = (
    "publish it with its initial matrices beside it (pissa_changed_base, ...), or convert it to a plain LoRA "
    "(PEFT: path_initial_model_for_weight_conversion)"
)
_VLLM = "vLLM 0.32, vllm/lora/peft_helper.py"
_LLAMA = "llama.cpp b10605, src/llama-adapter.cpp"
_MLX = "mlx-lm 0.32.2, mlx_lm/tuner/utils.py"

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # gguf_adapter and mlx write these
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
    (0, 17): ("target_parameters",),
    (0, 18): ("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "peft_version"),
    (0, 19): ("lora_ga_config", "use_bdlora", "init=lora_ga"),
    (0, 20): ("monteclora_config", "velora_config", "init=mica"),
    (0, 21): ("kasa_config",),
}
_TOLERANT = (0, 14)  # since this release PEFT drops unknown keys with a warning; before, it raises (peft 2038)
_DESCRIPTIVE = ("peft_version", "qalora_group_size")  # the result does not depend on these keys


_Reason = Callable[[AdapterFacts], str | None]


@dataclass(frozen=True)
class Verdict:
    """The result for one program; `source` names the code or issue it follows."""

    program: str
    level: Level
    reason: str
    remedy: str = ""
    source: str = ""


@dataclass(frozen=True)
class _Rule:
    """A limit of one program: `reason` describes it for an adapter, or returns None if the adapter stays within it."""

    program: str
    level: Level
    reason: _Reason
    remedy: str
    source: str


def verdicts(folder: Path, base_config: dict[str, Any] | None) -> list[Verdict]:
    """Return the faults of the files of an adapter folder, then one verdict for each of PROGRAMS.

    `base_config` is the base's config.json; rules that need it are skipped without it. The content of the files never
    makes this function raise.
    """
    found = adapter_facts.read(folder, base_config)
    faults = [Verdict(FILES, f.level, f.reason, f.remedy) for f in adapter_checks.check(folder, found)]
    return [*faults, *(_verdict(program, found) for program in PROGRAMS)]


def is_unusable(found: list[Verdict]) -> bool:
    """Return whether the files are broken or no program can load them."""
    refused = {v.program for v in found if v.level is Level.REFUSED}
    return FILES in refused or refused.issuperset(PROGRAMS)


def _verdict(program: str, found: AdapterFacts) -> Verdict:
    """Return the worst level among the rules of a program, with all reasons of that level."""
    if not found.config or not (found.layers or found.whole):
        return Verdict(program, Level.REFUSED, "there is no adapter that can be read")
    hits = [(rule, reason) for rule in _RULES if rule.program == program and (reason := rule.reason(found))]
    worst = max((rule.level for rule, _ in hits), default=Level.OK)
    chosen = [(rule, reason) for rule, reason in hits if rule.level is worst]
    if worst is Level.OK:
        return Verdict(program, worst, _requirement(program, found))
    remedies, sources = ([*dict.fromkeys(getattr(rule, part) for rule, _ in chosen)] for part in ("remedy", "source"))
    return Verdict(program, worst, "; ".join(reason for _, reason in chosen), "; ".join(filter(None, remedies)),
                   "; ".join(sources))  # fmt: skip


def _requirement(program: str, found: AdapterFacts) -> str:
    """Return the condition under which a program without objections loads the adapter."""
    match program:
        case "PEFT":
            return f"{minimum_peft(found.config)} or newer, according to the keys of its config"
        case "llama.cpp":
            return "adapter.gguf" if "adapter.gguf" in found.names else "after conversion: publish with formats=[gguf]"
        case "MLX":
            there = "mlx/adapters.safetensors" in found.names
            return "the folder mlx" if there else "after conversion: publish with formats=[mlx]"
    return "as it is"


def minimum_peft(config: dict[str, Any]) -> str:
    """Return the first release of PEFT that accepts a config's keys and supports what they ask for."""
    since = {key: release for release, keys in _SINCE.items() for key in keys}
    init = config.get("init_lora_weights")
    wanted = [since.get(f"init={init.partition('_niter')[0]}", (0, 5))] if isinstance(init, str) else []
    for key, value in config.items():
        release = since.get(key, (0, 5))
        wanted.append(release if value and key not in _DESCRIPTIVE else min(release, _TOLERANT))
    return "{}.{}.0".format(*max(wanted, default=(0, 5)))


def _feature(name: str, holds: Callable[[AdapterFacts], Any]) -> _Reason:
    return lambda found: name if holds(found) else None


def _has(key: str) -> Callable[[AdapterFacts], Any]:
    return lambda found: found.config.get(key)


_dora = _feature("DoRA", _has("use_dora"))
_saved = _feature("layers trained in full (modules_to_save)", lambda f: f.config.get("modules_to_save") or
               (f.whole and f.config.get("bias", "none") == "none"))  # fmt: skip
_biases = _feature(
    "biases", lambda f: f.config.get("bias", "none") != "none" or f.config.get("lora_bias") or f.has_biases
)
_tokens = _feature("trained rows of tokens", lambda f: f.has_tokens or f.config.get("trainable_token_indices"))
_activated = _feature("activated LoRA", _has("alora_invocation_tokens"))
_tied_head = _feature(
    "the head is adapted, and shares its matrix with the embedding", lambda f: f.is_tied and f.adapts(*_HEADS)
)
_tied_ends = _feature("embedding or head are adapted, and share one matrix",
              lambda f: f.is_tied and f.adapts(*_HEADS, *_EMBEDDINGS))  # fmt: skip
_varying = _feature("ranks or alphas that differ between layers",
                lambda f: f.config.get("rank_pattern") or f.config.get("alpha_pattern"))  # fmt: skip


def _changed_base(found: AdapterFacts) -> str | None:
    init = found.config.get("init_lora_weights")
    keeps_base = not isinstance(init, str) or init in _VLLM_INITS
    return None if keeps_base else f"init_lora_weights={str(init)[:40]} changed the base during training"


def _rare(found: AdapterFacts) -> str | None:
    names = [n for n in ("layer_replication", "use_qalora", "use_bdlora", "target_parameters", "arrow_config",
                         "monteclora_config", "velora_config", "kasa_config") if found.config.get(n)]  # fmt: skip
    return f"{', '.join(names)} in its config" if names else None


def _missing_layer(found: AdapterFacts) -> str | None:
    targets = found.config.get("target_modules")
    missing = [t for t in map(str, targets) if not found.has_layer(t)] if isinstance(targets, list) else []
    return f"the base has no layer {missing[0]}, which target_modules names" if missing and found.base_shapes else None


def _vllm_rank(found: AdapterFacts) -> str | None:
    allowed = next((r for r in _VLLM_RANKS if r >= found.rank), None)
    if allowed is None or allowed <= 16:
        return None
    return f"rank {found.rank} is above its default of 16: start it with --max-lora-rank {allowed}"


def _vllm_saved(found: AdapterFacts) -> str | None:
    saved = found.config.get("modules_to_save")
    names = {str(name) for name in saved} if isinstance(saved, list) else {str(saved)} - {"None"}
    whole = {key for key in found.whole if not any(f".{name}." in f".{key}" for name in names)}
    return _saved(found) if whole or names - {"classifier", "score"} else None


def _more_tokens(found: AdapterFacts) -> str | None:
    rows = found.base_config.get("vocab_size")
    if not isinstance(rows, int) or found.num_tokens is None or found.num_tokens <= rows:
        return None
    return f"its tokenizer has {found.num_tokens} tokens, the base has {rows} embedding rows"


def _resize(found: AdapterFacts) -> str | None:
    more = _more_tokens(found)
    return more and f"{more}: base.resize_token_embeddings({found.num_tokens}, mean_resizing=False) first"


def _no_writer(found: AdapterFacts) -> str | None:
    known = found.architecture is None or found.architecture in _FAMILIES
    return None if known else f"no writer for bases of architecture {found.architecture}"


def _upstream_gguf(found: AdapterFacts) -> str | None:
    if "adapter.gguf" in found.names:
        return None
    wrong = [what for what, holds in (
        ("rsLoRA's scale", found.config.get("use_rslora")), ("alpha_pattern", found.config.get("alpha_pattern")),
        ("GPT-2's layout", found.architecture == "gpt2")) if holds]  # fmt: skip
    return f"its own convert_lora_to_gguf.py converts {' and '.join(wrong)} incorrectly" if wrong else None


def _rules(program: str, source: str, remedy: str, *reasons: _Reason) -> tuple[_Rule, ...]:
    return tuple(_Rule(program, Level.REFUSED, reason, remedy, source) for reason in reasons)


_RULES = (
    _Rule("PEFT", Level.WARN, _changed_base, _CONVERT, "peft 0.21.2, tuners/lora/model.py, subtract_mutated_init"),
    _Rule("PEFT", Level.WARN, _resize, "", "peft 0.21.2, tuners/trainable_tokens"),
    _Rule("PEFT", Level.WARN, _tied_head, "train without it: a merge applies the change twice or not at all",
          "peft issue 2018"),
    *_rules("transformers", "transformers 5.23, integrations/peft.py: reads A and B only", "load it with PEFT",
            _dora, _saved, _biases, _tokens, _activated),
    _Rule("transformers", Level.WARN, _changed_base, _CONVERT,
          "peft 0.21.2, tuners/lora/model.py, subtract_mutated_init"),
    _Rule("transformers", Level.WARN, _resize, "", "peft 0.21.2, tuners/trainable_tokens"),
    *_rules("vLLM", _VLLM, _MERGE, _dora, _biases, _vllm_saved, _activated, _rare, _tokens),
    *_rules("vLLM", _VLLM, "remove it from target_modules", _missing_layer),
    *_rules("vLLM", _VLLM, _CONVERT, _changed_base),
    *_rules("vLLM", "vLLM 0.32, vllm/config/lora.py: at most 512", "lora-ft merge truncate_rank=512",
            _feature("a rank above 512", lambda f: f.rank > _VLLM_RANKS[-1])),
    *_rules("vLLM", "vLLM 0.32, model_executor/models/gpt2.py: no SupportsLoRA", _MERGE,
            _feature("no LoRA for GPT-2", lambda f: f.architecture == "gpt2")),
    *_rules("vLLM", "vLLM 0.32, no rows for an adapter's tokens?", _MERGE, _more_tokens),
    *_rules("vLLM", "peft issue 2018", _MERGE, _tied_head),
    _Rule("vLLM", Level.WARN, _vllm_rank, "", "vLLM 0.32, vllm/config/lora.py"),
    *_rules("SGLang", "SGLang 0.5.23, srt/lora?", _MERGE,
            _dora, _saved, _biases, _tokens, _activated, _rare, _more_tokens),
    *_rules("SGLang", "peft 0.21.2, tuners/lora/model.py", _CONVERT, _changed_base),
    _Rule("SGLang", Level.WARN, _varying, "SGLang 0.5.23 or newer", "SGLang 0.5.23, srt/lora"),
    *_rules("llama.cpp", _LLAMA, _MERGE_GGUF,
            _dora, _saved, _biases, _tokens, _activated, _rare, _tied_ends, _no_writer, _more_tokens),
    *_rules("llama.cpp", "peft 0.21.2, tuners/lora/model.py", _CONVERT, _changed_base),
    _Rule("llama.cpp", Level.WARN, _upstream_gguf, "publish with formats=[gguf], which writes it correctly",
          "llama.cpp b10605, convert_lora_to_gguf.py, compared with PEFT"),
    *_rules("Ollama", "ollama pull request 14969", _MERGE_GGUF,
            _feature("loads no adapters since 0.34.1", lambda f: True)),
    *_rules("MLX", _MLX, _MERGE,
            _saved, _biases, _tokens, _activated, _rare, _tied_ends, _no_writer, _more_tokens),
    *_rules("MLX", "peft 0.21.2, tuners/lora/model.py", _CONVERT, _changed_base),
)  # fmt: skip
