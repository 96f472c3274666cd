"""Describe a SentencePiece tokenizer for a GGUF file: BPE with byte fallback ("llama"), or Unigram ("t5").

    Llama 2, Mistral 7B, Phi-3     spaces and a prefix by Prepend and Replace, or by Metaspace
    Gemma                          spaces without a prefix
    Unigram                        after the character map, if there is one

transformers stores the merges of a BPE, llama.cpp the scores they came from: a token's rank becomes its score.
llama.cpp joins every two neighbours that together are a token, so each such pair must be a merge. It has no Unigram
with byte fallback, and its Unigram puts no prefix before a text of spaces only.
"""

import base64
import json
import logging
from typing import Any

from lora_ft.errors import ConfigError
from lora_ft.export.gguf.writer import Value
from lora_ft.models.gguf.sentencepiece import BYTE, BYTES, NORMAL, SPACE, UNUSED, USER_DEFINED, is_byte, splits

log = logging.getLogger("lora_ft")

_UNREACHABLE = -1e6  # the score of a token that must not be chosen by its score
_PREFIX = [{"type": "Prepend", "prepend": SPACE}]
_REPLACE = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
_MERGED = (
    [{"type": "Strip", "strip_left": False, "strip_right": True},
     {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}],
    [{"type": "Strip", "strip_left": False, "strip_right": True},
     {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
)  # fmt: skip
_GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def is_sentencepiece(stored: dict[str, Any]) -> bool:
    """Return True for a tokenizer.json with SentencePiece's BPE or Unigram, False for byte-level BPE and others."""
    model = stored["model"]
    return model["type"] == "Unigram" or (model["type"] == "BPE" and bool(model.get("byte_fallback")))


def vocabulary(stored: dict[str, Any]) -> dict[str, int]:
    """Return the model's tokens and their ids."""
    vocab = stored["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}


def described(stored: dict[str, Any], tokenizer: Any, tokens: list[str], types: list[int]) -> dict[str, Value]:
    """Return the metadata of model, tokens, scores and spaces, for the tokens and types by id.

    Raises ConfigError for a tokenizer that llama.cpp does not have.
    """
    is_bpe = stored["model"]["type"] == "BPE"
    normalizer = tokenizer.backend_tokenizer.normalizer
    late = [token["content"] for token in stored["added_tokens"] if normalizer and token["normalized"]
            and normalizer.normalize_str(token["content"]) != token["content"]]  # fmt: skip
    if late:
        raise ConfigError(f"the token {late[0]!r} has normalized=true, which a GGUF file cannot express: add it with "
                          "normalized=false")  # fmt: skip
    types = [BYTE if is_bpe and is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)]
    added = {token["content"] for token in stored["added_tokens"]}
    scores = _ranks(stored, added) if is_bpe else _scores(stored)
    # Gemma's runs of U+2581, which merges make: as separate tokens they would be looked for in the text as written, in
    # which spaces are not yet marked.
    types = [NORMAL if kind == USER_DEFINED and token in scores and not token.strip(SPACE) else kind
             for token, kind in zip(tokens, types, strict=True)]  # fmt: skip
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "llama" if is_bpe else "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [_UNREACHABLE if kind == UNUSED else float(scores.get(token, 0.0))
                                  for token, kind in zip(tokens, types, strict=True)],
    }  # fmt: skip
    return values | _spaces(stored, tokenizer)


def _ranks(stored: dict[str, Any], added: set[str]) -> dict[str, float]:
    """Return a score for each token that merges make: the more, the earlier its first merge."""
    vocab, pairs = stored["model"]["vocab"], [tuple(pair) for pair in stored["model"]["merges"]]
    # Gemma has the tab itself as the token of its byte.
    if missing := next((token for i, token in enumerate(BYTES) if token not in vocab and chr(i) not in vocab), None):
        raise ConfigError(f"a BPE with byte fallback needs a token for each byte, but {missing} is missing")
    scores: dict[str, float] = {}
    for pair in pairs:
        scores.setdefault("".join(pair), -float(len(scores)))
    known = {token for token in vocab if token not in added and not is_byte(token)}
    every = {(*pair,) for token in known for pair in splits(token, vocab)}
    if extra := next(iter(sorted(every - set(pairs))), None):
        raise ConfigError(
            f"llama.cpp would join {extra[0]!r} and {extra[1]!r}, which is no merge of the tokenizer: a GGUF file can "
            "hold a BPE with byte fallback only if it comes from SentencePiece"
        )
    if alien := next((token for token in sorted(known) if any(part not in vocab for part in token)), None):
        raise ConfigError(f"the tokenizer has no token for each character of {alien!r}, and llama.cpp would join them")
    return scores


