"""Small tokenizers like SentencePiece's, trained on the sentences of tests/tiny.py, as transformers stores them.

bpe("prefix")      Llama 2: byte fallback, a space before every text by the normalizer
bpe("first")       Mistral 7B v0.3: a space before the first text by Metaspace;  "always", "never" likewise
bpe("gemma")       spaces without a prefix, runs of spaces, tabs and line breaks, and the tab as the token of its byte
unigram("prefix")  no byte fallback: characters without a token are <unk>
"""

from typing import Any

from tiny import SENTENCES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>")
BYTES = [f"<0x{i:02X}>" for i in range(256)]
GEMMA_RUNS = tuple(c * n for c, longest in (("\u2581", 8), ("\n", 4), ("\t", 2)) for n in range(2, longest + 1))
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|user|>\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>' }}{% endif %}"
)


def bpe(kind: str, *, added: tuple[AddedToken, ...] = (), template: str | None = TEMPLATE) -> Any:
    """Return a BPE whose merges are all pairs of tokens that together are a token, by the scores of the tokens.

    Gemma's runs have the score 0, above all others; transformers merges the longest first part first.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learned.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=220, show_progress=False))
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().get)
    pieces += ["\n"] if "\n" not in pieces else []
    runs = GEMMA_RUNS if kind == "gemma" else ()
    scores = {piece: -1.0 - i for i, piece in enumerate(pieces)} | dict.fromkeys(runs, 0.0)
    tokens = dict.fromkeys([*SPECIAL, *("\t" if runs and byte == "<0x09>" else byte for byte in BYTES), *scores])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [(piece[:i], piece[i:]) for piece in scores for i in range(1, len(piece))
              if piece[:i] in vocabulary and piece[i:] in vocabulary]  # fmt: skip
    merges.sort(key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))
    return _finished(
        Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)),
        kind, added, template,
    )  # fmt: skip


def unigram(kind: str, *, added: tuple[AddedToken, ...] = (), template: str | None = TEMPLATE) -> Any:
    """Return a Unigram of about 300 tokens."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    return _finished(made, kind, added, template)


def _finished(made: Tokenizer, kind: str, added: tuple[AddedToken, ...], template: str | None) -> Any:
    replace = normalizers.Replace(" ", "\u2581")
    made.normalizer = made.pre_tokenizer = None
    match kind:
        case "prefix":
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        case "gemma":
            made.normalizer = replace
            made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        case scheme:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    made.add_tokens(list(added))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
