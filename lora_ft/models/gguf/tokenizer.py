"""Build the tokenizer that a GGUF file's metadata describes.

    tokenizer.ggml.model   "gpt2"                       byte-level BPE, the only supported type
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

# ByteLevel applies GPT-2's rule by itself. Llama 3 and Qwen 2 differ in the number of digits per piece.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

_CONTROL, _USER_DEFINED = 3, 4


def build(metadata: dict[str, Any]) -> Any:
    """Build a `PreTrainedTokenizerFast` with its chat template from the metadata of a GGUF file.

    Raises ConfigError for an unknown type of tokenizer or splitting rule; a guess may give other ids than in training.
    """
    from transformers import PreTrainedTokenizerFast

    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConfigError(
            f"the GGUF file has a tokenizer of type {model}; only byte-level BPE (gpt2) is supported: "
            "use the model's safetensors folder or hub id instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _backend(metadata: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    rule = metadata.get("tokenizer.ggml.pre")
    rule = _OTHER_NAMES.get(str(rule), rule)
    if rule not in RULES:
        raise ConfigError(
            f"the GGUF file has the pre-tokenizer {rule}; supported are {', '.join([*RULES, *_OTHER_NAMES])}: "
            "use the model's safetensors folder or hub id instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 takes a piece that is a token as that token, even if no sequence of merges produces it.
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=rule == "llama-bpe")
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    types = metadata.get("tokenizer.ggml.token_type") or []
    # These tokens are found in the text before it is split. strict=False: the types are optional.
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    if metadata.get("tokenizer.ggml.add_bos_token", rule == "llama-bpe"):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return backend


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
