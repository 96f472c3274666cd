"""Build the SentencePiece tokenizer that a GGUF file describes, so that it cuts text as llama.cpp does.

    tokenizer.ggml.model "llama"   BPE: of two neighbours, those are joined first whose token has the highest score;
                                   a character without a token becomes its bytes, <0x0A>
    tokenizer.ggml.model "t5"      Unigram: the tokens with the highest sum of scores
    tokenizer.ggml.add_space_prefix, .remove_extra_whitespaces, .precompiled_charsmap      the text before it is cut

A space is written as U+2581. llama.cpp puts the space prefix before every text between special tokens, also before one
that begins with a space. Algorithms: llama.cpp b11549, src/llama-vocab.cpp.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
MODELS = ("llama", "t5")


def backend(metadata: dict[str, Any]) -> Any:
    """Build the `tokenizers.Tokenizer`, without its special tokens; KeyError for metadata that is missing."""
    from tokenizers import Tokenizer, decoders, models

    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    is_bpe = metadata["tokenizer.ggml.model"] == "llama"
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0 if is_bpe else 2)
    if is_bpe:
        normal = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
        vocabulary = {token: i for i, token in enumerate(tokens)}
        made = Tokenizer(models.BPE(vocabulary, merges(normal), unk_token=tokens[unknown], fuse_unk=True,
                                    byte_fallback=True))  # fmt: skip
    else:
        lowest = min((s for s, kind in zip(scores, types, strict=True) if kind == NORMAL), default=0.0)
        pieces = [(t, max(s, lowest)) for t, s in zip(tokens, scores, strict=True)]  # <unk> costs 10 more
        made = Tokenizer(models.Unigram(pieces, unknown, byte_fallback=False))
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", is_bpe)
    made.normalizer = _normalizer(metadata, has_prefix)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return made


def _normalizer(metadata: dict[str, Any], has_prefix: bool) -> Any:
    from tokenizers import Regex, normalizers

    merges_spaces = metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    steps: list[Any] = []
    if charsmap := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        steps.append(normalizers.Precompiled(bytes(charsmap)))
    if merges_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if has_prefix or merges_spaces:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the merges by which BPE with ranks joins what llama.cpp joins by these scores, the highest first."""
    ordered = sorted(scores, key=lambda token: -scores[token])  # stable: equal scores in the order of the vocabulary
    return [pair for token in ordered for pair in splits(token, scores)]


def splits(token: str, vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that together are this token."""
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]


def is_byte(token: str) -> bool:
    """Return True for the token of a byte, <0x0A>."""
    return re.fullmatch("<0x[0-9A-F]{2}>", token) is not None
