"""Name and lay out the weights of a transformers model as llama.cpp expects; refuse models it computes differently.

model.layers.0.self_attn.q_proj  ->  blk.0.attn_q        rows of each head interleaved (llama only)
transformer.h.0.attn.c_attn      ->  blk.0.attn_qkv      GPT-2's Conv1D has [in, out], GGUF [out, in]
model.norm (Gemma)               ->  output_norm         GGUF has weight + 1
mlp.experts.gate_up_proj         ->  blk.0.ffn_gate_exps, blk.0.ffn_up_exps    [experts, out, in] each
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_ft.errors import ConfigError
from lora_ft.models import families


@dataclass(frozen=True)
class Layout:
    """The family of a base and its transformers config."""

    family: families.Family
    config: Any

    def name(self, module: str) -> str | None:
        """Return GGUF's name of a module, without .weight or .bias; None if the model has no such module."""
        return self.family.gguf_name(module, self.config.num_hidden_layers)

    def rows(self, module: str, values: np.ndarray) -> np.ndarray:
        """Reorder the rows of a weight [out, in], a bias [out] or LoRA's B [out, r] as GGUF has them."""
        reorder = self.family.rows(module, self.config, stored=False)
        if reorder is None:
            return values
        heads = self.family.rotary_heads(module, self.config)
        if heads and values.shape[0] % (2 * heads):
            raise ConfigError(f"{module} has {values.shape[0]} rows, which cannot be split into {heads} heads of an "
                              "even size")  # fmt: skip
        reordered: np.ndarray = reorder(values)
        return reordered

    def tensors(self, parameter: str) -> tuple[str, ...]:
        """Return GGUF's names of the tensors of a parameter, two for experts' gate and up; raises ConfigError."""
        names = self.family.tensor_names(parameter, self.config.num_hidden_layers)
        if names is None:
            raise ConfigError(f"a GGUF file of architecture {self.family.architecture} has no tensor for {parameter}")
        return names

    def shape(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each tensor of a parameter."""
        if self.family.is_transposed(parameter.rpartition(".")[0]):
            shape = shape[::-1]
        parts = len(self.tensors(parameter))
        return shape if parts == 1 else (*shape[:-2], shape[-2] // parts, shape[-1])

    def arrays(self, parameter: str, values: np.ndarray) -> list[np.ndarray]:
        """Lay out a parameter as its tensors; A and B of LoRA need no transposition, even for a Conv1D."""
        module = parameter.rpartition(".")[0]
        if parts := len(self.tensors(parameter)) - 1:
            return np.split(values, parts + 1, axis=-2)
        values = values.T if self.family.is_transposed(module) else values
        rows, offset = self.rows(module, values), self.family.offset(module)
        return [rows + np.float32(offset) if offset else rows]


def layout_of(base_config: dict[str, Any]) -> Layout:
    """Return the layout for a base's config.json; raises ConfigError for a model that llama.cpp does not compute."""
    family, config = family_and_config(base_config, "GGUF files")
    for name, limit in family.limits.items():
        values = limit(config) if callable(limit) else limit
        if (found := getattr(config, name, None)) not in values:
            raise ConfigError(f"llama.cpp computes {family.model_type} with {name}={values[0]}, but config.json of the "
                              f"base has {name}={found}")  # fmt: skip
    return Layout(family, config)


def family_and_config(
    base_config: dict[str, Any], output: str, rows: tuple[families.Family, ...] = families.FAMILIES
) -> tuple[families.Family, Any]:
    """Return the family and transformers' config object for the fields of config.json.

    Raises ConfigError for an unknown family, which names the `output` that cannot be written, or an invalid config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    family = next((row for row in rows if row.model_type == base_config.get("model_type")), None)
    if family is None:
        known = ", ".join(row.model_type for row in rows)
        raise ConfigError(f"{output} can be written for models of type {known}, got {base_config.get('model_type')}")
    try:
        return family, AutoConfig.for_model(**base_config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"config.json of the base is not valid for model type {family.model_type}: {reason}"
        ) from None
