"""Load a base model without its weights: modules, names and shapes from config.json, on torch's meta device.

    base = load_meta_model(cfg.model, cfg.quant, cfg.device, tokenizer)    # 8B parameters without memory

This takes a quarter of a second, where weights take seconds to minutes, and does not download the weights of a hub id.
So errors in an adapter's settings are found early. Quantized layers are plain layers here, with the same names and
shapes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_ft import config
from lora_ft.classes import Classes
from lora_ft.models import build, heads, load
from lora_ft.models.cpu_embedding import keep_on_cpu
from lora_ft.models.device import resolve_device, resolve_dtype
from lora_ft.models.load import Base
from lora_ft.models.resolve import locate
from lora_ft.models.stored import agreed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_meta_model(
    model: config.Model,
    quant: config.Quant,
    device: str,
    tokenizer: "PreTrainedTokenizerBase",
    model_class: Any = None,
    classes: Classes | None = None,
    rows: int | None = None,
) -> Base:
    """Return the base that `load_base` loads for these settings, with its parameters on the meta device.

    `rows` is that of `load_base`. Raises the errors of `load_base`, except those that only the weights can show.
    """
    identity = locate(model, weights=False)
    agreed(quant, identity.stored)
    target = resolve_device(device)
    dtype = resolve_dtype(model.dtype, target)
    if quant.compute_dtype is not config.Dtype.auto:
        resolve_dtype(quant.compute_dtype, target)
    folder = Path(str(identity.folder))
    described = build.read_config(folder, model.path)
    if classes:
        heads.describe(described, classes, tokenizer)
    network = build.on_meta(
        described, dtype, model_class or heads.auto_class(classifies=classes is not None), model.path
    )
    if classes:
        heads.check(network)
    if found := build.read_generation_config(folder, model.path):  # its end tokens may differ from those of config.json
        network.generation_config = found
    load.fit_embeddings(network, tokenizer, len(model.added_tokens), rows)
    if model.embedding_device == "cpu":
        keep_on_cpu(network, torch.device("meta"))
    return Base(network.requires_grad_(False).eval(), tokenizer, identity, ())


def read_config(model: config.Model) -> Any:
    """Read the config of a base, of transformers' class; raises the errors of `locate`."""
    return build.read_config(Path(str(locate(model, weights=False).folder)), model.path)
