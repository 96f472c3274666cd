"""Record and check the base of an adapter, which PEFT's files do not identify, and print code that loads both.

{"format": 1, "base": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "weights_sha256": {...}, ...},
 "quant": {"kind": "nf4", "double": true}, "data_sha256": "...", "chat_template_sha256": "...", ...}
"""

import dataclasses
import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_ft import config, runs
from lora_ft.classes import Classes
from lora_ft.config import QuantKind
from lora_ft.data import template_variables
from lora_ft.errors import MismatchError
from lora_ft.io import untrusted
from lora_ft.models import build, heads, quantize
from lora_ft.models.load import Base, Identity
from lora_ft.models.stored import agreed

log = logging.getLogger("lora_ft")

RECORD = "lora_ft.json"
MERGE_WITH_PEFT = (
    "merge it with PEFT, and use the result as a model "
    "(PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(OUT))"
)
_FORMAT = 1

# What a classifier reads: no chat template, no end token; truncation cuts the end, where the tokenizer is asked to.
INPUT = "tokenizer(text)"

# With every other initialization, PEFT changes the base's own weights when it attaches the adapter.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Provenance:
    """The base of an adapter, the base's quantization, and the training rows.

    data_sha256: None if unknown. made_from: hashes of the adapters that it was computed from, and the method; None if
    it was trained. template: values of variables of the chat template, which its saved form has as defaults. labels:
    the answers that it was trained to choose from, in order; None for other answers. classes: those of a classifier.
    """

    base: Identity
    quant: config.Quant
    data_sha256: str | None
    made_from: dict[str, Any] | None = None
    template: template_variables.Variables = field(default_factory=dict)
    labels: list[str] | None = None
    classes: Classes | None = None


def record(tensors: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, source: Provenance) -> dict[str, Any]:
    """Return the contents of lora_ft.json; of the paths on this machine, only `model.path` is included."""
    return {
        "format": _FORMAT,
        "base": base_fields(source.base),
        "quant": _quant_fields(agreed(source.quant, source.base.stored)),
        "data_sha256": source.data_sha256,
        **({"made_from": source.made_from} if source.made_from else {}),
        **({"template": dict(source.template)} if source.template else {}),
        **({"labels": source.labels} if source.labels else {}),
        **({"classifier": source.classes.record() | {"input": INPUT}} if source.classes else {}),
        **_tokenizer_hashes(tokenizer),
        "tensors": {key: list(t.shape) for key, t in tensors.items()},
        "packages": runs.versions(),
    }


def base_fields(base: Identity) -> dict[str, Any]:
    """Return the fields of a base in lora_ft.json, without the folder on this machine."""
    fields = dataclasses.asdict(base) | {"folder": None}
    del fields["stored"]
    return fields | ({"stored": base.stored.record()} if base.stored else {})


def _tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    template = template_variables.without_defaults(tokenizer.chat_template)
    return {
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
    }


def _quant_fields(quant: config.Quant) -> dict[str, Any]:
    """Return the settings that must be equal for two quantized bases to have the same weights."""
    four_bits = quant.kind in (QuantKind.nf4, QuantKind.fp4)
    return {"kind": quant.kind.value} | ({"double": quant.double} if four_bits else {})


def check_source(folder: Path, saved: LoraConfig, base: Base, quant: config.Quant) -> None:
    """Check by its record that an adapter was trained on this base: weights, quantization, tokenizer and template.

    Without a record, only names can be compared. One model may have several names, so a difference is a warning.
    Raises MismatchError, also for an adapter that changes the base's own weights.
    """
    check_keeps_base(folder, saved)
    known = {Path(name).name for name in (base.identity.id, base.identity.path, base.identity.folder) if name}
    named = saved.base_model_name_or_path
    if (folder / RECORD).is_file():
        _check_record(folder, read_record(folder), base, quant)
    elif named and Path(named).name not in known:
        log.warning("the adapter names the base %s, but the configured base is %s", named, base.identity.path)


def check_keeps_base(folder: Path, saved: LoraConfig) -> None:
    """Raise MismatchError for an adapter that changes the base's own weights or biases."""
    if change := change_of_base(saved):
        raise MismatchError(f"{folder}: {change[0]}: {change[1]}")


