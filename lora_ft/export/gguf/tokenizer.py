"""Describe a tokenizer in the metadata of a GGUF file: the inverse of `models/gguf/tokenizer.py`.

    tokenizer.ggml.tokens  [...]        by id; an embedding row without a token is named [PAD7]
    tokenizer.ggml.model   "gpt2"       byte-level BPE; SentencePiece's BPE is "llama", its Unigram "t5"
    tokenizer.ggml.pre     "smollm"     the splitting rule, found by comparing the tokenizer's own with each known one

A GGUF file holds the name of the rule, not the rule itself, so only known rules can be written. The metadata is read
back by our own reader and compared with the source: a different vocabulary, merge, split or special token is an error.
"""

import json
import re
from typing import Any

from lora_ft.errors import ConfigError
from lora_ft.export.gguf import sentencepiece
from lora_ft.export.gguf.writer import Value
from lora_ft.models.gguf.sentencepiece import CONTROL, NORMAL, SPACE, UNUSED, USER_DEFINED
from lora_ft.models.gguf.tokenizer import RULES, build, stripping, strips_spaces


def metadata(tokenizer: Any, rows: int, ends: list[int], name: str = "") -> dict[str, Value]:
    """Return the metadata for a fast tokenizer and an embedding of this many rows, and general.name by `name`.

    `ends` are the ids that end a generation. Raises ConfigError for another type of tokenizer, an unknown splitting
    rule, and a tokenizer that the metadata would not reproduce.
    """
    if not ends:
        raise ConfigError("the tokenizer has no end token, and llama.cpp would use token 11 instead")
    stored = _stored(tokenizer)
    _check_settings(stored)
    strips = _strips(stored)
    tokens, types = _tokens(stored, rows)
    if sentencepiece.is_sentencepiece(stored):
        values = sentencepiece.described(stored, tokenizer, tokens, types)
    else:
        values = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _rule(stored),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in stored["model"]["merges"]],
        }
    named = {"general.name": _name(name, strips)} if name or strips else {}
    values |= {**named, **_special(tokenizer, ends), **_templates(tokenizer.chat_template)}
    _check(stored, tokenizer, build(values))
    return values


def _stored(tokenizer: Any) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, decoder = stored["model"], stored["decoder"] or {}
    is_byte_level = model["type"] == "BPE" and decoder.get("type") == "ByteLevel"
    if is_byte_level == sentencepiece.is_sentencepiece(stored):
        fallback = ", with SentencePiece's byte fallback" if model.get("byte_fallback") else ""
        raise ConfigError(
            "only tokenizers of byte-level BPE and SentencePiece can be written to GGUF, got one of type "
            f"{model['type']} with decoder {decoder.get('type')}{fallback}"
        )
    return stored


def _check_settings(stored: dict[str, Any]) -> None:
    settings = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if wrong := [name for name in settings if stored["model"].get(name)]:
        raise ConfigError(f"the tokenizer has a {wrong[0]} that a GGUF file cannot express")


def _strips(stored: dict[str, Any]) -> bool:
    """Return True if the spaces after special tokens are dropped as in Phi-3; raises ConfigError for other rules."""
    added = stored["added_tokens"]
    names = [token["content"] for token in added]
    strips = {token["content"] for token in added if token["rstrip"]}
    is_phi3 = strips == stripping(names) and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= set(names)
    for token in added:
        wrong = [name for name in ("single_word", "lstrip", "rstrip") if token[name]]
        if wrong and not (wrong == ["rstrip"] and is_phi3 and sentencepiece.is_sentencepiece(stored)):
            raise ConfigError(f"the token {token['content']!r} has {wrong[0]}=true, which a GGUF file cannot express")
    return bool(strips)


def _name(name: str, strips: bool) -> str:
    """Return the model's name; llama.cpp drops spaces after special tokens if the name has phi-3 in it."""
    if strips_spaces(name) and not strips:
        return re.sub("phi-?(?=3)", "phi_", name, flags=re.IGNORECASE)
    return name if strips == strips_spaces(name) else f"{name} (phi-3)"


