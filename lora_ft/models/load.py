"""Load a base model: its tokenizer, and its frozen, optionally quantized weights on one device.

    base = load_base(cfg.model, cfg.quant, "auto")
    base.model        LlamaForCausalLM: eval mode, nothing requires a gradient
    base.tokenizer    with model.chat_template and model.added_tokens applied
    base.quantized    ("model.layers.0.self_attn.q_proj", ..., "model.layers.0.mlp.experts.down_proj"), or ()
    base.identity     the record of the base in lora_ft.json

On a CPU, weights whose stored dtype is the requested one stay in the mapped file: they take no memory of their own,
and several processes share them.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_ft import config
from lora_ft.classes import HEAD, Classes
from lora_ft.errors import ConfigError
from lora_ft.models import build, heads, quantize, stored
from lora_ft.models.build import first_line, quiet
from lora_ft.models.cpu_embedding import keep_on_cpu
from lora_ft.models.device import auto_dtype, resolve_device, resolve_dtype
from lora_ft.models.resolve import Identity, locate
from lora_ft.models.storage import copy_mapped_weights
from lora_ft.models.weight_source import Source, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Base", "Identity", "load_base", "load_tokenizer", "read_tokenizer"]

log = logging.getLogger("lora_ft")


@dataclass(frozen=True)
class Base:
    """A frozen model in eval mode, its tokenizer, its identity, and the names of its quantized layers and experts."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    identity: Identity
    quantized: tuple[str, ...]


def load_tokenizer(model: config.Model) -> "PreTrainedTokenizerBase":
    """Load the base's fast tokenizer with model.chat_template and model.added_tokens applied; reads no weights.

    Raises the errors of `locate`, and ConfigError for a tokenizer without a fast version, a template that does not
    parse, or an added token that is empty, repeated or in the vocabulary already.
    """
    tokenizer = read_tokenizer(Path(locate(model, weights=False).folder or ""), model.path)
    if model.chat_template is not None:
        tokenizer.chat_template = _read_template(Path(model.chat_template).expanduser())
    _add_tokens(tokenizer, model.added_tokens)
    return tokenizer


def read_tokenizer(folder: Path, source: str) -> Any:
    """Read the fast tokenizer of a folder; raises ConfigError, which names `source`, if it cannot be read."""
    with quiet():
        try:
            tokenizer = _tokenizer_class(folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"the tokenizer of {source} cannot be loaded: {first_line(error)}") from None
        except Exception as error:
            # transformers does not validate the JSON files, and the package tokenizers raises bare Exceptions only.
            if type(error) not in (Exception, KeyError, TypeError, AttributeError):
                raise
            raise ConfigError(
                f"the tokenizer of {source} cannot be loaded: its files do not describe a tokenizer ({error!r})"
            ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {source} has no fast version: add its tokenizer.json")
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    # To choose a class, AutoTokenizer imports model code for a second; a plain tokenizer.json does not need it.
    from transformers import PreTrainedTokenizerFast

    described = folder / "tokenizer_config.json"
    name = json.loads(described.read_text("utf-8")).get("tokenizer_class") if described.is_file() else None
    if name in ("PreTrainedTokenizerFast", "TokenizersBackend") and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _read_template(path: Path) -> str:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = path.read_text("utf-8")
        _compile_jinja_template(template)
    except OSError as error:
        raise ConfigError(f"model.chat_template={path}: {error.strerror}") from None
    except (jinja2.TemplateSyntaxError, SyntaxError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}:{getattr(error, 'lineno', 1)}: not a Jinja template: {error}") from None
    return template


def _add_tokens(tokenizer: Any, tokens: list[str]) -> None:
    known = tokenizer.get_vocab()
    for i, token in enumerate(tokens):
        if not token.strip() or token in known or token in tokens[:i]:
            rule = f"is already token {known[token]}" if token in known else "is empty or repeated"
            raise ConfigError(f"model.added_tokens: {token!r} {rule}: remove it")
    tokenizer.add_tokens(tokens)


def load_base(
    model: config.Model,
    quant: config.Quant,
    device: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    model_class: Any = None,
    classes: Classes | None = None,
    rows: int | None = None,
) -> Base:
    """Load a frozen base in `model.dtype` on `device`, with its linear layers and experts quantized as `quant` selects.

    `model_class` is a class of transformers, by default AutoModelForCausalLM; with `classes` the base gets a head for
    them (models/heads.py). `rows` is the size of an embedding that an adapter will put in the place of the base's, None
    if it has none: the tokenizer may have as many tokens. Rows of added tokens start as the mean of the rows of the
    existing tokens, independent of any seed. Raises the errors of `locate`, ConfigError for weights that do not match
    the config, and ResourceError if memory is too small.
    """
    identity = locate(model)
    target = resolve_device(device)
    dtype = resolve_dtype(model.dtype, target)
    if model.dtype is config.Dtype.auto and (reason := auto_dtype(target)[1]):
        log.info(reason)
    compute = dtype if quant.compute_dtype is config.Dtype.auto else resolve_dtype(quant.compute_dtype, target)
    files, quant = identity.stored, stored.agreed(quant, identity.stored)
    tokenizer = tokenizer or load_tokenizer(model)
    if classes and files and files.skipped is not None:  # the files name what they do not quantize, and have no head
        files = replace(files, skipped=(*files.skipped, HEAD))
    settings = quantize.bitsandbytes_config(quant, compute, files if files and files.trains else None)
    described = None
    if classes:
        described = build.read_config(Path(str(identity.folder)), model.path)
        heads.describe(described, classes, tokenizer)
    source = Source(model.path, Path(str(identity.folder)), settings, files, described)
    network = load_weights(source, dtype, target, model_class or heads.auto_class(classifies=classes is not None))
    if files and not files.trains:
        stays = "what can stay in that form does" if settings is None else "dequantized"
        log.info("weights in %s: %s", files.method, stays)
    quantized: tuple[str, ...] = ()
    if quant.kind is not config.QuantKind.none:
        if files and files.trains:
            quantize.adopt(network, files, dtype)
        quantized = quantize.check_plan(network, files)
        quantize.settle(network, quantized)
        if not (files and files.trains):  # otherwise the codes stay mapped
            copy_mapped_weights(network)
    fit_embeddings(network, tokenizer, len(model.added_tokens), rows)
    if model.embedding_device == "cpu":
        keep_on_cpu(network, target)
    return Base(network.requires_grad_(False).eval(), tokenizer, identity, quantized)


def fit_embeddings(network: Any, tokenizer: Any, num_added: int, later_rows: int | None = None) -> None:
    """Set the row of each added token, in the embedding and in the head, to the mean of the existing tokens' rows.

    Models often have more rows than their tokenizer has tokens, which were never trained. Added tokens use these
    rows first, and the mean does not include them. `later_rows` is the size of an embedding that will replace this one.
    """
    rows, tokens = network.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens - num_added > (most := later_rows or rows):
        raise ConfigError(
            f"the tokenizer has {tokens - num_added} tokens, but the model has only {most} embedding rows: "
            "they do not belong together"
        )
    if not num_added:
        return
    if tokens > rows:
        gpus = [network.device] if network.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), quiet():  # resizing draws numbers, overwritten below
            network.resize_token_embeddings(tokens, mean_resizing=False)
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    for matrix in [end.weight for end in ends if end is not None]:  # a classifier has no head over the vocabulary
        matrix.data[tokens - num_added : tokens] = matrix.data[: tokens - num_added].mean(dim=0, dtype=torch.float32)
