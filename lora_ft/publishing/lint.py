"""Who can load an adapter: one line a consumer, OK, WARN or REFUSED with the reason and what helps.

    consumer       verdict   why
    PEFT           OK        0.14.0 or newer
    vLLM           WARN      rank 64 is above its default of 16: start it with --max-lora-rank 64
    Ollama         REFUSED   takes no adapters since 0.34.1: merge, lora-ft merge ... gguf=q8_0

It works on anybody's adapter folder, and reads nothing else but the config of the base where that is known. A rule is
what a consumer's own source or issue says, named beside it; none of them is run here. A question mark behind a source
means that it was not read for this: the rule is what follows from its other ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.publishing import checks, facts
from lora_ft.publishing.facts import Facts, Level

FILES = "the files"
CONSUMERS = ("PEFT", "transformers", "vLLM", "SGLang", "llama.cpp", "Ollama", "MLX")

_MERGE = "merge it: lora-ft merge"
_MERGE_GGUF = "merge it: lora-ft merge ... gguf=q8_0"
_PLAIN = (
    "publish it with its start beside it (pissa_init, ...), or convert it to a plain LoRA "
    "(PEFT: path_initial_model_for_weight_conversion)"
)
_VLLM = "vLLM 0.32, vllm/lora/peft_helper.py"
_LLAMA = "llama.cpp b10605, src/llama-adapter.cpp"
_MLX = "mlx-lm 0.32.2, mlx_lm/tuner/utils.py"

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")  # that gguf_adapter and mlx write
_HEADS, _EMBEDDINGS = ("lm_head", "embed_out"), ("embed_tokens", "wte", "embed_in")

# The release of PEFT whose LoraConfig has a key first, as read off the wheels of x.y.0; "init" is init_lora_weights.
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
_TOLERANT = (0, 14)  # from here on PEFT drops a key that it does not know with a warning; before, it raises (peft 2038)
_DESCRIPTIVE = ("peft_version", "qalora_group_size")  # of these keys the result does not depend


@dataclass(frozen=True)
class Verdict:
    """What a consumer makes of an adapter; `source` says where that is written."""

    consumer: str
    level: Level
    reason: str
    remedy: str = ""
    source: str = ""


@dataclass(frozen=True)
class _Rule:
    """What one consumer does not read, or needs: `reason` returns why, or None where the adapter is none of that."""

    consumer: str
    level: Level
    reason: Callable[[Facts], str | None]
    remedy: str
    source: str


def lint(folder: Path, base_config: dict[str, Any] | None) -> list[Verdict]:
    """What is wrong with the files of an adapter folder, then one line for each of CONSUMERS.

    `base_config` is the base's config.json; without it, what needs it is not looked at. Never raises for what the
    files hold.
    """
    found = facts.read(folder, base_config)
    verdicts = [Verdict(FILES, f.level, f.reason, f.remedy) for f in checks.check(folder, found)]
    return [*verdicts, *(_line(consumer, found) for consumer in CONSUMERS)]


def is_refused(verdicts: list[Verdict]) -> bool:
    """Whether the files are broken, or no consumer is left."""
    consumers = [v for v in verdicts if v.consumer != FILES]
    return any(v.level is Level.REFUSED for v in verdicts if v.consumer == FILES) or all(
        v.level is Level.REFUSED for v in consumers
    )


def _line(consumer: str, found: Facts) -> Verdict:
    """The rules of a consumer as one verdict: the worst of them, and all reasons of that level."""
    if not found.config or not (found.layers or found.whole):
        return Verdict(consumer, Level.REFUSED, "there is no adapter that can be read", "", "")
    hits = [(rule, reason) for rule in _RULES if rule.consumer == consumer and (reason := rule.reason(found))]
    worst = max((rule.level for rule, _ in hits), default=Level.OK)
    chosen = [(rule, reason) for rule, reason in hits if rule.level is worst]
    if worst is Level.OK:
        return Verdict(consumer, worst, _fine(consumer, found))
    remedies, sources = ([*dict.fromkeys(getattr(rule, part) for rule, _ in chosen)] for part in ("remedy", "source"))
    return Verdict(consumer, worst, "; ".join(reason for _, reason in chosen), "; ".join(filter(None, remedies)),
                   "; ".join(sources))  # fmt: skip


def _fine(consumer: str, found: Facts) -> str:
    match consumer:
        case "PEFT":
            return f"{minimum_peft(found.config)} or newer, by the keys of its config"
        case "llama.cpp":
            return "adapter.gguf" if "adapter.gguf" in found.names else "after conversion: publish with also=[gguf]"
        case "MLX":
            there = "mlx/adapters.safetensors" in found.names
            return "the folder mlx" if there else "after conversion: publish with also=[mlx]"
    return "as it is"


def minimum_peft(config: dict[str, Any]) -> str:
    """The first release of PEFT, of those read, that reads a config's keys and knows what they ask for."""
    since = {key: release for release, keys in _SINCE.items() for key in keys}
    init = config.get("init_lora_weights")
    wanted = [since.get(f"init={init.partition('_niter')[0]}", (0, 5))] if isinstance(init, str) else []
    for key, value in config.items():
        release = since.get(key, (0, 5))
        wanted.append(release if value and key not in _DESCRIPTIVE else min(release, _TOLERANT))
    return "{}.{}.0".format(*max(wanted, default=(0, 5)))


