"""Build the tokenizer that a GGUF file's metadata describes.

    tokenizer.ggml.model   "gpt2"                       byte-level BPE; "llama" and "t5" are SentencePiece's types
    tokenizer.ggml.pre     "smollm"                     the rule that splits text before merging
    tokenizer.ggml.tokens  ["<|endoftext|>", ...]       by id;  .token_type  [3, ...]  3 control, 4 user-defined
    tokenizer.ggml.merges  ["Ġ t", "Ġ a", ...]          by rank

The rules follow the published tokenizers of the models, not transformers' GGUF reader. In 5.23 that reader does not
support `smollm` and uses GPT-2's rule, so that a number after two spaces or a line break gets other ids than in
training:

    "a  12"   published: a ĠĠ 1 2      transformers' GGUF reader: a Ġ Ġ 1 2
"""

from typing import Any

from lora_ft.errors import ConfigError
from lora_ft.models.gguf import sentencepiece
from lora_ft.models.gguf.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED

# ByteLevel applies GPT-2's rule by itself. Llama 3 and Qwen 2 differ in the number of digits per piece.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{suffix}|"
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{suffix}|"
)
RULES = {
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "dbrx": _WORDS + r"\p{N}{1,3}" + _REST,
    "gpt-4o": _CASED.format(suffix=_SUFFIX) + r"\p{N}{1,3}" + _REST.replace("]*|", "/]*|", 1),
    "tekken": _CASED.format(suffix="") + r"\p{N}" + _REST.replace("]*|", "/]*|", 1),
}
_WHOLE_PIECES = ("llama-bpe", "tekken")  # a piece that is a token is that token, even if no merges produce it
_BOS = ("llama-bpe", "tekken")
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "starcoder": "smollm"}


def build(metadata: dict[str, Any]) -> Any:
    """Build a `PreTrainedTokenizerFast` with its chat template from the metadata of a GGUF file.

    Raises ConfigError for an unknown type of tokenizer or splitting rule; a guess may give other ids than in training.
    """
    from transformers import PreTrainedTokenizerFast

    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", *sentencepiece.MODELS):
        raise ConfigError(
            f"the GGUF file has a tokenizer of type {model}; supported are byte-level BPE (gpt2) and SentencePiece's "
            "BPE and Unigram (llama, t5): use the model's safetensors folder or hub id instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    backend = _byte_level(metadata) if model == "gpt2" else sentencepiece.backend(metadata)
    _add_special(backend, metadata)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    rule = metadata.get("tokenizer.ggml.pre")
    rule = _OTHER_NAMES.get(str(rule), rule)
    if rule not in RULES:
        raise ConfigError(
            f"the GGUF file has the pre-tokenizer {rule}; supported are {', '.join([*RULES, *_OTHER_NAMES])}: "
            "use the model's safetensors folder or hub id instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=rule in _WHOLE_PIECES)
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _add_special(backend: Any, metadata: dict[str, Any]) -> None:
    """Add the tokens that are found in the text before it is split, and those before and after a text."""
    from tokenizers import AddedToken, processors

    tokens, model = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.model"]
    strips = stripping(tokens) if model == "llama" and strips_spaces(metadata.get("general.name", "")) else ()
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    found = [
        (kind, AddedToken(token, normalized=False, rstrip=token in strips, special=kind != USER_DEFINED))
        for token, kind in zip(tokens, kinds, strict=False)  # the types are optional
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    backend.add_special_tokens([added for kind, added in found if kind != USER_DEFINED])
    backend.add_tokens([added for kind, added in found if kind == USER_DEFINED])
    rule = metadata.get("tokenizer.ggml.pre")
    is_default = {"bos": model == "llama" or _OTHER_NAMES.get(str(rule), rule) in _BOS, "eos": model == "t5"}
    frame = {
        name: tokens[_role(metadata, name)]
        for name, default in is_default.items()
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default)
    }
    if frame:
        single, second = (" ".join([*([frame["bos"]] if "bos" in frame else []), text,
                                    *([frame["eos"]] if "eos" in frame else [])]) for text in ("$A", "$B"))  # fmt: skip
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} {second}",
            special_tokens=[(token, backend.token_to_id(token)) for token in set(frame.values())],
        )  # fmt: skip


def _role(metadata: dict[str, Any], name: str) -> int:
    """Return the id of the begin or end token; SentencePiece's types have defaults."""
    key = f"tokenizer.ggml.{name}_token_id"
    default = {"llama": {"bos": 1, "eos": 2}, "t5": {"eos": 1}}.get(metadata["tokenizer.ggml.model"], {}).get(name)
    return int(metadata[key] if default is None else metadata.get(key, default))


def strips_spaces(name: str) -> bool:
    """Return True if llama.cpp drops the spaces after special tokens: it does so by the model's name alone."""
    return any(part in name.lower() for part in ("phi-3", "phi3"))


def stripping(tokens: list[str]) -> set[str]:
    """Return the tokens after which a model of such a name drops spaces, if they are special."""
    return set(tokens) - {"<unk>", "<s>", "<|endoftext|>"}


def _pre_tokenizer(rule: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match RULES[rule]:
        case "":
            return by_gpt2
        case "digits":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt2])
        case pattern:
            bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_only])
