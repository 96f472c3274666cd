"""Answers: transformers' greedy ones, a seed's own drawn ones, whole characters, and no side effects."""

import numpy as np
import pytest
import torch
from tiny import BOS, EOS, FAMILIES, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from lora_ft import config
from lora_ft.config import Sampling
from lora_ft.errors import ConfigError, NonFiniteError
from lora_ft.evaluation.generation import choose, generate, stop_tokens, visible
from lora_ft.ops.token_loss import choose_paths

TOKENIZER = tiny_tokenizer()
PROMPT = np.array(TOKENIZER.encode("What is the capital"), dtype=np.int32)


class Scripted(torch.nn.Module):
    """A model that answers with given tokens, whatever it is asked."""

    def __init__(self, model: PreTrainedModel, tokens: list[int]) -> None:
        super().__init__()
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device
        self.set_attn_implementation = lambda name: None
        self.tokens, self.step = tokens, 0

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        logits[0, -1, self.tokens[self.step]] = 9
        self.step += 1
        return type("Output", (), {"logits": logits, "past_key_values": None})


def scripted(tokens: list[int]) -> Scripted:
    return Scripted(tiny_model("llama"), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_answer_is_the_one_of_transformers(family: str) -> None:
    model = tiny_model(family)
    choose_paths(model, config.Fast())  # packed attention, as in training: generation must take the plain one
    ours = generate(model, TOKENIZER, PROMPT, Sampling(max_new_tokens=12), seed=0)
    model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(PROMPT).long()[None]
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
    )[0, len(PROMPT) :].tolist()
    stops = stop_tokens(model, TOKENIZER)
    end = next((i for i, token in enumerate(theirs) if token in stops), len(theirs))
    assert ours == TOKENIZER.decode(theirs[:end], skip_special_tokens=True)


def test_a_drawn_answer_depends_on_its_seed_alone() -> None:
    model, sampling = tiny_model("llama"), Sampling(max_new_tokens=20, temperature=1.5)
    torch.manual_seed(1)
    first = generate(model, TOKENIZER, PROMPT, sampling, seed=5)
    torch.manual_seed(2)
    assert generate(model, TOKENIZER, PROMPT, sampling, seed=5) == first
    assert generate(model, TOKENIZER, PROMPT, sampling, seed=6) != first


def test_drawing_follows_the_softmax_of_the_logits_over_the_temperature() -> None:
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    drawn = [choose(logits, Sampling(temperature=2.0), generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    expected = (logits / 2).softmax(dim=0)
    assert torch.allclose(shares, expected, atol=4 * (0.25 / len(drawn)) ** 0.5)  # four standard errors


def test_top_p_keeps_the_likeliest_tokens_that_reach_it() -> None:
    logits, generator = torch.tensor([0.1, 0.5, 0.3, 0.1]).log(), torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(temperature=1.0, top_p=0.6), generator) for _ in range(300)}
    assert drawn == {1, 2}
    assert {choose(logits, Sampling(temperature=1.0, top_p=0.01), generator) for _ in range(50)} == {1}


def test_the_lowest_temperatures_are_greedy_and_do_not_overflow() -> None:
    logits = torch.tensor([3e38, 1.0, 3.1e38])
    assert choose(logits, Sampling(temperature=1e-30), torch.Generator().manual_seed(0)) == 2


def test_generation_leaves_mode_attention_and_generator_as_they_were() -> None:
    model = tiny_model("llama").train()
    choose_paths(model, config.Fast())
    before = model.config._attn_implementation, torch.get_rng_state()
    generate(model, TOKENIZER, PROMPT, Sampling(max_new_tokens=3, temperature=1.0), seed=0)
    assert model.training and torch.is_grad_enabled()
    assert model.config._attn_implementation == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_model_that_fails_is_given_back_as_well() -> None:
    model = tiny_model("llama").train()
    choose_paths(model, config.Fast())

    def fail(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, TOKENIZER, PROMPT, Sampling(max_new_tokens=9), 0, fail)
    assert model.training and torch.is_grad_enabled() and model.config._attn_implementation != "sdpa"


@pytest.mark.parametrize("text", ["Ça va, naïve café? 👋 Καλημέρα 你好", "a\ufffdb \ufffd", "plain"])
def test_pieces_are_whole_characters_that_join_to_the_answer(text: str) -> None:
    ids = TOKENIZER.encode(text)
    pieces: list[str] = []
    answer = generate(
        scripted([*ids, TOKENIZER.eos_token_id]), TOKENIZER, PROMPT, Sampling(max_new_tokens=200), 0, pieces.append
    )
    assert answer == "".join(pieces) == text
    assert len(pieces) > 1 or len(ids) == 1
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_is_told_as_it_is() -> None:
    ids = TOKENIZER.encode("x👋")[:-1]
    pieces: list[str] = []
    answer = generate(scripted(ids), TOKENIZER, PROMPT, Sampling(max_new_tokens=len(ids)), 0, pieces.append)
    assert answer == "".join(pieces)
    assert answer.startswith("x")


def test_the_end_of_a_turn_stops_an_answer_although_it_is_not_the_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = BOS  # as base models with ChatML have it
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 8]
    turn_end = tokenizer.convert_tokens_to_ids(EOS)
    assert stop_tokens(model, tokenizer) == {7, 8, tokenizer.eos_token_id, turn_end}
    ids = tokenizer.encode("Paris")
    replying = scripted([*ids, turn_end, *ids])
    assert generate(replying, tokenizer, PROMPT, Sampling(max_new_tokens=50), 0) == "Paris"
    tokenizer.chat_template = None
    assert stop_tokens(model, tokenizer) == {7, 8, tokenizer.eos_token_id}


def test_an_answer_ends_where_the_context_does() -> None:
    model = tiny_model("gpt2")
    prompt = np.full(250, 9, dtype=np.int32)
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.generation_config.eos_token_id = None
    generate(model, TOKENIZER, prompt, Sampling(max_new_tokens=50), seed=0)
    assert len(seen) <= 6


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the prompt has 256 tokens, which leaves no room .* context of 256"):
        generate(tiny_model("llama"), TOKENIZER, np.full(256, 9), Sampling(), seed=0)


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(NonFiniteError, match="not numbers"):
        generate(model, TOKENIZER, PROMPT, Sampling(max_new_tokens=2), seed=0)


def test_control_characters_are_shown_and_not_sent() -> None:
    assert visible("a\x1b[31mb\x07\x9bc\r\n\td") == "a\\x1b[31mb\\x07\\x9bc\\x0d\n\td"