def _told(what: str, holds: Callable[[Facts], Any]) -> Callable[[Facts], str | None]:
    return lambda found: what if holds(found) else None


def _has(key: str) -> Callable[[Facts], Any]:
    return lambda found: found.config.get(key)


_dora = _told("DoRA", _has("use_dora"))
_saved = _told("layers trained in full (modules_to_save)", lambda f: f.config.get("modules_to_save") or
               (f.whole and f.config.get("bias", "none") == "none"))  # fmt: skip
_biases = _told("biases", lambda f: f.config.get("bias", "none") != "none" or f.config.get("lora_bias") or f.has_biases)
_tokens = _told("trained rows of tokens", lambda f: f.has_tokens or f.config.get("trainable_token_indices"))
_activated = _told("activated LoRA", _has("alora_invocation_tokens"))
_tied_head = _told("the head is adapted, and it is the embedding's matrix", lambda f: f.is_tied and f.adapts(*_HEADS))
_ends = _told("embedding or head are adapted, and they are one matrix",
              lambda f: f.is_tied and f.adapts(*_HEADS, *_EMBEDDINGS))  # fmt: skip
_unlike = _told("ranks or alphas that differ from layer to layer",
                lambda f: f.config.get("rank_pattern") or f.config.get("alpha_pattern"))  # fmt: skip


def _is_plain(init: Any) -> bool:
    return not isinstance(init, str) or init in _VLLM_INITS


def _init(found: Facts) -> str | None:
    init = found.config.get("init_lora_weights")
    return None if _is_plain(init) else f"init_lora_weights={str(init)[:40]} changed the base that it was trained on"


def _rare(found: Facts) -> str | None:
    names = [n for n in ("layer_replication", "use_qalora", "use_bdlora", "target_parameters", "arrow_config",
                         "monteclora_config", "velora_config", "kasa_config") if found.config.get(n)]  # fmt: skip
    return f"{', '.join(names)} of its config" if names else None


def _absent(found: Facts) -> str | None:
    targets = found.config.get("target_modules")
    missing = [t for t in map(str, targets) if not found.has_layer(t)] if isinstance(targets, list) else []
    return f"the base has no layer {missing[0]}, which its targets name" if missing and found.base_shapes else None


def _vllm_rank(found: Facts) -> str | None:
    allowed = next((r for r in _VLLM_RANKS if r >= found.rank), None)
    if allowed is None or allowed <= 16:
        return None
    return f"rank {found.rank} is above its default of 16: start it with --max-lora-rank {allowed}"


def _vllm_saved(found: Facts) -> str | None:
    saved = found.config.get("modules_to_save")
    names = {str(name) for name in saved} if isinstance(saved, list) else {str(saved)} - {"None"}
    whole = {key for key in found.whole if not any(f".{name}." in f".{key}" for name in names)}
    return _saved(found) if whole or names - {"classifier", "score"} else None


def _more_tokens(found: Facts) -> str | None:
    rows = found.base_config.get("vocab_size")
    if not isinstance(rows, int) or found.num_tokens is None or found.num_tokens <= rows:
        return None
    return f"its tokenizer has {found.num_tokens} tokens, the base rows for {rows}"


def _resize(found: Facts) -> str | None:
    more = _more_tokens(found)
    return more and f"{more}: base.resize_token_embeddings({found.num_tokens}, mean_resizing=False) first"


