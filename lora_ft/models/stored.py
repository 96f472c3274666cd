"""Bases whose files hold quantized weights: what config.json tells of them, and what it means for a run.

bitsandbytes, 4 and 8 bits       trained as stored: the codes and scales of the files are those of the run
fp8, mxfp8, fbgemm_fp8           linear layers as stored, with the numbers of dequantized ones (stored_layers.py);
                                 with `quant`, dequantized exactly while they are loaded, and quantized again
mxfp4                            experts, in the same way
gptq, awq                        dequantized exactly while they are loaded (dequantized_files.py); `quant` applies to
                                 the result
other methods                    refused before a download, with the id of the model in 16 bits

of(json.loads(config_json), hub_id)  ->  Stored(method="bitsandbytes", kind=QuantKind.nf4, double=True, skipped=None)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_ft import config
from lora_ft.config import QuantKind
from lora_ft.errors import ConfigError
from lora_ft.io import untrusted

_BITSANDBYTES = "bitsandbytes"
FP8 = ("fp8", "mxfp8", "fbgemm_fp8")
_DEQUANTIZED = (*FP8, "mxfp4", "gptq", "awq")
_STORAGE = ("uint8", "int8", "bfloat16", "float16", "float32", "float64")

# Ends of the names of quantized models, as their publishers choose them.
_SUFFIX = re.compile(
    r"([-_.](unsloth|bnb|[48]-?bit|gptq|gptqmodel|awq|autoround|auto-round|fp8|mxfp4|mxfp8|nvfp4|int[348]|w\d+a\d+|g\d+|"
    r"\d+g|dynamic|block|channel|static|tensor|hqq|quanto|eetq|aqlm|2bit-1x16|torchao|quantized|marlin))+$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Stored:
    """The quantization of the weights in a base's files.

    method: its name in transformers. kind, double: of weights that train as they are stored; kind is none for weights
    that are dequantized while they are loaded. skipped: names or patterns of modules that are not quantized, None for
    transformers' own choice. storage: dtype of the tensors that hold 4-bit codes. settings: the quantization_config,
    of weights that are dequantized.
    """

    method: str
    kind: QuantKind
    double: bool = False
    skipped: tuple[str, ...] | None = None
    storage: str = "uint8"
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def trains(self) -> bool:
        """True if the weights train as they are stored; False if they are dequantized."""
        return self.kind is not QuantKind.none

    @property
    def is_fp8(self) -> bool:
        """True for 8-bit floats, of which linear layers may stay as they are stored (scaled_layers.py)."""
        return self.method in FP8

    def record(self) -> dict[str, Any]:
        """Return the fields for lora_ft.json."""
        kind = {"kind": self.kind.value} if self.trains else {}
        double = {"double": self.double} if self.kind in (QuantKind.nf4, QuantKind.fp4) else {}
        return {"method": self.method, **kind, **double}


def of(settings: Mapping[str, Any], named: str, hub_id: str | None = None) -> Stored | None:
    """Read the quantization from the contents of config.json; None for weights in 16 or 32 bits.

    Raises ConfigError, which names the base as `named`, for a method that cannot be trained here.
    """
    found = _quantization(settings)
    if found is None:
        return None
    method = method_of(found)
    if method not in (_BITSANDBYTES, *_DEQUANTIZED) or not isinstance(found, Mapping):
        raise ConfigError(
            f"{named} is already quantized ({method}), and weights of this kind cannot be trained here: "
            f"{_remedy(settings, hub_id)}, and choose quant=..."
        )
    try:
        return _read(method, found)
    except ValueError as error:
        raise ConfigError(
            f"{named} is already quantized ({method}), in a way that cannot be trained here: {error}: "
            f"{_remedy(settings, hub_id)}, and choose quant=..."
        ) from None


def of_config(model_config: Any) -> Stored | None:
    """Return the quantization that a config of transformers names, which `of` has checked; None without one."""
    found = getattr(model_config, "quantization_config", None)
    if found is None:
        found = getattr(model_config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    return _read(method_of(found), found)


def _read(method: str, found: Mapping[str, Any]) -> Stored:
    return _bitsandbytes(found) if method == _BITSANDBYTES else _dequantized(method, found)


def agreed(quant: config.Quant, stored: Stored | None) -> config.Quant:
    """Return the quantization in which a base trains: that of its files, if these train as stored, else `quant`.

    Raises ConfigError if both are given and differ. `quant.double` is a property of the files and is taken from them.
    """
    if stored is None or not stored.trains:
        return quant
    if quant.kind not in (QuantKind.none, stored.kind):
        raise ConfigError(
            f"quant={quant.kind.value}: the weights of this base are stored in {stored.kind.value} ({stored.method}), "
            f"and train as they are stored: leave out quant, or set model.path to the model in 16 bits for "
            f"quant={quant.kind.value}"
        )
    return replace(quant, kind=stored.kind, double=stored.double)


def method_of(found: Any) -> str:
    """Return transformers' name of the method in a quantization_config."""
    if not isinstance(found, Mapping):
        return str(found)
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return _BITSANDBYTES
    return str(found.get("quant_method", "unknown"))


