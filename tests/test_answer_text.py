"""The text of an answer's tokens by the chat templates of real models: its thought, and nothing else around it."""

import json

import pytest
from real_templates import TOKENS, real_tokenizer

from lora_ft.config import Data
from lora_ft.data import thoughts
from lora_ft.data.dataset import prepare
from lora_ft.evaluation.answer_text import AnswerText
from lora_ft.evaluation.generation import _end_of_turn

QUESTION = {"role": "user", "content": "What is 2+2?"}
ANSWERS = {
    "plain": {"content": "It is four.\nReally."},
    "thought": {"content": "It is four.\nReally.", "reasoning_content": "Two and two\nare four."},
    "one word": {"content": "final"},
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", TOKENS)
def test_the_tokens_that_training_supervises_decode_to_the_answer(name, answer, tmp_path):
    tokenizer, path = real_tokenizer(name), tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [QUESTION, {"role": "assistant", **ANSWERS[answer]}]}))
    template = {"thinking": answer == "thought"} if name == "deepseek_v3_1" else {}
    [example] = prepare(Data(path=str(path), eval_fraction=0, max_length=1000, template=template), tokenizer).train
    ids = example.ids[example.supervised].tolist()
    prompt = tokenizer.decode(example.ids[~example.supervised])
    stops = {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    end = next(i for i, token in enumerate(ids) if token in stops)
    text, pieces = AnswerText(tokenizer), [""]
    for count in range(1, end + 1):
        piece = text(ids[:count])
        assert piece.startswith(pieces[-1])
        pieces.append(piece)
    assert thoughts.after(pieces[-1], prompt) == ANSWERS[answer]["content"]
