"""The part of the model that runs an operation, found from the Python functions that called it.

part_of(func, in_backward)  ->  ("attention", False)      func: the operator, in a __torch_dispatch__

The code of the model does not know of it: its files and functions are named here.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from lora_ft import ops
from lora_ft.memory.costs import kind_of

_OPS, _SITE = Path(ops.__file__).parent, Path(torch.__file__).parents[1]

# Files, and those of their functions that make the tensors of a part; () for all.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    str(_OPS / "attention.py"): ("attention", ()),
    str(_OPS / "tiled_attention.py"): ("attention", ()),
    str(_OPS / "weights.py"): ("dequantization", ("<lambda>", "_from_int8", "scaled")),
    str(_SITE / "transformers/integrations/sdpa_attention.py"): ("attention", ()),
    str(_SITE / "transformers/masking_utils.py"): ("attention", ()),
}
RECOMPUTES = str(_OPS / "gradient_checkpointing.py")  # is called in a backward only to recompute a layer
MODULE = str(Path(torch.__file__).parent / "nn/modules/module.py")  # calls the function of a module
ENGINE = str(Path(torch.__file__).parent / "autograd/graph.py")  # runs a backward

_aten = torch.ops.aten
_SOFTMAX = {_aten._softmax, _aten._safe_softmax, _aten._softmax_backward_data}


def part_of(func: Any, in_backward: bool) -> tuple[str, bool]:
    """Return attention, dequantization or "" for an operation, and True if it recomputes a layer.

    The innermost known file decides, within the function of the innermost module.
    """
    part, frame = _part_of_operator(func), sys._getframe(1)
    in_function = not part
    while frame is not None and (in_function or in_backward):
        code: Any = frame.f_code
        file = code.co_filename
        if in_function and file in PARTS:
            name, functions = PARTS[file]
            part, in_function = (name if not functions or code.co_name in functions else ""), False
        elif file == MODULE:
            in_function = False
        elif in_backward and file == RECOMPUTES:
            return part, True
        elif file == ENGINE:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return part, False


def _part_of_operator(func: Any) -> str:
    if kind_of(func).is_attention or func.overloadpacket in _SOFTMAX:
        return "attention"
    if func.namespace == "bitsandbytes" and "dequantize" in func._schema.name:
        return "dequantization"
    return ""