def _scores(stored: dict[str, Any]) -> dict[str, float]:
    if stored["model"].get("byte_fallback"):
        raise ConfigError("llama.cpp has no byte fallback for a Unigram: it would read unknown characters as <unk>")
    if stored["model"].get("unk_id") is None:
        raise ConfigError("llama.cpp needs an unknown token for a Unigram, and this tokenizer has none")
    return {token: score for token, score in stored["model"]["vocab"]}


def _spaces(stored: dict[str, Any], tokenizer: Any) -> dict[str, Value]:
    """Return how llama.cpp writes spaces; warn where it puts another prefix than the tokenizer."""
    found = [step for name in ("normalizer", "pre_tokenizer") for step in steps(stored[name])]
    is_bpe = stored["model"]["type"] == "BPE"
    values: dict[str, Value] = {}
    if not is_bpe and found and found[0]["type"] == "Precompiled":
        values["tokenizer.ggml.precompiled_charsmap"] = base64.b64decode(found.pop(0)["precompiled_charsmap"])
    if not is_bpe and found[:2] in _MERGED:
        values["tokenizer.ggml.remove_extra_whitespaces"] = True
        found = found[2:]
    found = [step for step in found if step != _GEMMA_SPLIT]  # no space is left where it would split
    if found in (_REPLACE, _PREFIX + _REPLACE):
        return values | {"tokenizer.ggml.add_space_prefix": len(found) > 1}
    if len(found) != 1 or found[0]["type"] != "Metaspace" or found[0]["replacement"] != SPACE:
        raise ConfigError(f"llama.cpp's SentencePiece tokenizer does not have these steps: {json.dumps(found)[:300]}")
    inside = next((token for token in vocabulary(stored) if SPACE in token[1:]), None)
    if found[0].get("split", True) and inside:
        raise ConfigError(
            f"the tokenizer splits text at every space, llama.cpp does not, and {inside!r} has one inside"
        )
    scheme = found[0]["prepend_scheme"]
    return values | {"tokenizer.ggml.add_space_prefix": _has_prefix(scheme, stored, tokenizer)}


def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, nested sequences flattened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part.get("normalizers") or part["pretokenizers"] for step in steps(inner)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]  # changes offsets, not tokens


def _has_prefix(scheme: str, stored: dict[str, Any], tokenizer: Any) -> bool:
    if scheme == "never":
        return False
    if scheme == "first" and _chat_begins_special(stored, tokenizer):
        log.warning("llama.cpp puts no space before a text, which is right for chats; the tokenizer puts one before a "
                    "text that does not begin with a special token")  # fmt: skip
        return False
    places = "every text between special tokens" if scheme == "first" else "a text that begins with a space"
    log.warning("llama.cpp puts a space before %s, the tokenizer does not", places)
    return True


def _chat_begins_special(stored: dict[str, Any], tokenizer: Any) -> bool:
    if not tokenizer.chat_template:
        return False
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except Exception:  # a template may raise anything for a conversation that it does not know
        return False
    return str(text).startswith(tuple(token["content"] for token in stored["added_tokens"]))


def check(stored: dict[str, Any], read_back: Any) -> str | None:
    """Return a text that the tokenizer and the one read back cut differently: tokens, and runs of their characters."""
    from tokenizers import Tokenizer, normalizers

    bare = stored | {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    ours, theirs = Tokenizer.from_str(json.dumps(bare)), Tokenizer.from_str(read_back.backend_tokenizer.to_str())
    theirs.normalizer = ours.normalizer = normalizers.Replace(" ", SPACE)
    theirs.post_processor = None
    texts = [token.replace(SPACE, " ") for token in vocabulary(stored) if not is_byte(token)]
    texts += [character * count for character in (" ", "\n", "\t", "a", "-") for count in range(2, 65)]
    texts += [" ".join(texts[i::97]) for i in range(97)]
    cut = ([one.ids for one in made.encode_batch(texts, add_special_tokens=False)] for made in (ours, theirs))
    return next((text for text, a, b in zip(texts, *cut, strict=True) if a != b), None)
