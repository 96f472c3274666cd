"""Tell a classifier from a language model, make the head of a classifier, and find the head of either.

    language model   hidden states -> lm_head -> a logit for each token of the vocabulary
    classifier       hidden state of the last token -> score -> a logit for each class

The files of a base hold no `score`: its first values are drawn from a fixed seed, the same on every machine. Training
trains a copy of it, which the adapter stores.
"""

import copy
from typing import Any

import torch
from torch import nn

from lora_ft.classes import HEAD, Classes, listed
from lora_ft.errors import ConfigError

_STD = 0.02  # of a config that names no initializer_range


def is_classifier(model: Any) -> bool:
    """Return True for a model of transformers' class for sequence classification, with or without adapter inside."""
    return isinstance(getattr(model, HEAD, None), nn.Module) and model.get_output_embeddings() is None


def head(model: Any) -> Any:
    """Return the module that makes the logits; None for a model without one."""
    return getattr(model, HEAD) if is_classifier(model) else model.get_output_embeddings()


def auto_class(*, classifies: bool) -> Any:
    """Return the Auto class of transformers for a classifier, or for a language model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def describe(model_config: Any, classes: Classes, tokenizer: Any = None) -> None:
    """Write the classes into a config of transformers, and the tokenizer's padding token, by which it finds the last.

    Raises ConfigError for a family of which transformers has no classifier, and for a config that names other classes:
    one of a base that is a classifier already.
    """
    if type(model_config) not in auto_class(classifies=True)._model_mapping:
        raise ConfigError(
            f"transformers has no classifier for {model_config.model_type}: objective=sft trains the labels as text"
        )
    named = list(model_config.id2label.values())
    is_own = not all(name == f"LABEL_{index}" for index, name in enumerate(named))
    if is_own and named != list(classes.names):
        raise ConfigError(
            f"the base is a classifier of {len(named)} classes ({listed(named)}), and this run has "
            f"{len(classes.names)} ({listed(classes.names)}): take a base without a head, or the same classes in "
            "the same order"
        )
    for name, value in classes.config_fields().items():
        setattr(model_config, name, value)
    if tokenizer is not None:
        pad_token(tokenizer)
        for part in (model_config, model_config.get_text_config()):
            part.pad_token_id = tokenizer.pad_token_id


def with_classes(model_config: Any, classes: Classes | None) -> Any:
    """Return a copy of a config that describes the classes; the config itself without classes."""
    if classes is None:
        return model_config
    described = copy.deepcopy(model_config)
    describe(described, classes)
    return described


def pad_token(tokenizer: Any) -> None:
    """Let a tokenizer pad on the right, with its end-of-text token if it has no padding token.

    Positions that a model counts from the left of a row stay as they are in training. Raises ConfigError for a
    tokenizer without either token.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("objective=classification needs a tokenizer with a padding or an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token


def check(model: Any) -> None:
    """Raise ConfigError for a classifier whose head has another form than a linear layer named `score`."""
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no linear head named {HEAD}: objective=classification cannot train it; "
            "objective=sft trains the labels as text"
        )


@torch.no_grad()
def draw(model: Any) -> None:
    """Draw the first values of a head: normal, with the config's initializer_range; the global generator is unused."""
    found, generator = head(model), torch.Generator().manual_seed(0)
    std = getattr(model.config.get_text_config(), "initializer_range", None) or _STD
    found.weight.copy_(std * torch.randn(found.weight.shape, generator=generator))
    if found.bias is not None:
        found.bias.zero_()
