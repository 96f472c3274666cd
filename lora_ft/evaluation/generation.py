"""Generate answers: many prompts in batches, or one prompt with its text streamed.

prompt    <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n
answer    4 <|im_end|>                 cut before the stop token, or at the maximal length

A batch is padded on the left; attention mask and position ids hide the padding:

    . . . 2 + 2 ? | 4 <|im_end|>
    What is pi? . | 3 . 14 <|im_end|>   (the longest prompt of a batch is not padded)

Answers are those of transformers' `generate`. They depend only on `config.Sampling` and the seed: the model's own
generation_config (top_k, repetition penalty, ...) is not used. The global random state is restored.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from lora_ft import config
from lora_ft.errors import ConfigError, NonFiniteError
from lora_ft.evaluation.answer_text import AnswerText
from lora_ft.models.acceleration import dequantized_weights, plain_attention
from lora_ft.models.path_choice import longest_shared
from lora_ft.ops.dropout import evaluating

# Control characters to escape: a model can write any, and terminals interpret them.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_UNFINISHED = "\ufffd"
_PAD = 0  # any token would do: it is masked, and tokens after a stop token are not read
_PROMPT = 8  # tokens of a prompt that is computed with and without padding
_MIN_TEMPERATURE = 1e-6  # below it, sampling would only choose between rounding errors


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    sampling: config.Sampling,
    seed: int,
    tokens_per_batch: int = 4096,
) -> list[str]:
    """Answer prompts (int [length], generation prompt included); return their texts (`AnswerText`) in order.

    Decoding is greedy at temperature 0, in batches of at most `tokens_per_batch` tokens (prompts, padding and answers).
    A sampled answer must depend only on its prompt and the seed, so sampling uses batches of one. The model's mode,
    attention and generation settings are restored. Raises ConfigError for a prompt that fills the model's context,
    NonFiniteError for logits that are NaN or infinite.
    """
    answers, text = [""] * len(prompts), AnswerText(tokenizer)
    stops = stop_tokens(model, tokenizer)
    limit = 0 if _samples(sampling) else tokens_per_batch
    lengths, rooms = [len(p) for p in prompts], _rooms(model, prompts, sampling)
    longest = max(map(sum, zip(lengths, rooms, strict=True)), default=0)
    with _inference(model):
        can_pad = len(set(lengths)) > 1 and limit > 0 and _can_pad(model, longest)
        for indices, room in _batches(lengths, rooms, can_pad, limit):
            batch = [prompts[i] for i in indices]
            for i, ids in zip(indices, _new_tokens(model, batch, room, sampling, seed, stops), strict=True):
                answers[i] = text(ids)
    return answers


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: np.ndarray,
    sampling: config.Sampling,
    seed: int,
    on_text: Callable[[str], None],
) -> str:
    """Answer one prompt as `generate` does, and pass each piece of text to `on_text` while the answer is computed."""
    stops, text = stop_tokens(model, tokenizer), AnswerText(tokenizer)
    [room] = _rooms(model, [prompt], sampling)
    pieces = _Pieces(text, stops, on_text)
    with _inference(model):
        [ids] = _new_tokens(model, [prompt], room, sampling, seed, stops, pieces)
    return text(ids)


def _samples(sampling: config.Sampling) -> bool:
    return sampling.temperature >= _MIN_TEMPERATURE


def _rooms(model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: config.Sampling) -> list[int]:
    """Return the most new tokens of each answer: `max_new_tokens`, or as many as fit into the model's context."""
    context = context_length(model)
    if (longest := max(map(len, prompts), default=0)) >= context:
        raise ConfigError(f"the prompt has {longest} tokens, which leaves no room in the model's context of {context}")
    return [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]


def _can_pad(model: PreTrainedModel, longest: int) -> bool:
    """Return True if padding changes no result up to `longest` tokens: the model hides it, in every kind of layer."""
    limit = longest_shared(model)
    accepts = inspect.signature(model.forward).parameters.keys() >= {"attention_mask", "position_ids"}
    return accepts and (limit is None or longest <= limit) and _hides_padding(model)


