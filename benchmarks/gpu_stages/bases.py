"""Bases with random weights in the published sizes, and rows of chosen lengths, written as folders and files.

    folder = base(setting, "qwen3_0_6b")                            # config, weights, tokenizer: any trainer loads it
    rows = write_rows(setting, mixed_lengths(8_192, 2_048), "rows")

A speed does not depend on the values of weights and tokens. The weights are drawn on the GPU and written tensor by
tensor: 16 GB for the 8B base, once for all stages. The tokenizer has a small vocabulary of words `w7`, one token each.
"""

import json
import math
import random
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gpu_stages.setting import Setting
from lora_ft.io import durable

if TYPE_CHECKING:
    import torch

WORDS = 500
EOS, PAD = "<eos>", "<pad>"
# ChatML in words of this vocabulary, for the commands that fill a template.
TEMPLATE = (
    "{% for message in messages %}{{ ' <turn> ' + message['role'] + ' ' + message['content'] + ' <eos> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <turn> assistant ' }}{% endif %}"
)

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip

Batch: TypeAlias = "list[torch.Tensor]"


def base(setting: Setting, shape: str, layers: int | None = None) -> Path:
    """Return the folder of a base with random bfloat16 weights; it is written by the first caller."""
    folder = setting.work / (shape if layers is None else f"{shape}_{layers}_layers")
    if not folder.exists():
        with durable.staged_folder(folder) as staging:
            write_tokenizer(staging)
            _write_model(staging, config_for(shape, layers), setting)
    return folder


def config_for(shape: str, layers: int | None = None) -> Any:
    """Return the config of a shape of benchmarks/shapes.py, or of `tiny`."""
    from shapes import config_of
    from transformers import LlamaConfig

    config: Any = LlamaConfig(**TINY) if shape == "tiny" else config_of(shape, layers)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 0, 1
    return config


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [EOS, PAD, "<turn>", "<unk>", "user", "assistant", "system", *(f"w{n}" for n in range(WORDS))]
    words = words[: TINY["vocab_size"]]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token="<unk>", chat_template=TEMPLATE
    ).save_pretrained(folder)


def _write_model(folder: Path, config: Any, setting: Setting) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied weights once
    specs = [durable.TensorSpec(name, "BF16", shape, math.prod(shape) * 2) for name, shape in shapes.items()]
    durable.write_tensors(folder / "model.safetensors", specs, _drawn(specs, setting.device), {"format": "pt"})


def _drawn(specs: list[durable.TensorSpec], device: str) -> Iterator[memoryview]:
    """Yield the bytes of each tensor: ones for norms, else normal with a standard deviation of 0.02."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    for spec in specs:
        tensor = torch.empty(spec.shape, dtype=torch.bfloat16, device=device)
        tensor = tensor.fill_(1) if tensor.ndim == 1 else tensor.normal_(0, 0.02, generator=generator)
        yield memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def equal_lengths(tokens: int, steps: int, length: int) -> list[int]:
    """Return the lengths of rows that fill `steps` steps of `tokens` tokens without padding."""
    return [min(length, tokens)] * (steps * max(1, tokens // length))


def mixed_lengths(tokens: int, longest: int, seed: int = 0) -> list[int]:
    """Return lengths that add up to `tokens`: lognormal with a mean of about 400, from 8 to `longest`."""
    drawn, lengths = random.Random(seed), [0]
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, longest, max(8, int(drawn.lognormvariate(math.log(300), 0.75)))))
    return lengths[1:]


def write_rows(setting: Setting, lengths: list[int], name: str) -> Path:
    """Write rows of plain text, supervised as a whole: each has its length in tokens, with the end token."""
    path, drawn = setting.work / f"{name}.jsonl", random.Random(0)
    texts = (" ".join(f"w{drawn.randrange(WORDS)}" for _ in range(length - 1)) for length in lengths)
    durable.write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def batches_of(rows: Path, tokens: int, steps: int) -> list[Batch]:
    """Return the token ids of each step's rows, as many as its tokens allow; the rows repeat if they do not suffice."""
    import torch

    texts = [json.loads(line)["text"] for line in rows.read_text("utf-8").splitlines()]
    documents = [torch.tensor([7 + int(word[1:]) for word in text.split()] + [0]) for text in texts]
    batches: list[Batch] = [[]]
    for document in islice(cycle(documents), steps * len(documents)):
        if batches[-1] and sum(map(len, batches[-1])) + len(document) > tokens:
            if len(batches) == steps:
                break
            batches.append([])
        batches[-1].append(document)
    return batches
