"""Generation: equal to transformers, independent of batching, sampled by seed, streamed in whole characters."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from tiny import BOS, EOS, FAMILIES, SENTENCES, VOCABULARY, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig, Phi3Config, PreTrainedModel
from zoo import zoo_model

from lora_ft import config
from lora_ft.config import Sampling
from lora_ft.errors import ConfigError, NonFiniteError
from lora_ft.evaluation.generation import _can_pad, generate, stop_tokens, stream, visible
from lora_ft.models.acceleration import accelerate

TOKENIZER = tiny_tokenizer()
PROMPT = np.array(TOKENIZER.encode("What is the capital"), dtype=np.int32)
PROMPTS = [np.array(TOKENIZER.encode(text)[:length]) for text in SENTENCES for length in (4, 13)]


def scripted(tokens: Iterable[int]) -> PreTrainedModel:
    """Make a model that answers any prompt with the given tokens."""
    model, script = tiny_model("llama"), iter(tokens)

    def replace_logits(module: object, args: object, output: object) -> None:
        output.logits[:] = 0  # type: ignore[attr-defined]
        output.logits[:, -1, next(script)] = 9  # type: ignore[attr-defined]

    model.register_forward_hook(replace_logits)
    return model


def with_probabilities(shares: list[float]) -> PreTrainedModel:
    """Make a model that gives the tokens 10, 11, ... these probabilities after any text."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None

    def replace_logits(module: object, args: object, output: object) -> None:
        output.logits[:] = -torch.inf  # type: ignore[attr-defined]
        output.logits[:, -1, 10 : 10 + len(shares)] = torch.tensor(shares).log()  # type: ignore[attr-defined]

    model.register_forward_hook(replace_logits)
    return model


def sampled_tokens(model: PreTrainedModel, sampling: Sampling, answers: int = 1) -> list[int]:
    """Return the tokens of answers with different seeds, except the last of each, which the model does not read."""
    found: list[int] = []

    def record(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            found.append(int(kwargs["input_ids"]))

    model.register_forward_pre_hook(record, with_kwargs=True)
    for seed in range(answers):
        generate(model, TOKENIZER, [PROMPT], sampling, seed)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_those_of_transformers(family: str) -> None:
    model = tiny_model(family)
    accelerate(model, config.Fast())  # sets the packed attention of training, which generation must not use
    [ours] = generate(model, TOKENIZER, [PROMPT], Sampling(max_new_tokens=12), seed=0)
    model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(PROMPT).long()[None]
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
    )[0, len(PROMPT) :].tolist()
    stops = stop_tokens(model, TOKENIZER)
    end = next((i for i, token in enumerate(theirs) if token in stops), len(theirs))
    assert ours == TOKENIZER.decode(theirs[:end], skip_special_tokens=True)


def unpadded_model() -> PreTrainedModel:
    """Make a Bloom, which takes no position ids, so its prompts are grouped by length."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1, eos_token_id=2)
    ).eval()


def sliding_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        MistralConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=8, initializer_range=0.1, eos_token_id=2, max_position_embeddings=256,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, "sliding", "unpadded"])
def test_batched_greedy_answers_equal_single_ones_in_order(family: str) -> None:
    model = {"sliding": sliding_model, "unpadded": unpadded_model}.get(family, lambda: tiny_model(family))()
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    sampling = Sampling(max_new_tokens=8)
    together = generate(model, TOKENIZER, PROMPTS, sampling, 0, tokens_per_batch=150)
    batches = [shape for shape in shapes if shape[1] > 1]
    assert together == [generate(model, TOKENIZER, [prompt], sampling, 0)[0] for prompt in PROMPTS]
    assert len(set(together)) > len(PROMPTS) / 2
    assert 1 < len(batches) < len(PROMPTS) and all(rows * (length + 8) <= 150 for rows, length in batches)
    if family == "unpadded":
        lengths = Counter({length: 0 for _, length in batches})
        for rows, length in batches:
            lengths[length] += rows
        assert lengths == Counter(len(prompt) for prompt in PROMPTS)


def test_a_long_prompt_does_not_change_the_rotary_frequencies_of_others() -> None:
    """The frequencies of longrope depend on the largest position of a forward pass."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4,
            "original_max_position_embeddings": 24, "factor": 8.0}  # fmt: skip
    settings = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=24, pad_token_id=3,
        rope_parameters=rope, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    prompts = [np.arange(10, 10 + length) for length in (4, 40)]
    alone = [generate(model, TOKENIZER, [prompt], Sampling(max_new_tokens=8), 0)[0] for prompt in prompts]
    assert generate(model, TOKENIZER, prompts, Sampling(max_new_tokens=8), 0) == alone


