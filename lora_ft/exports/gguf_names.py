"""What llama.cpp calls a model's layers, and how it lays their matrices out.

    model.layers.0.self_attn.q_proj  ->  blk.0.attn_q        rows of each head in another order (llama only)
    transformer.h.0.attn.c_attn      ->  blk.0.attn_qkv      GPT-2's Conv1D keeps [in, out], GGUF [out, in]

The names are the gguf package's own table. What llama.cpp's graph of an architecture does not compute is refused
here, before anything is written: it would load, and answer something else.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map

from lora_ft.errors import ConfigError

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3, "gpt2": MODEL_ARCH.GPT2,
}  # fmt: skip
_ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh")}
_CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class Layout:
    """How GGUF stores a model: the architecture's name, the model's config, and the names of its tensors."""

    architecture: str
    config: Any
    names: TensorNameMap

    def name(self, module: str) -> str | None:
        """GGUF's name of a layer, without .weight or .bias; None where the architecture has no such layer."""
        found: str | None = self.names.get_name(module)
        return found

    def rows(self, module: str, values: np.ndarray) -> np.ndarray:
        """A weight [out, in], a bias [out] or a LoRA's B [out, r] with its rows in GGUF's order.

        Rotary halves (0..n/2, n/2..n) of each head become pairs (0, n/2, 1, n/2 + 1, ...), in llama's q and k.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rpartition(".")[2])
        if self.architecture != "llama" or heads is None:
            return values
        count = getattr(self.config, heads)
        if values.shape[0] % (2 * count):
            raise ConfigError(f"{module} has {values.shape[0]} rows, which are no {count} heads of an even size")
        half = values.shape[0] // count // 2
        return values.reshape(count, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)

    def weight(self, module: str, values: np.ndarray) -> np.ndarray:
        """A layer's own weight in GGUF's layout; LoRA's A and B of a Conv1D are [r, in] and [out, r] already."""
        transposed = self.architecture == "gpt2" and module.endswith(_CONV1D)
        return self.rows(module, values.T if transposed else values)


def layout(base_config: dict[str, Any]) -> Layout:
    """The layout for a base's config.json; ConfigError for an architecture, or a setting of it, that GGUF lacks."""
    kind = base_config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ConfigError(f"GGUF files are written for models of type {', '.join(_ARCHITECTURES)}, got {kind}")
    config = read_config(base_config)
    activation = config.activation_function if kind == "gpt2" else config.hidden_act
    if activation not in _ACTIVATIONS.get(kind, ("silu",)):
        raise ConfigError(f"llama.cpp computes {kind} with {_ACTIVATIONS.get(kind, ('silu',))[0]}, not {activation}")
    if kind == "gpt2" and (not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx):
        raise ConfigError("llama.cpp scales GPT-2's attention by the root of the head's size, and by nothing else")
    architecture = _ARCHITECTURES[kind]
    return Layout(MODEL_ARCH_NAMES[architecture], config, get_tensor_name_map(architecture, config.num_hidden_layers))


def read_config(base_config: dict[str, Any]) -> Any:
    """transformers' config object for the fields of a config.json; ConfigError where they contradict each other."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**base_config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"config.json of the base is not one of a {base_config['model_type']}: {reason}") from None
