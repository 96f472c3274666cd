"""The chat templates of real models in tests/templates, with a tiny tokenizer that has their control tokens.

tokenizer = real_tokenizer("qwen3")
"""

from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

FOLDER = Path(__file__).parent / "templates"

_CHATML = ("<|im_start|>", "<|im_end|>")
_DEEPSEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
)  # fmt: skip
_MISTRAL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]")  # fmt: skip

# For each template: the beginning-of-text token, the end token, and other special tokens.
TOKENS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _DEEPSEEK),
    "deepseek_v3_1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _DEEPSEEK),
    "gemma3": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "gpt_oss": ("<|startoftext|>", "<|return|>",
                ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")),
    "granite3_3": ("<|end_of_text|>", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "ministral3_reasoning": ("<s>", "</s>", (*_MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[THINK]",
                                             "[/THINK]")),
    "mistral_nemo": ("<s>", "</s>", _MISTRAL),
    "phi3_5": ("<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", _CHATML),
    "qwen3": ("<|endoftext|>", "<|im_end|>", _CHATML),
    "qwen3_5_think": ("<|endoftext|>", "<|im_end|>", _CHATML),
    "seed_oss": ("<seed:bos>", "<seed:eos>", ()),
}  # fmt: skip
# Added tokens that are not special, as in the models' own tokenizers.
_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<seed:think>", "</seed:think>", "<seed:tool_call>",
          "</seed:tool_call>")  # fmt: skip


def real_tokenizer(name: str) -> Any:
    """Return the tiny tokenizer with the chat template of a real model and its control tokens."""
    tokenizer = tiny_tokenizer()
    bos, eos, others = TOKENS[name]
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
    tokenizer.add_special_tokens({"additional_special_tokens": [*others]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens([*_PLAIN])
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text("utf-8")
    return tokenizer