def test_a_long_prompt_does_not_shorten_other_answers() -> None:
    model = tiny_model("gpt2")  # its position table ends at 256
    model.generation_config.eos_token_id = None
    prompts = [PROMPT, np.full(250, 9), PROMPT[:3], np.full(251, 9)]
    sampling = Sampling(max_new_tokens=30)
    together = generate(model, TOKENIZER, prompts, sampling, 0)
    assert together == [generate(model, TOKENIZER, [prompt], sampling, 0)[0] for prompt in prompts]


def test_a_sampled_answer_depends_only_on_prompt_and_seed() -> None:
    model, sampling = tiny_model("llama"), Sampling(max_new_tokens=20, temperature=1.5)
    torch.manual_seed(1)
    [first] = generate(model, TOKENIZER, [PROMPT], sampling, seed=5)
    torch.manual_seed(2)
    assert generate(model, TOKENIZER, [PROMPTS[0], PROMPT], sampling, seed=5)[1] == first
    assert generate(model, TOKENIZER, [PROMPT], sampling, seed=6) != [first]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generation_settings_of_the_model_are_not_used(temperature: float) -> None:
    model, sampling = tiny_model("llama"), Sampling(max_new_tokens=20, temperature=temperature)
    [plain] = generate(model, TOKENIZER, [PROMPT], sampling, 0)
    own = {"top_k": 1, "top_p": 0.1, "repetition_penalty": 3.0, "do_sample": True, "min_new_tokens": 20}
    model.generation_config.update(**own)
    assert generate(model, TOKENIZER, [PROMPT], sampling, 0) == [plain]
    assert {name: getattr(model.generation_config, name) for name in own} == own


def test_sampling_follows_temperature_and_top_p() -> None:
    model = with_probabilities([0.1, 0.5, 0.3, 0.1])
    drawn = sampled_tokens(model, Sampling(max_new_tokens=200, temperature=2.0, top_p=0.75), answers=3)
    # The square roots are .32 .71 .55 .32; the two largest have less than 0.75 of the sum, so a third one is kept.
    assert set(drawn) in ({10, 11, 12}, {11, 12, 13})
    share = drawn.count(11) / (drawn.count(11) + drawn.count(12))
    assert share == pytest.approx(0.5**0.5 / (0.5**0.5 + 0.3**0.5), abs=4 * 0.5 / len(drawn) ** 0.5)
    assert set(sampled_tokens(model, Sampling(max_new_tokens=40, temperature=1.0, top_p=0.01))) == {11}


def test_more_than_fifty_tokens_can_be_sampled() -> None:
    model = with_probabilities([1 - i / 1000 for i in range(90)])  # ever less likely, without ties
    assert len(set(sampled_tokens(model, Sampling(max_new_tokens=200, temperature=1.0)))) > 50


def test_temperatures_near_zero_are_greedy() -> None:
    model = tiny_model("llama")
    coldest = generate(model, TOKENIZER, [PROMPT], Sampling(max_new_tokens=9, temperature=1e-300), 0)
    cold = generate(model, TOKENIZER, [PROMPT], Sampling(max_new_tokens=9, temperature=1e-6), 0)
    assert coldest == cold == generate(model, TOKENIZER, [PROMPT], Sampling(max_new_tokens=9), 0)


