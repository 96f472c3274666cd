"""Tiny real objects for tests: random models of several families, and a tokenizer trained on the sentences below.

model = tiny_model("llama")              # 2 layers, hidden 64, 4 heads (2 of keys and values), vocabulary 512
tokenizer = tiny_tokenizer()             # byte-level BPE, ChatML, ids 0..3: bos, turn start, eos, pad
folder = tiny_folder(tmp_path, "gpt2")   # both, saved as transformers saves them
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lora_ft.classes import Classes
from lora_ft.models import heads

FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox")
# Mixtures of four experts, two per token; deepseek_v3 has them only in its second layer.
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoehybrid", "gpt_oss", "deepseek_v3")
VOCABULARY = 512
TOKEN_LIMIT = 256
BOS, TURN, EOS, PAD = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

# TURN role newline content EOS newline: ChatML as SmolLM2 and Qwen use it, without a default system turn.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "system user assistant tool",
    "You are a helpful assistant that answers in short sentences.",
    "What is the capital of France? The capital of France is Paris.",
    "How many legs does a spider have? A spider has eight legs, an insect has six.",
    "The quick brown fox jumps over the lazy dog while the other dogs are sleeping.",
    "Training small adapters for large language models needs little memory and little time.",
    "If there are 12 apples and you take away 7, then 5 apples are left; 3.14 is close to pi.",
    "def add(first, second):\n    return first + second\n",
    "Translate to German: good morning. Guten Morgen! Ça va, naïve café? Καλημέρα, 你好, 👋",
    "Once upon a time there was a tree, and under the tree lived something that nobody had ever seen.",
)

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": VOCABULARY}


def tiny_model(family: str, *, tie: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a random model in eval mode, the same for the same arguments; the global generator does not change.

    The standard deviation of the weights is larger than usual (0.1), so that logits differ by more than rounding.
    """
    shared = {"tie_word_embeddings": tie, "initializer_range": 0.1, "max_position_embeddings": TOKEN_LIMIT, **IDS}
    match family:
        case "gpt2":
            config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_inner=128, **shared)
        case "llama":
            config = LlamaConfig(num_key_value_heads=2, **SIZES, **shared)
        case "qwen3":
            config = Qwen3Config(num_key_value_heads=2, head_dim=16, **SIZES, **shared)
        case "gpt_neox":
            config = GPTNeoXConfig(**SIZES, **shared)
        case "mixtral":
            config = MixtralConfig(num_local_experts=4, **EXPERTS, **SIZES, **shared)
        case "qwen2_moe":
            config = Qwen2MoeConfig(
                num_experts=4, moe_intermediate_size=128, shared_expert_intermediate_size=128,
                **EXPERTS, **SIZES, **shared,
            )  # fmt: skip
        case "qwen3_moe":
            config = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=128, head_dim=16, **EXPERTS, **SIZES, **shared)
        case "granitemoe":
            config = GraniteMoeConfig(num_local_experts=4, **EXPERTS, **SIZES, **shared)
        case "granitemoehybrid":
            config = GraniteMoeHybridConfig(
                num_local_experts=4, layer_types=["mamba", "attention"], shared_intermediate_size=128,
                mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1,
                **EXPERTS, **SIZES, **shared,
            )  # fmt: skip
        case "gpt_oss":
            config = GptOssConfig(num_local_experts=4, head_dim=16, **EXPERTS, **SIZES, **shared)
        case "deepseek_v3":
            config = DeepseekV3Config(
                n_routed_experts=4, moe_intermediate_size=128, first_k_dense_replace=1, n_group=1, topk_group=1,
                q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
                **EXPERTS | {"num_key_value_heads": 4}, **SIZES, **shared,
            )  # fmt: skip
        case _:
            raise ValueError(f"no tiny model of family {family}: there are {', '.join((*FAMILIES, *MIXTURES))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_classifier(family: str, classes: Classes, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the same model with a head for classes, as loading a base makes it."""
    model = tiny_model(family, dtype=dtype)
    heads.describe(model.config, classes)
    with torch.random.fork_rng(devices=[]):
        made = AutoModelForSequenceClassification.from_config(model.config, dtype=dtype)
    made.load_state_dict(model.state_dict(), strict=False)
    heads.draw(made)
    return made.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 512 tokens with a ChatML template; it reads any text and adds no special token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        additional_special_tokens=[TURN], chat_template=CHATML, model_max_length=TOKEN_LIMIT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_folder(
    tmp_path: Path, family: str, *, tie: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Save a tiny model and the tiny tokenizer into `tmp_path/family` and return that folder."""
    folder = tmp_path / family
    tiny_model(family, tie=tie, dtype=dtype, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