def change_of_base(saved: LoraConfig) -> tuple[str, str] | None:
    """Return the setting by which an adapter changes the base's own weights or biases, and the remedy, or None."""
    if saved.bias != "none":
        return f"bias={saved.bias} changes the base's own biases, which is not supported", MERGE_WITH_PEFT
    if saved.init_lora_weights not in _PLAIN_INITS:
        return f"init_lora_weights={saved.init_lora_weights} changes the base's own weights", (
            "convert the adapter to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    return None


def read_record(folder: Path) -> dict[str, Any]:
    """Read lora_ft.json of an adapter folder; raises MismatchError if it is not a record of this format."""
    found = untrusted.json_object(folder / RECORD, MismatchError)
    if found.get("format") != _FORMAT or not isinstance(found.get("base"), dict):
        raise MismatchError(f"{folder / RECORD} is not a record of format {_FORMAT}, got {found.get('format')}")
    return found


def template_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the chat template's variables in a record; raises MismatchError for other than values."""
    found = record.get("template", {})
    if not isinstance(found, dict) or not all(
        name.isidentifier() and isinstance(value, bool | int | float | str | None) for name, value in found.items()
    ):
        raise MismatchError(f"{RECORD}: template must be an object of true, false, numbers, text or null, got {found}")
    return found


def _check_record(folder: Path, found: dict[str, Any], base: Base, quant: config.Quant) -> None:
    recorded = found["base"]
    pairs: list[tuple[str, Any, Any]] = [
        ("base config_sha256", recorded.get("config_sha256"), base.identity.config_sha256)
    ]
    if base.identity.weights_sha256 is not None:  # None if weights are not downloaded yet; compared after the download
        pairs.append(("base weights_sha256", recorded.get("weights_sha256"), base.identity.weights_sha256))
    files = base.identity.stored
    pairs.append(("quantization of the files", recorded.get("stored"), files.record() if files else None))
    pairs.append(("quantization", found.get("quant"), _quant_fields(agreed(quant, files))))
    pairs += [(key, found.get(key), value) for key, value in _tokenizer_hashes(base.tokenizer).items()]
    problems = [f"{name}: trained on {then}, now {now}" for name, then, now in pairs if then != now]
    if problems:
        name = recorded.get("id") or recorded.get("path")
        raise MismatchError(f"the adapter in {folder} was made for another base ({name}):\n" + "\n".join(problems))


@dataclass(frozen=True)
class Loading:
    """Arguments with which transformers loads a base as in training; for printed code and for verification."""

    path: str  # or hub id
    revision: str | None
    dtype: str
    quantization: dict[str, Any]  # arguments of BitsAndBytesConfig, a dtype by its name; {} without quantization
    rows: int | None  # of the embedding, if tokens were added
    device: str
    experts: tuple[str, ...] = ()  # last parts of the names of quantized parameters of experts
    transposed: bool = False  # the matrices of the experts are [in, out]
    cast: bool = False  # quantized files hold their other weights in another dtype, which transformers keeps
    classifier: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a classifier's config needs

    @property
    def auto_class(self) -> str:
        """Return the name of transformers' class of the base."""
        return "AutoModelForSequenceClassification" if self.classifier else "AutoModelForCausalLM"

    def lines(self, adapter: str) -> list[str]:
        """Return the lines of Python that load the base with an adapter."""
        arguments = [repr(self.path), *([f"revision={self.revision!r}"] if self.revision else [])]
        arguments.append(f"dtype=torch.{self.dtype}")
        if self.quantization:
            values = {k: f"torch.{v}" if k.endswith("dtype") else repr(v) for k, v in self.quantization.items()}
            given = ", ".join(f"{name}={value}" for name, value in values.items())
            arguments.append(f"quantization_config=BitsAndBytesConfig({given})")
        arguments += [f"{name}={value!r}" for name, value in self.classifier.items()]
        lines = [f"base = {self.auto_class}.from_pretrained({', '.join(arguments)})"]
        if self.rows:
            lines.append(f"base.resize_token_embeddings({self.rows}, mean_resizing=False)")
        if self.cast:
            lines += [
                "for parameter in base.parameters():",
                "    if parameter.is_floating_point():",
                f"        parameter.data = parameter.data.to(torch.{self.dtype})",
            ]
        lines += self._rounded_experts()
        return [*lines, f"model = PeftModel.from_pretrained(base, {adapter!r})"]

    def _rounded_experts(self) -> list[str]:
        """Return the lines that round the experts as in training; they stay in the dtype of the base.

        transformers quantizes linear layers only.
        """
        if not self.experts:
            return []
        if "load_in_8bit" in self.quantization:
            names, turned = "int8_vectorwise_dequant, int8_vectorwise_quant", ".mT" if self.transposed else ""
            rows = f"parameter.data{turned}.reshape(-1, parameter.shape[{-2 if self.transposed else -1}]).half()"
            back = f".view(parameter.data{turned}.shape){turned}.to(parameter.dtype)"
            rounded = f"int8_vectorwise_dequant(*int8_vectorwise_quant({rows})[:2]){back}"
        else:
            names, four = "dequantize_4bit, quantize_4bit", self.quantization
            rounded = (
                f"dequantize_4bit(*quantize_4bit(parameter.data, quant_type={four['bnb_4bit_quant_type']!r}, "
                f"compress_statistics={four['bnb_4bit_use_double_quant']}))"
            )
        return [
            f"from bitsandbytes.functional import {names}",
            "for name, parameter in base.named_parameters():",
            f"    if name.endswith({self.experts!r}):",
            f"        parameter.data = {rounded}",
        ]


def loading(base: Base, quant: config.Quant, model: config.Model) -> Loading:
    """Return arguments to load this base elsewhere: by its id if it has a commit on the hub, else by its folder."""
    identity, dtype = base.identity, str(base.model.dtype).removeprefix("torch.")
    rows = base.model.get_input_embeddings().weight.shape[0] if model.added_tokens else None
    path = identity.id if identity.revision else identity.folder
    # Codes that train as they are stored are loaded as their own config says.
    files = identity.stored
    as_stored = files is not None and files.trains
    quantization = {} if as_stored else _quantization(quant, dtype)
    in_files = build.read_config(Path(str(identity.folder)), model.path).dtype if as_stored else None
    planned = [] if agreed(quant, files).kind is QuantKind.none else quantize.planned_experts(base.model, files)
    return Loading(
        str(path), identity.revision, dtype, quantization, rows, str(base.model.device),
        experts=tuple(sorted({".".join(name.replace(".base_layer", "").split(".")[-2:]) for name in planned})),
        transposed=any(base.model.get_submodule(name.rpartition(".")[0]).is_transposed for name in planned[:1]),
        cast=as_stored and in_files is not base.model.dtype,
        classifier=_classifier(base.model),
    )  # fmt: skip


def _classifier(model: Any) -> dict[str, Any]:
    """Return the arguments that give a base the classes of a classifier's config; {} for a language model."""
    if not heads.is_classifier(model):
        return {}
    names = ("id2label", "label2id", "problem_type", "pad_token_id")
    return {name: getattr(model.config, name) for name in names}


def _quantization(quant: config.Quant, dtype: str) -> dict[str, Any]:
    if quant.kind is QuantKind.none:
        return {}
    if quant.kind is QuantKind.int8:
        return {"load_in_8bit": True}
    compute = dtype if quant.compute_dtype is config.Dtype.auto else quant.compute_dtype.value
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": quant.kind.value, "bnb_4bit_use_double_quant": quant.double,
        "bnb_4bit_compute_dtype": compute,
    }  # fmt: skip


def loading_lines(folder: Path, base: Base, cfg: config.TrainRun) -> list[str]:
    """Return the lines of Python that load base and adapter as in training, with only transformers and PEFT.

    Files that are dequantized while they are loaded are read by lora_ft alone.
    """
    if base.identity.stored and not base.identity.stored.trains:
        return ["import lora_ft", f"model, tokenizer = lora_ft.load({str(folder)!r})"]
    return loading(base, cfg.quant, cfg.model).lines(str(folder))
