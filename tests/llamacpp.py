"""Real llama.cpp in this process (xllamacpp): the log-probabilities of the token that follows a prompt.

with_adapter = logprobs(tmp_path / "base.gguf", [[5, 99, 42]], adapter=tmp_path / "adapter.gguf")     # float64 [1, V]
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xllamacpp

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