def _tokens(stored: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    by_id = {i: token for token, i in sentencepiece.vocabulary(stored).items()}
    types = dict.fromkeys(by_id, NORMAL)
    for added in stored["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(by_id) >= rows:
        raise ConfigError(f"the tokenizer has a token {max(by_id)}, but the model has only {rows} embedding rows")
    return ([by_id.get(i, f"[PAD{i}]") for i in range(rows)], [types.get(i, UNUSED) for i in range(rows)])


def _rule(stored: dict[str, Any]) -> str:
    own = _splitting(stored)
    for rule in RULES:
        bare = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule, "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.merges": [], "tokenizer.ggml.add_bos_token": False}  # fmt: skip
        if _splitting(_stored(build(bare))) == own:
            return rule
    raise ConfigError(
        f"a GGUF file names the rule by which the tokenizer splits text, one of {', '.join(RULES)}; this tokenizer has "
        f"another one: {json.dumps(own)[:200]}"
    )


def _splitting(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide where text is split and merged, nested sequences flattened."""
    steps = [step for name in ("normalizer", "pre_tokenizer") for step in sentencepiece.steps(stored[name])]
    return {"steps": steps, "ignore_merges": bool(stored["model"].get("ignore_merges"))}


def _special(tokenizer: Any, ends: list[int]) -> dict[str, Value]:
    """Return the ids by role, and flags for bos before and eos after a text; other end tokens become eot and eom."""
    first = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    others = [i for i in ends if i != first]
    if len(others) > 2:
        raise ConfigError(f"{len(ends)} tokens end a generation, {ends}, but a GGUF file can name only three")
    ids = {"bos": tokenizer.bos_token_id, "eos": first, **dict(zip(("eot", "eom"), others, strict=False)),
           "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}  # fmt: skip
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before, after = full[: full.index(bare[0])], full[full.index(bare[0]) + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [first]):
        raise ConfigError(
            f"the tokenizer puts tokens {before} before and {after} after a text, which a GGUF file cannot express"
        )
    values: dict[str, Value] = {f"tokenizer.ggml.{role}_token_id": i for role, i in ids.items() if i is not None}
    return values | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _templates(template: str | dict[str, str] | None) -> dict[str, Value]:
    if not isinstance(template, dict):
        return {"tokenizer.chat_template": template} if template else {}
    named: dict[str, Value] = {f"tokenizer.chat_template.{name}": text for name, text in template.items()}
    default = named.pop("tokenizer.chat_template.default", "")
    others: dict[str, Value] = {"tokenizer.chat_templates": sorted(set(template) - {"default"})}
    return ({"tokenizer.chat_template": default} if default else {}) | (others | named if named else {})


def _check(stored: dict[str, Any], tokenizer: Any, read_back: Any) -> None:
    """Compare the tokenizer with the one that our reader builds; raises ConfigError if their ids would differ."""
    found = _stored(read_back)
    ours, theirs, wrong = _added(stored), _added(found), []
    if sentencepiece.is_sentencepiece(stored):
        if (text := sentencepiece.check(stored, read_back)) is not None:
            wrong.append(f"way to cut {text[:80]!r}")
        ours = {token for token in ours if token[1].strip(SPACE)}
    elif stored["model"]["merges"] != found["model"]["merges"]:
        wrong.append("a merge")
    if tokenizer.get_vocab().items() != read_back.get_vocab().items() & tokenizer.get_vocab().items():
        wrong.append("a token")
    if wrong or ours != theirs:
        raise ConfigError(f"the tokenizer has {[*wrong, 'a special token'][0]} that a GGUF file cannot express")


def _added(stored: dict[str, Any]) -> set[tuple[int, str, bool]]:
    return {(token["id"], token["content"], token["special"]) for token in stored["added_tokens"]}
