"""Load the weights of a base through transformers, and check that they are those of its config.

plain files            transformers reads, and quantizes them if it is told to
as stored              transformers reads codes and scales; the dtype of products is ours, not that of the files
other quantizations    transformers reads tensors that are dequantized on access (dequantized_files.py)
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_ft.classes import HEAD
from lora_ft.errors import ConfigError, ResourceError
from lora_ft.models import build, heads, quantize_experts, stored_layers
from lora_ft.models.build import first_line, quiet
from lora_ft.models.dequantized_files import open_tensors
from lora_ft.models.resolve import weight_files
from lora_ft.models.stored import Stored

# Old checkpoints contain the causal mask's fill value, a constant, which not every model class declares.
_MASK = re.compile(r"\.masked_bias$")


@dataclass(frozen=True)
class Source:
    """The folder of a base, the setting that names it, transformers' config of its quantization, and that of its files.

    `quantization` is None for weights that stay, or become, unquantized. `described` is the config of a classifier,
    whose head may be missing in the files; None for a language model.
    """

    path: str
    folder: Path
    quantization: Any
    files: Stored | None
    described: Any = None

    def arguments(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that name and quantize the weights; `stack` keeps files open."""
        config = {"config": self.described} if self.described else {}
        if self.files is None:
            return {"pretrained_model_name_or_path": self.folder, "quantization_config": self.quantization} | config
        described = self.described or build.read_config(self.folder, self.path)
        for part in (described, described.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        if self.files.trains:
            # A quantization in the config replaces the argument, so our dtype of the products goes there.
            described.quantization_config = self.quantization.to_dict()
            return {"pretrained_model_name_or_path": self.folder, "config": described}
        names = weight_files(self.folder, {path.name for path in self.folder.iterdir()})
        tensors = open_tensors(self.folder, names, self.files.settings, stack)
        return {
            "pretrained_model_name_or_path": None, "config": described, "state_dict": tensors,
            "quantization_config": self.quantization,
        }  # fmt: skip

    def load(self, model_class: Any, **arguments: Any) -> tuple[Any, Any]:
        """Call `from_pretrained` of `model_class`; return the model and transformers' report."""
        with contextlib.ExitStack() as stack:
            given = self.arguments(stack) | arguments
            if self.files and self.files.trains:
                return model_class.from_pretrained(**given)
            stack.enter_context(quantize_experts.while_loading())
            if self.files is None:
                return model_class.from_pretrained(**given)
            plain = build.on_meta(given["config"], torch.float32, model_class, self.path)
            loader = type(plain)  # the class behind an Auto class, which needs a folder
            if self.quantization is None:
                given["state_dict"], kept = stored_layers.apart(given["state_dict"], plain)
                loader = stored_layers.model_class(loader, kept)
            network, report = loader.from_pretrained(**given)
        network.__class__ = type(plain)
        stored_layers.settle(network, network.dtype)
        self._name(network)
        return network, report

    def _name(self, network: Any) -> None:
        """Give a network that was loaded from tensors what transformers reads beside the files."""
        network.name_or_path = network.config.name_or_path = str(self.folder)
        if found := build.read_generation_config(self.folder, self.path):
            network.generation_config = found


def load_weights(source: Source, dtype: torch.dtype, device: torch.device, model_class: Any) -> Any:
    """Load a network of `model_class`, a class of transformers; raises ConfigError or ResourceError."""
    from safetensors import SafetensorError

    path = source.path
    try:
        with quiet():
            network, report = source.load(
                model_class, dtype=dtype, device_map={"": device},
                use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are part of the report, which is checked below
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"model.path={path} does not fit into the memory of {device}: set quant=nf4, or choose a smaller model"
        ) from None
    except RuntimeError as error:
        if source.files:
            raise ConfigError(
                f"model.path={path}: the weights cannot be read, as config.json says they are quantized: weights and "
                "config.json do not belong together, or the memory is too small"
            ) from error
        if source.quantization is None:
            raise
        # transformers raises this one error for every failure of a quantization, including lack of memory.
        raise ResourceError(
            f"model.path={path} cannot be quantized on {device}; the most common reason is lack of memory: "
            "choose a smaller model, or another device"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model.path={path} cannot be loaded: {first_line(error)}") from None
    except Exception:
        build.on_meta(build.read_config(source.folder, path), dtype, model_class, path)  # the config may be the cause
        raise
    # transformers only logs this, and fills missing weights with random numbers.
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    if source.described:
        _check_head(source, report["mismatched_keys"])
        missing, unexpected = _settle_head(source, network, missing, unexpected)
    if absent := sorted(missing) or sorted(report["mismatched_keys"]):
        raise ConfigError(
            f"model.path={path}: the weights lack {absent[0]}, or its shape differs ({len(absent)} in all): "
            "weights and config.json do not belong together"
        )
    if extra := sorted(name for name in unexpected if not _MASK.search(name)):
        raise ConfigError(
            f"model.path={path}: the weights contain tensors that the model of config.json does not have: "
            f"{', '.join(extra[:3])} ({len(extra)} in all): weights and config.json do not belong together"
        )
    return network


def _check_head(source: Source, mismatched: Any) -> None:
    """Raise ConfigError for a base that is a classifier already, of another number of classes."""
    for name, in_files, expected in mismatched:
        if name.startswith(f"{HEAD}."):
            raise ConfigError(
                f"model.path={source.path} holds a head of {in_files[0]} classes, and this run has {expected[0]}: "
                "take a base without a head, or the classes of this one"
            )


def _settle_head(source: Source, network: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Draw the head of a classifier that the files do not hold; return what else is missing, and unexpected.

    The head of the language model in the files is not used.
    """
    heads.check(network)
    of_head = {name for name in missing if name.startswith(f"{HEAD}.")}
    if of_head:
        heads.draw(network)
    described = build.read_config(source.folder, source.path)
    language = build.on_meta(described, torch.float32, heads.auto_class(classifies=False), source.path)
    return missing - of_head, unexpected - set(language.state_dict())
