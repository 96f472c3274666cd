"""Write safetensors files one tensor after the other, and read them in the same way.

    durable.write_stream(path, chunks(tensors, {"format": "pt"}))        the bytes of safetensors.torch.save(tensors)
    for name, tensor in read(path): ...

safetensors' own functions hold all tensors twice in memory: as objects and as the contents of the file.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_ft.errors import LoraFtError
from lora_ft.io import durable, untrusted

# In the order of safetensors' own enumeration, by which its files are sorted.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = {dtype: number for number, dtype in enumerate(CODES)}


def chunks(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[durable.Buffer]:
    """Yield the contents of a safetensors file; of tensors on a GPU, one at a time is copied to the host."""
    ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))
    specs = [durable.TensorSpec(name, CODES[t.dtype], tuple(t.shape), t.nbytes) for name, t in ordered]
    return durable.tensor_file(specs, (as_bytes(tensor) for _, tensor in ordered), metadata or {})


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values; shares the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read(path: Path, most_header_bytes: int, kind: type[LoraFtError]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a safetensors file; each tensor has memory of its own.

    Raises the errors of `untrusted.tensor_header`, and `kind` for another dtype or metadata that are not text.
    """
    header = untrusted.tensor_header(path, most_header_bytes, kind)
    entries = json.loads(header.raw[8:])
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise kind(f"{path} is not a safetensors file: its metadata are not pairs of strings")
    with path.open("rb") as file:
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise kind(f"{path}: {name} has the dtype {entry['dtype']}, which must be one of {', '.join(DTYPES)}")
            tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            file.seek(len(header.raw) + entry["data_offsets"][0])
            if file.readinto(as_bytes(tensor)) != tensor.nbytes:
                raise kind(f"{path} is not a safetensors file, or truncated: {name} is not complete")
            yield name, tensor
