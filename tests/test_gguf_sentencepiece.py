"""SentencePiece tokenizers in GGUF files: llama.cpp cuts text as the tokenizer does, or the tokenizer is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import pytest
from sentencepieces import GEMMA_RUNS, SPECIAL, TEMPLATE, bpe, unigram
from tiny import SENTENCES, VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers

from lora_ft.config import GgufType
from lora_ft.errors import ConfigError
from lora_ft.export.gguf import model as gguf_model
from lora_ft.export.gguf import sentencepiece as described
from lora_ft.export.gguf import tokenizer as gguf_tokenizer
from lora_ft.models.gguf import reader
from lora_ft.models.gguf.tokenizer import build

SPACE = "\u2581"
# Without a space at the beginning, and after a special token.
PLAIN = [
    "Hello world", "the capital of France  is   Paris", "it's we'll I'D\n\nnew\tline\r\n", "naïve café Καλημέρα 你好",
    "👋🏽", "12 apples, 3.14", "trailing  ", "\n", "<0x41> [PAD505]", "def add(first, second):\n    return first",
]  # fmt: skip
SPECIALS = ["a<|user|>b <|user|>c</s>", "<s><|user|>", "<|user|>\nHello</s>\n"]
SPACES = [
    " " * 23 + "a" + " " * 5,
    "a" + "\n" * 11 + "\t\t\tb\t",
    "  leading",
    " x",
    f"{SPACE} {SPACE}{SPACE}x",
    "a<|user|> b",
    "    ",
    "a</s>  c",
]
RUNS = tuple(AddedToken(run, normalized=False, special=False) for run in GEMMA_RUNS)


def written(folder: Path, tokenizer: Any, name: str = "m") -> Path:
    """Write a tiny llama with this tokenizer to a GGUF file."""
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    gguf_model.write(folder / "model", folder / f"{name}.gguf", GgufType.f32)
    return folder / f"{name}.gguf"


def different(file: Path, tokenizer: Any, texts: list[str]) -> list[str]:
    """Return the texts for which llama.cpp predicts otherwise than for the tokenizer's ids."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    by_text, by_ids = (llamacpp.logprobs(file, given, size=VOCABULARY) for given in (texts, ids))
    return [text for text, a, b in zip(texts, by_text, by_ids, strict=True) if np.abs(a - b).max() > 1e-6]


