"""One answer of a model, token by token, with a key-value cache; reproducible and without side effects.

    prompt   <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n
    answer   4 <|im_end|>                  ends before the stop token, or at the longest length allowed
    pieces   "4"                           text as it grows; a character of several tokens arrives whole

transformers' own `generate` draws from the global generator and reads sampling settings that came with the
model (a top_k of 50 unless told otherwise); here only `config.Sampling` and the seed decide.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft import config
from lora_ft.errors import ConfigError, NonFiniteError
from lora_ft.ops.attention import plain_attention
from lora_ft.ops.dequantized import unpacked_weights

# Terminals obey control characters, and a model can write any: they are shown, not sent.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_UNFINISHED = "\ufffd"


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: np.ndarray,
    sampling: config.Sampling,
    seed: int,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to a prompt (int [length], generation prompt included), without special tokens.

    `on_text` receives the pieces that make up the answer as they are known. Greedy at temperature 0, else
    drawn by a generator of its own: same seed, same answer. The model's mode and attention are given back.
    Raises ConfigError for a prompt that leaves no room in the model's context, NonFiniteError for NaN logits.
    """
    context = context_length(model)
    if len(prompt_ids) >= context:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens, which leaves no room in the model's context of {context}"
        )
    longest = min(sampling.max_new_tokens, context - len(prompt_ids))
    stops = stop_tokens(model, tokenizer)
    ids: list[int] = []
    text = told = ""
    with _inference(model):
        for token in _tokens(model, prompt_ids, longest, sampling, seed):
            if token in stops:
                break
            ids.append(token)
            # Decoding all of it each time costs far less than the model's step, and leaves nothing to patch together.
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if on_text and len(text) > len(told) and not text.endswith(_UNFINISHED):
                on_text(text[len(told) :])
                told = text
    if on_text and len(text) > len(told):
        on_text(text[len(told) :])
    return text


@contextlib.contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with plain_attention(model), unpacked_weights(model), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _tokens(
    model: PreTrainedModel, prompt_ids: np.ndarray, longest: int, sampling: config.Sampling, seed: int
) -> Iterator[int]:
    """Token after token, each from the logits [V] behind the last one; the first step reads the whole prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.as_tensor(prompt_ids, dtype=torch.int64, device=model.device)[None]
    # The head over a whole prompt would fill memory with logits of which one row is read.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = None
    for _ in range(longest):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **last_only)
        cache = output.past_key_values
        token = choose(output.logits[0, -1].float(), sampling, generator)
        yield token
        ids = torch.tensor([[token]], device=model.device)


def choose(logits: Tensor, sampling: config.Sampling, generator: torch.Generator) -> int:
    """The next token for logits [V]: the likeliest, or drawn from the likeliest ones that hold `top_p`.

    Drawing happens on the CPU, so that a seed means the same on every device.
    """
    if torch.isnan(logits).any():
        raise NonFiniteError("the model's logits are not numbers: its weights, or the adapter's, are broken")
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.cpu().double()
    scaled = (logits - logits.max()) / sampling.temperature  # at most 0: nothing overflows at a low temperature
    probabilities, tokens = scaled.softmax(dim=-1).sort(descending=True, stable=True)
    # A token stays if those before it hold less than top_p: the first one always does.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that the model can read; some architectures name no limit, which is taken as none."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 62)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the model's and the tokenizer's end of text, and the template's end of turn."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    found = set(listed if isinstance(listed, list) else [listed])
    return (found | {tokenizer.eos_token_id, _end_of_turn(tokenizer)}) - {None}


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the chat template puts right behind an answer, which may not be the tokenizer's eos."""
    if not tokenizer.chat_template:
        return None
    answer = "two"
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": answer}]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except jinja2.TemplateError:  # it wants other chats than this one; the end of text is a stop token all the same
        return None
    behind = tokenizer.encode(rendered.rpartition(answer)[2].strip(), add_special_tokens=False)
    return behind[0] if behind and behind[0] in tokenizer.added_tokens_decoder else None


def visible(text: str) -> str:
    """Text that is safe to show in a terminal: control characters but newline and tab are spelled out."""
    return text.translate(_CONTROLS)
