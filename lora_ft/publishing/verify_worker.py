"""Load an adapter with torch, transformers and PEFT, in a process that does not import lora_ft.

    echo '{"folder": ..., "base": {"path": ..., "dtype": "float32", ...}, "ids": null, "columns": null,
          "prompt": null}' \
        | python -P verify_worker.py > logits.safetensors

It writes one safetensors file to its standard output: `adapter` and `base`, logits [T, K] in float32 with and without
the adapter. For a quantized base these come from exact products, and `as_loaded` from its kernels, with their rounding.
The file's metadata holds a report in JSON: keys and versions. verification.py starts this program and checks the
result. -P prevents files beside this one from replacing Python's own modules.
"""

import contextlib
import copy
import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging

_WEIGHTS = "adapter_model.safetensors"
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "bitsandbytes")


def load(folder: str, base: dict[str, Any]) -> PeftModel:
    """Load base and adapter as the code in the model card does; `base` has the fields of provenance.Loading."""
    dtype = getattr(torch, base["dtype"])
    quantization = dict(base["quantization"])
    if "bnb_4bit_compute_dtype" in quantization:
        quantization["bnb_4bit_compute_dtype"] = getattr(torch, quantization["bnb_4bit_compute_dtype"])
    # None would hide the quantization that files name in their own config.
    given = {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
    classifier = dict(base["classifier"])
    if classifier:  # the keys of an object in JSON are texts
        classifier["id2label"] = {int(number): name for number, name in classifier["id2label"].items()}
    model_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = model_class.from_pretrained(
        base["path"], revision=base["revision"], dtype=dtype, device_map={"": base["device"]}, use_safetensors=True,
        trust_remote_code=False, **given, **classifier,
    )  # fmt: skip
    if base["cast"]:  # of quantized files transformers keeps the dtype
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if base["rows"]:
        model.resize_token_embeddings(base["rows"], mean_resizing=False)
    round_experts(model, base)
    adapted = PeftModel.from_pretrained(model, folder).eval()
    if classifier:  # a base has no head of its own: compare its body by the adapter's
        score = adapted.get_base_model().score
        score.original_module.load_state_dict(score.modules_to_save["default"].state_dict())
    return adapted


def prompt(folder: str, messages: list[dict[str, str]], date_string: str) -> str:
    """Return a chat as the folder's template writes it, with the template's own defaults."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return str(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, date_string=date_string)
    )


@torch.no_grad()
def round_experts(model: torch.nn.Module, base: dict[str, Any]) -> None:
    """Round the experts as they are quantized in training; transformers quantizes linear layers only."""
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(base["experts"])):
            parameter.data = _rounded(parameter.data, base["quantization"], base["transposed"])


def _rounded(weight: Tensor, quantization: dict[str, Any], transposed: bool) -> Tensor:
    from bitsandbytes import functional

    if "load_in_4bit" in quantization:
        kind, double = quantization["bnb_4bit_quant_type"], quantization["bnb_4bit_use_double_quant"]
        return functional.dequantize_4bit(
            *functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
        )
    rows = weight.mT if transposed else weight
    codes, scales, _ = functional.int8_vectorwise_quant(rows.reshape(-1, rows.shape[-1]).half())
    rounded = functional.int8_vectorwise_dequant(codes, scales).view(rows.shape).to(weight.dtype)
    return rounded.mT.contiguous() if transposed else rounded


def compare_keys(model: PeftModel, folder: str) -> dict[str, Any]:
    """Compare every key, shape and value of the attached adapter with the file; PEFT only warns of a difference."""
    stored = safetensors.torch.load_file(Path(folder) / _WEIGHTS)
    attached = get_peft_model_state_dict(model, save_embedding_layers=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # of a resized vocabulary: saved whole
    whole = {f"{name}.weight": module for name, module in model.named_modules() if module in ends}
    attached |= {key: module.weight for key, module in whole.items() if key in stored}
    both = stored.keys() & attached.keys()
    outputs = [key for key in stored if "lora_B" in key or "lora_embedding_B" in key]
    return {
        "keys": len(stored),
        "missing": sorted(attached.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - attached.keys()),
        "differing": sorted(key for key in both if not _equal(attached[key], stored[key])),
        "outputs": len(outputs),
        "zero": sorted(key for key in outputs if not stored[key].any()),
    }


def _equal(attached: Tensor, stored: Tensor) -> bool:
    # PEFT keeps matrices as float32, and modules that were trained in full in the dtype of the base.
    return attached.shape == stored.shape and torch.equal(attached.cpu(), stored.to(attached.dtype))


def spread(rows: int, count: int) -> list[int]:
    """Return `count` indices from the first row to the last."""
    return torch.linspace(0, rows - 1, count).long().tolist()


def logits(model: PeftModel, ids: list[int], columns: list[int]) -> Tensor:
    """Return columns of the logits for one sequence of ids: [T, K] float32 on the CPU.

    A classifier gives one row, for the last token; the other rows are those that its head makes of the other tokens.
    """
    rows: list[Tensor] = []
    score = getattr(model.get_base_model(), "score", None)
    hook = score.register_forward_hook(lambda _, __, output: rows.append(output[0])) if score is not None else None
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    if hook is not None:
        hook.remove()
        output = torch.cat([rows[0][:-1], output])[None]
    return output[0].float().cpu()[:, columns].contiguous()


@contextlib.contextmanager
def exact_products(layers: list[Any]) -> Iterator[None]:
    """Make quantized layers multiply by their dequantized weights.

    Kernels add rounding of their own: int8 rounds activations, and some CPUs compute 4-bit products in bfloat16.
    """
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(_product, layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def quantized_layers(model: PeftModel) -> list[Any]:
    """Return the 8-bit and 4-bit layers of the base."""
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return [m for m in linears if type(m.weight).__name__ in ("Params4bit", "Int8Params")]


def _product(layer: Any, inputs: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        state = copy.copy(weight.quant_state)
        state.dtype = inputs.dtype  # files that are quantized already name another one
        plain = dequantize_4bit(weight.data, state)
    else:  # the row scales move from the weight to the layer's state at the first forward
        plain = int8_vectorwise_dequant(weight.data, weight.SCB if weight.SCB is not None else layer.state.SCB)
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return torch.nn.functional.linear(inputs, plain.to(inputs.dtype), bias)


def verify(request: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return logits and report for a request."""
    model = load(request["folder"], request["base"])
    report = compare_keys(model, request["folder"])
    rows = model.get_input_embeddings().weight.shape[0]
    classes = len(request["base"]["classifier"].get("id2label", ()))
    columns = list(range(classes)) if classes else spread(rows, 256)
    run = functools.partial(logits, model, request["ids"] or spread(rows, 64), request["columns"] or columns)
    layers = quantized_layers(model)
    with exact_products(layers):
        found = {"adapter": run()}
        with model.disable_adapter():
            found["base"] = run()
    if layers:
        found["as_loaded"] = run()
    report["prompt"] = prompt(request["folder"], **request["prompt"]) if request["prompt"] else None
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found, report | {"versions": versions}


def main() -> None:
    """Read a request from standard input, write the result to standard output, and send other output to stderr."""
    result = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable_progress_bar()
    found, report = verify(json.load(sys.stdin))
    with os.fdopen(result, "wb") as stream:
        stream.write(safetensors.torch.save(found, metadata={"report": json.dumps(report)}))


if __name__ == "__main__":
    main()