EXACT = {
    "bpe_prefix": (bpe, "prefix", ()),
    "bpe_never": (bpe, "never", ()),
    "bpe_gemma": (bpe, "gemma", RUNS),
    "bpe_added": (bpe, "prefix", (AddedToken("<think>", normalized=False),)),
    "unigram_prefix": (unigram, "prefix", ()),
    "unigram_never": (unigram, "never", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_llamacpp_and_our_reader_cut_every_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    make, kind, added = EXACT[name]
    tokenizer = make(kind, added=added)
    file = written(tmp_path, tokenizer)
    texts = [*PLAIN, *SPECIALS, *SPACES, "a<think>b"]
    # llama.cpp's Unigram puts no prefix before spaces alone; our reader takes the name of an unused row for the row.
    texts = [text for text in texts if make is bpe or text not in ("    ", "<0x41> [PAD505]")]
    # Gemma's own mark of a space in a text is a token of its own, in llama.cpp it is joined with the spaces beside it.
    texts = [text for text in texts if kind != "gemma" or SPACE not in text]
    assert different(file, tokenizer, texts) == []
    back = build(reader.read(file).metadata)
    assert [text for text in [*texts, *SENTENCES] if back(text)["input_ids"] != tokenizer(text)["input_ids"]] == []
    assert [back.decode(back(text)["input_ids"], skip_special_tokens=True) for text in PLAIN[:2]] == PLAIN[:2]
    turns = [{"role": "user", "content": "What is  12 + 30?"}]
    assert back.apply_chat_template(turns) == tokenizer.apply_chat_template(turns)


@pytest.mark.parametrize("make", [bpe, unigram])
@pytest.mark.parametrize(
    ("kind", "template", "equal", "other", "warning"),
    [
        ("always", TEMPLATE, [*PLAIN, *SPECIALS], [" x", "a<|user|> b"], "a space before a text that begins with a"),
        ("first", TEMPLATE, SPECIALS[1:], PLAIN[:1], "no space before a text, which is right for chats"),
        ("first", None, PLAIN, SPECIALS[:1], "a space before every text between special tokens"),
    ],
)
def test_metaspace_is_written_with_a_warning_of_the_difference(
    make: Any, kind: str, template: str | None, equal: list[str], other: list[str], warning: str, tmp_path: Path,
    caplog: Any,
) -> None:  # fmt: skip
    tokenizer = make(kind, template=template)
    file = written(tmp_path, tokenizer)
    assert different(file, tokenizer, equal) == [] and different(file, tokenizer, other) == other
    assert warning in caplog.text


def test_chats_are_the_same_with_a_prefix_for_the_first_text_only(tmp_path: Path) -> None:
    tokenizer = bpe("first")
    file = written(tmp_path, tokenizer)
    turns = [{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": " Paris"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(turns)["input_ids"]
    by_text, by_ids = (llamacpp.logprobs(file, [given], size=VOCABULARY) for given in (text.removeprefix("<s>"), ids))
    assert np.abs(by_text - by_ids).max() <= 1e-6


def test_spaces_after_special_tokens_are_dropped_as_in_phi_3(tmp_path: Path) -> None:
    kept = ("<unk>", "<s>", "<|endoftext|>")
    tokenizer = bpe("prefix", added=(AddedToken("<|endoftext|>", normalized=False, special=True),))
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in stored["added_tokens"]:
        token["rstrip"] = token["content"] not in kept
    tokenizer = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    file = written(tmp_path, tokenizer, name="mine")
    texts = ["a<|user|>\n b", "<|user|>  x</s> \n<|user|>", "<|endoftext|> a"]
    assert different(file, tokenizer, texts) == []
    assert reader.read(file).metadata["general.name"] == "mine (phi-3)"
    back = build(reader.read(file).metadata)
    assert [back(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


def test_name_does_not_make_llamacpp_drop_spaces(tmp_path: Path) -> None:
    file = written(tmp_path, tiny_tokenizer(), name="my-phi3-model")
    assert reader.read(file).metadata["general.name"] == "my-phi_3-model"
    assert different(file, tiny_tokenizer(), ["a<|im_end|> b"]) == []


# The character map of a Unigram


def charsmap(replaced: dict[str, str]) -> bytes:
    """Return SentencePiece's map of these characters: a double array of their bytes, and the texts they become."""
    trie: dict[Any, Any] = {}
    texts, offsets = b"", {}
    for key, text in replaced.items():
        offsets[key], texts = len(texts), texts + text.encode() + b"\0"
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = offsets[key]
    units, used = {0: 0}, {0}

    def place(position: int, node: dict[int, Any]) -> None:
        base = next(b for b in range(1, 4096) if not {position ^ b ^ byte for byte in node} & used)
        used.update(position ^ base ^ byte for byte in node)
        units[position] |= base << 10 | (0 in node) << 8
        for byte, child in node.items():
            if byte == 0:
                units[position ^ base] = child | 1 << 31
            else:
                units[position ^ base ^ byte] = byte
                place(position ^ base ^ byte, child)

    place(0, trie)
    array = struct.pack(f"<{max(units) + 1}I", *(units.get(i, 0) for i in range(max(units) + 1)))
    return struct.pack("<I", len(array)) + array + texts


@pytest.mark.parametrize("merges", [False, True])
def test_unigram_with_a_character_map_is_cut_the_same(merges: bool, tmp_path: Path) -> None:
    tokenizer = unigram("always")
    steps = [normalizers.Precompiled(charsmap({"Ａ": "A", "ﬁ": "fi", "\t": " ", "\u3000": " ", "é": "e"}))]
    if merges:
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), SPACE)]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    texts = ["Ａ ﬁne café\tin\u3000Paris", "the ﬁrst", *PLAIN[:2], "a <|user|>b"]
    texts += ["  two   spaces  ", " x  y"] if merges else []
    assert tokenizer.tokenize("ﬁ") == tokenizer.tokenize("fi")
    file = written(tmp_path, tokenizer)
    assert different(file, tokenizer, texts) == []
    back = build(reader.read(file).metadata)
    assert [text for text in texts if back(text)["input_ids"] != tokenizer(text)["input_ids"]] == []


# What is refused


def stored_with(tokenizer: Any, change: Any) -> Any:
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    change(stored)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(stored))
    return tokenizer


def without_a_merge(stored: dict[str, Any]) -> None:
    by_result: dict[str, int] = {}
    for left, right in stored["model"]["merges"]:
        by_result[left + right] = by_result.get(left + right, 0) + 1
    several = next(i for i, (a, b) in enumerate(stored["model"]["merges"]) if by_result[a + b] > 1)
    del stored["model"]["merges"][several]


def without_a_byte(stored: dict[str, Any]) -> None:
    stored["model"]["vocab"]["<byte>"] = stored["model"]["vocab"].pop("<0xFF>")


def with_alien(stored: dict[str, Any]) -> None:
    stored["model"]["vocab"]["ӿab"] = len(stored["model"]["vocab"])


def with_inner_space(stored: dict[str, Any]) -> None:
    stored["model"]["vocab"].append([f"e{SPACE}t", -3.0])
    stored["pre_tokenizer"]["split"] = True


REFUSED = [
    (bpe, "prefix", without_a_merge, "would join .* which is no merge of the tokenizer"),
    (bpe, "prefix", without_a_byte, "needs a token for each byte, but <0xFF> is missing"),
    (bpe, "prefix", with_alien, "no token for each character of 'ӿab'"),
    (bpe, "prefix", lambda s: s.update(normalizer={"type": "NFKC"}), "does not have these steps: .*NFKC"),
    (unigram, "first", with_inner_space, "splits text at every space, llama.cpp does not"),
    (bpe, "prefix", lambda s: s["added_tokens"][3].update(rstrip=True), r"'<\|user\|>' has rstrip=true"),
    (bpe, "prefix", lambda s: s["added_tokens"][3].update(normalized=True), "has normalized=true, .* add it with"),
    (bpe, "prefix", lambda s: s["model"].update(dropout=0.1), "has a dropout that a GGUF file cannot express"),
    (unigram, "prefix", lambda s: s["model"].update(byte_fallback=True), "no byte fallback for a Unigram"),
]


@pytest.mark.parametrize(("make", "kind", "change", "message"), REFUSED)
def test_tokenizers_that_llamacpp_does_not_have_are_refused(make: Any, kind: str, change: Any, message: str) -> None:
    tokenizer = stored_with(make(kind), change)
    with pytest.raises(ConfigError, match=message):
        gguf_tokenizer.metadata(tokenizer, VOCABULARY, [2])


def test_word_piece_is_refused() -> None:
    tokenizer = bpe("prefix")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "a"])}
    tokenizer._tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    with pytest.raises(ConfigError, match=r"byte-level BPE and SentencePiece can be written .* type WordPiece"):
        gguf_tokenizer.metadata(tokenizer, VOCABULARY, [2])


@pytest.mark.parametrize("mutant", ["prefix", "scores", "types"])
def test_comparison_finds_wrong_metadata(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = described.described

    def wrong(*given: Any) -> dict[str, Any]:
        values = right(*given)
        match mutant:
            case "prefix":
                values["tokenizer.ggml.add_space_prefix"] = False
            case "scores":
                values["tokenizer.ggml.scores"] = [-score for score in values["tokenizer.ggml.scores"]]
            case "types":
                values["tokenizer.ggml.token_type"] = [1 if t == 3 else t for t in values["tokenizer.ggml.token_type"]]
        return values

    monkeypatch.setattr(described, "described", wrong)
    monkeypatch.setattr(gguf_tokenizer, "_check", lambda *given: None)
    tokenizer = bpe("prefix")
    assert different(written(tmp_path, tokenizer), tokenizer, [*PLAIN, *SPECIALS]) != []


def test_a_text_that_would_be_cut_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bpe("prefix")
    values = gguf_tokenizer.metadata(tokenizer, VOCABULARY, [2])
    values["tokenizer.ggml.scores"] = [-score for score in values["tokenizer.ggml.scores"]]
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    assert described.check(stored, build(values)) is not None