def _no_writer(found: Facts) -> str | None:
    known = found.architecture is None or found.architecture in _FAMILIES
    return None if known else f"no writer for bases of architecture {found.architecture}"


def _upstream_gguf(found: Facts) -> str | None:
    if "adapter.gguf" in found.names:
        return None
    wrong = [what for what, holds in (
        ("rsLoRA's scale", found.config.get("use_rslora")), ("alpha_pattern", found.config.get("alpha_pattern")),
        ("GPT-2's layout", found.architecture == "gpt2")) if holds]  # fmt: skip
    return f"its own convert_lora_to_gguf.py gets {' and '.join(wrong)} wrong" if wrong else None


def _rules(consumer: str, source: str, remedy: str, *reasons: Callable[[Facts], str | None]) -> tuple[_Rule, ...]:
    return tuple(_Rule(consumer, Level.REFUSED, reason, remedy, source) for reason in reasons)


_RULES = (
    _Rule("PEFT", Level.WARN, _init, _PLAIN, "peft 0.21.2, tuners/lora/model.py, subtract_mutated_init"),
    _Rule("PEFT", Level.WARN, _resize, "", "peft 0.21.2, tuners/trainable_tokens"),
    _Rule("PEFT", Level.WARN, _tied_head, "train without it: merged, the change appears twice or not at all",
          "peft issue 2018"),
    *_rules("transformers", "transformers 5.23, integrations/peft.py: reads A and B only", "load it with PEFT",
            _dora, _saved, _biases, _tokens, _activated),
    _Rule("transformers", Level.WARN, _init, _PLAIN, "peft 0.21.2, tuners/lora/model.py, subtract_mutated_init"),
    _Rule("transformers", Level.WARN, _resize, "", "peft 0.21.2, tuners/trainable_tokens"),
    *_rules("vLLM", _VLLM, _MERGE, _dora, _biases, _vllm_saved, _activated, _rare, _tokens),
    *_rules("vLLM", _VLLM, "take it out of target_modules", _absent),
    *_rules("vLLM", _VLLM, _PLAIN, _init),
    *_rules("vLLM", "vLLM 0.32, vllm/config/lora.py: at most 512", "lora-ft merge truncate_rank=512",
            _told("a rank above 512", lambda f: f.rank > _VLLM_RANKS[-1])),
    *_rules("vLLM", "vLLM 0.32, model_executor/models/gpt2.py: no SupportsLoRA", _MERGE,
            _told("no LoRA for GPT-2", lambda f: f.architecture == "gpt2")),
    *_rules("vLLM", "vLLM 0.32, no rows for an adapter's tokens?", _MERGE, _more_tokens),
    *_rules("vLLM", "peft issue 2018", _MERGE, _tied_head),
    _Rule("vLLM", Level.WARN, _vllm_rank, "", "vLLM 0.32, vllm/config/lora.py"),
    *_rules("SGLang", "SGLang 0.5.23, srt/lora?", _MERGE,
            _dora, _saved, _biases, _tokens, _activated, _rare, _more_tokens),
    *_rules("SGLang", "peft 0.21.2, tuners/lora/model.py", _PLAIN, _init),
    _Rule("SGLang", Level.WARN, _unlike, "SGLang 0.5.23 or newer", "SGLang 0.5.23, srt/lora"),
    *_rules("llama.cpp", _LLAMA, _MERGE_GGUF,
            _dora, _saved, _biases, _tokens, _activated, _rare, _ends, _no_writer, _more_tokens),
    *_rules("llama.cpp", "peft 0.21.2, tuners/lora/model.py", _PLAIN, _init),
    _Rule("llama.cpp", Level.WARN, _upstream_gguf, "publish with also=[gguf], which writes it right",
          "llama.cpp b10605, convert_lora_to_gguf.py, compared with PEFT"),
    *_rules("Ollama", "ollama pull request 14969", _MERGE_GGUF,
            _told("takes no adapters since 0.34.1", lambda f: True)),
    *_rules("MLX", _MLX, _MERGE,
            _saved, _biases, _tokens, _activated, _rare, _ends, _no_writer, _more_tokens),
    *_rules("MLX", "peft 0.21.2, tuners/lora/model.py", _PLAIN, _init),
)  # fmt: skip
