"""Real llama.cpp in this process (xllamacpp): the log-probabilities of the token that follows a prompt.

with_adapter = logprobs(tmp_path / "base.gguf", [[5, 99, 42]], adapter=tmp_path / "adapter.gguf")     # float64 [1, V]
assert distance(with_adapter, expected(peft_model)) <= ALLOWED
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from peft import PeftModel
from tiny import VOCABULARY

from lora_ft.config import GgufType
from lora_ft.export.gguf import adapter as gguf_adapter
from lora_ft.export.gguf import model as gguf_model

PROMPTS = [[5, 99, 42, 7, 300, 11], [11], [44, 20, 6, 350, 51, 8, 8, 90, 260, 33, 71, 2, 150]]
ALLOWED = 5e-3  # log-probabilities: llama.cpp reads GELU from a table of float16
_FORCED = [[20, 1000.0]]  # a printable token is generated, for half a character has no probabilities; they stay raw


def logprobs(model: Path, prompts: Sequence[list[int] | str], *, size: int, adapter: Path | None = None) -> np.ndarray:
    """Log-probabilities [prompts, size] of every next token after token ids, or after a text as it cuts it.

    Raises RuntimeError where llama.cpp refuses a file.
    """
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.warmup, settings.fit_params, settings.n_ctx, settings.verbosity = False, False, 64, -1
    # Everything in float32: the cache is float16 otherwise, and attention, too.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if adapter:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(settings)
    found = np.full((len(prompts), size), np.nan)
    for row, prompt in zip(found, prompts, strict=True):
        request = {"prompt": prompt, "n_predict": 1, "n_probs": size, "temperature": 0.0, "logit_bias": _FORCED}
        answer = server.handle_completions(request)
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    assert not np.isnan(found).any()
    return found


def expected(model: torch.nn.Module, prompts: Sequence[list[int]] = PROMPTS) -> np.ndarray:
    """Log-probabilities of a model of transformers, as `logprobs`."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, -1].double() for ids in prompts]
    return torch.log_softmax(torch.stack(rows), -1).numpy()


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max())


def with_files(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Write a base and an adapter of PEFT as GGUF files beside them; return what llama.cpp computes for PROMPTS."""
    gguf_model.write(base, base.parent / "base.gguf", GgufType.f32)
    written = base.parent / "adapter.gguf" if adapter else None
    if adapter:
        gguf_adapter.write(adapter, json.loads((base / "config.json").read_text()), written)
    return logprobs(base.parent / "base.gguf", PROMPTS, size=VOCABULARY, adapter=written)


def distance_of_adapter(model: PeftModel, adapter: Path, base: Path) -> float:
    """Return the distance of llama.cpp with an adapter from PEFT with it, which the adapter alone far exceeds."""
    found, wanted = with_files(base, adapter), expected(model)
    with model.disable_adapter():
        assert distance(expected(model), wanted) > 100 * ALLOWED
    return distance(found, wanted)