@torch.no_grad()
def _hides_padding(model: PreTrainedModel) -> bool:
    """Compare the logits of a short prompt with and without padding; recurrent layers may take it into their state."""
    ids = torch.arange(_PROMPT + 1, _PROMPT + 1 + _PROMPT, device=model.device)
    mask, positions = torch.ones_like(ids), torch.arange(_PROMPT, device=model.device)
    padding = torch.zeros_like(ids)
    alone = model(input_ids=ids[None], attention_mask=mask[None], position_ids=positions[None], use_cache=False).logits[
        0, -1
    ]
    padded = model(
        input_ids=torch.cat([padding + _PAD, ids])[None],
        attention_mask=torch.cat([padding, mask])[None],
        position_ids=torch.cat([padding, positions])[None],
        use_cache=False,
    ).logits[0, -1]
    allowed = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((padded - alone).float().norm() <= allowed * alone.float().norm())


def _batches(lengths: list[int], rooms: list[int], can_pad: bool, tokens: int) -> Iterator[tuple[list[int], int]]:
    """Yield the indices of each batch, longest prompts first, and the most new tokens of its answers.

    Without padding, all prompts of a batch have the same length.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for (room, _), group in groupby(order, key=lambda i: (rooms[i], can_pad or lengths[i])):
        indices = list(group)
        while indices:
            size = max(1, tokens // (lengths[indices[0]] + room))
            yield indices[:size], room
            del indices[:size]


@contextlib.contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode, plain attention and empty generation settings; restore them and the random state."""
    own_settings = model.generation_config
    devices = [] if model.device.type == "cpu" else [model.device]
    # `generate` takes settings that are not given from the model's own.
    model.generation_config = GenerationConfig()
    try:
        with (
            evaluating(model),
            torch.random.fork_rng(devices, device_type=model.device.type),
            plain_attention(model),
            dequantized_weights(model),
        ):
            yield
    finally:
        model.generation_config = own_settings


def _new_tokens(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    room: int,
    sampling: config.Sampling,
    seed: int,
    stops: set[int],
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return the ids of the answers to one batch of prompts, each up to its stop token."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), _PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    # top_k=0 disables it; the default is 50.
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if _samples(sampling) else {}
    settings = GenerationConfig(
        max_new_tokens=room, do_sample=bool(drawn), eos_token_id=sorted(stops) or None, pad_token_id=_PAD, **drawn
    )
    torch.manual_seed(seed)
    output: Tensor = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([_CheckFinite()]),
        streamer=streamer,
    )
    answers: list[list[int]] = output[:, longest:].tolist()
    return [answer[: next((i for i, token in enumerate(answer) if token in stops), None)] for answer in answers]


class _CheckFinite(LogitsProcessor):
    """Raise NonFiniteError for logits that are NaN or infinite; -inf is allowed, since it masks a token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not (scores < torch.inf).all():
            raise NonFiniteError(
                "the model's logits are not finite: weights of the base or the adapter are not finite, or too large"
            )
        return scores


class _Pieces(BaseStreamer):
    """Streamer that passes on text as tokens arrive; a character of several tokens is passed on as a whole."""

    def __init__(self, text: AnswerText, stops: set[int], on_text: Callable[[str], None]) -> None:
        self._text, self._stops, self._on_text = text, stops, on_text
        self._ids: list[int] = []
        self._sent = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt ([1, length], ignored), then each new token ([1])."""
        if value.ndim == 1 and (token := int(value)) not in self._stops:
            self._ids.append(token)
            # Decoding all tokens again costs far less than the model's forward pass.
            text = self._text(self._ids)
            if not text.endswith(_UNFINISHED):
                self._send(text)

    def end(self) -> None:
        """Pass on the rest: the bytes of an incomplete character."""
        self._send(self._text(self._ids))

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            piece, self._sent = text[self._sent :], len(text)
            self._on_text(piece)


def context_length(model: PreTrainedModel) -> int:
    """Return the most tokens that the model can read; practically unlimited if the architecture has no limit."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 62)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: EOS of model and tokenizer, and the end-of-turn token of the template."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    found = set(listed if isinstance(listed, list) else [listed])
    return (found | {tokenizer.eos_token_id, _end_of_turn(tokenizer)}) - {None}


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the added token that the chat template writes after an answer; it may differ from EOS."""
    if not tokenizer.chat_template:
        return None
    answer = "two"
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": answer}]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except jinja2.TemplateError:  # the template refuses this chat; EOS remains a stop token
        return None
    after = tokenizer.encode(rendered.rpartition(answer)[2].strip(), add_special_tokens=False)
    return after[0] if after and after[0] in tokenizer.added_tokens_decoder else None


def visible(text: str) -> str:
    """Escape control characters except newline and tab, so that text is safe to show in a terminal."""
    return text.translate(_CONTROLS)