def test_generation_restores_mode_attention_and_random_state() -> None:
    model = tiny_model("llama").train()
    accelerate(model, config.Fast())
    before = model.config._attn_implementation, torch.get_rng_state()
    generate(model, TOKENIZER, [PROMPT], Sampling(max_new_tokens=3, temperature=1.0), seed=0)
    assert model.training and torch.is_grad_enabled()
    assert model.config._attn_implementation == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_an_interrupted_answer_restores_the_model_and_the_random_state() -> None:
    model = tiny_model("llama").train()
    accelerate(model, config.Fast())
    own_settings, state = model.generation_config, torch.get_rng_state()

    def fail(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(model, TOKENIZER, PROMPT, Sampling(max_new_tokens=9, temperature=1.0), 0, fail)
    assert model.training and torch.is_grad_enabled() and model.config._attn_implementation != "sdpa"
    assert model.generation_config is own_settings and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("text", ["Ça va, naïve café? 👋 Καλημέρα 你好", "a\ufffdb \ufffd", "plain"])
def test_pieces_are_whole_characters_that_join_to_the_answer(text: str) -> None:
    ids = TOKENIZER.encode(text)
    pieces: list[str] = []
    model = scripted([*ids, TOKENIZER.eos_token_id])
    answer = stream(model, TOKENIZER, PROMPT, Sampling(max_new_tokens=200), 0, pieces.append)
    assert answer == "".join(pieces) == text
    assert len(pieces) > 1 or len(ids) == 1
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_is_passed_on() -> None:
    ids = TOKENIZER.encode("x👋")[:-1]
    pieces: list[str] = []
    answer = stream(scripted(ids), TOKENIZER, PROMPT, Sampling(max_new_tokens=len(ids)), 0, pieces.append)
    assert answer == "".join(pieces)
    assert answer.startswith("x")


def test_the_end_of_turn_token_stops_an_answer_if_it_is_not_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = BOS  # as in base models with ChatML
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7, 8]
    turn_end = tokenizer.convert_tokens_to_ids(EOS)
    assert stop_tokens(model, tokenizer) == {7, 8, tokenizer.eos_token_id, turn_end}
    ids = tokenizer.encode("Paris")
    replying = scripted([*ids, turn_end, *ids])
    assert generate(replying, tokenizer, [PROMPT], Sampling(max_new_tokens=50), 0) == ["Paris"]
    tokenizer.chat_template = None
    assert stop_tokens(model, tokenizer) == {7, 8, tokenizer.eos_token_id}


def test_an_answer_ends_at_the_end_of_the_context() -> None:
    model = tiny_model("gpt2")
    prompt = np.full(250, 9, dtype=np.int32)
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.generation_config.eos_token_id = None
    generate(model, TOKENIZER, [prompt], Sampling(max_new_tokens=50), seed=0)
    assert 1 <= len(seen) <= 6


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the prompt has 256 tokens, which leaves no room .* context of 256"):
        generate(tiny_model("llama"), TOKENIZER, [PROMPT, np.full(256, 9)], Sampling(), seed=0)


def test_non_finite_logits_are_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        generate(model, TOKENIZER, [PROMPT], Sampling(max_new_tokens=2), seed=0)


def test_control_characters_are_escaped() -> None:
    assert visible("a\x1b[31mb\x07\x9bc\r\n\td") == "a\\x1b[31mb\\x07\\x9bc\\x0d\n\td"


@pytest.mark.parametrize(("name", "pads"), [("recurrent_gemma", False), ("jamba", True), ("mamba", False)])
def test_recurrent_models_answer_in_batches_as_alone(name: str, pads: bool) -> None:
    model, tokenizer = zoo_model(name), TOKENIZER
    sampling = Sampling(max_new_tokens=12)
    batch = [np.arange(5, 5 + length) * 7 % 512 for length in (6, 9, 9, 13)]
    assert _can_pad(model, 64) is pads
    together = generate(model, tokenizer, batch, sampling, 0)
    assert together == [generate(model, tokenizer, [prompt], sampling, 0)[0] for prompt in batch]
    ids = torch.tensor(batch[0])[None]
    for _ in range(3):  # without a cache
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert together[0].startswith(tokenizer.decode(ids[0, 6:], skip_special_tokens=True))