def _quantization(settings: Mapping[str, Any]) -> Any:
    found = settings.get("quantization_config")
    text = settings.get("text_config")
    return text.get("quantization_config") if found is None and isinstance(text, Mapping) else found


def _bitsandbytes(found: Mapping[str, Any]) -> Stored:
    """Read a quantization_config of bitsandbytes; raises ValueError if a field cannot be used."""
    skipped = found.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise ValueError("llm_int8_skip_modules must be a list of names")
    names = None if skipped is None else tuple(skipped)
    if found.get("load_in_8bit"):
        return Stored(_BITSANDBYTES, QuantKind.int8, skipped=names)
    if not found.get("load_in_4bit"):
        raise ValueError("neither load_in_4bit nor load_in_8bit is true")
    kind, double = found.get("bnb_4bit_quant_type", "fp4"), found.get("bnb_4bit_use_double_quant", False)
    storage = str(found.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"bnb_4bit_quant_type must be nf4 or fp4, got {kind}")
    if not isinstance(double, bool):
        raise ValueError(f"bnb_4bit_use_double_quant must be true or false, got {double}")
    if storage not in _STORAGE:
        raise ValueError(f"bnb_4bit_quant_storage must be one of {', '.join(_STORAGE)}, got {storage}")
    return Stored(_BITSANDBYTES, QuantKind(kind), double, names, storage)


def _dequantized(method: str, found: Mapping[str, Any]) -> Stored:
    """Read a quantization_config of another method; raises ValueError for a layout that is not known here."""
    bits, layout = found.get("bits", 4), str(found.get("checkpoint_format") or found.get("format") or "gptq").lower()
    if method == "gptq" and (bits not in (2, 4, 8) or layout not in ("gptq", "gptq_v2")):
        raise ValueError(f"it has {bits} bits in the layout {layout}; known are 2, 4 and 8 bits in gptq and gptq_v2")
    layout = str(found.get("version") or found.get("format") or "gemm").lower()
    if method == "awq" and (found.get("bits", found.get("w_bit", 4)) != 4 or layout != "gemm"):
        raise ValueError(f"it has {bits} bits in the layout {layout}; known are 4 bits in the layout gemm")
    blocks = found.get("weight_block_size")
    if blocks is not None and not (
        isinstance(blocks, list | tuple) and len(blocks) == 2 and all(type(size) is int and size > 0 for size in blocks)
    ):
        raise ValueError(f"weight_block_size must be two positive integers, got {blocks}")
    return Stored(method, QuantKind.none, settings={**found, "quant_method": method, "bits": bits})


def _remedy(settings: Mapping[str, Any], hub_id: str | None) -> str:
    """Return the advice to take the model in 16 bits, with its id if that can be found or guessed."""
    for key in ("base_model", "_name_or_path"):
        named = settings.get(key)
        if untrusted.is_hub_id(named) and "/" in str(named) and named != hub_id and not _SUFFIX.search(str(named)):
            return f"set model.path to the model in 16 bits (config.json names {named} as its source)"
    short = _SUFFIX.sub("", hub_id or "")
    if hub_id and short != hub_id:
        return f"set model.path to the model in 16 bits (by its name probably {short})"
    return "set model.path to the model in 16 bits"
