"""Files of tensors that are written and read one by one: the bytes and the values of safetensors."""

import struct
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from lora_ft.errors import MismatchError
from lora_ft.io import durable
from lora_ft.models import tensor_files

TENSORS = {
    "b": torch.randn(3, 5), "a": torch.randn(2, dtype=torch.float64), "half": torch.randn(7).half(),
    "brain": torch.randn(4, 1).bfloat16(), "z.long": torch.arange(3), "ints": torch.arange(3, dtype=torch.int32),
    "short": torch.arange(3, dtype=torch.int16), "byte": torch.arange(5, dtype=torch.uint8),
    "signed": -torch.arange(5, dtype=torch.int8), "flags": torch.tensor([True, False]), "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5), "strided": torch.randn(4, 6).T,
}  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_bytes_are_those_of_safetensors(metadata: dict[str, str] | None) -> None:
    made = b"".join(bytes(chunk) for chunk in tensor_files.chunks(TENSORS, metadata))
    assert made == safetensors.torch.save({name: t.contiguous() for name, t in TENSORS.items()}, metadata)


def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    durable.write_stream(path, tensor_files.chunks(TENSORS))
    found, expected = dict(tensor_files.read(path, 10**6, MismatchError)), load_file(path)
    assert found.keys() == expected.keys() == TENSORS.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_another_dtype_and_a_file_that_shrinks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"12")
    with pytest.raises(MismatchError, match=r"a has the dtype F8_E4M3, which must be one of BOOL, U8"):
        dict(tensor_files.read(path, 10**6, MismatchError))
    durable.write_stream(path, tensor_files.chunks({"a": torch.zeros(10), "b": torch.zeros(1 << 20)}))
    reading = tensor_files.read(path, 10**6, MismatchError)
    next(reading)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(MismatchError, match="b is not complete"):
        next(reading)


def test_memory_holds_one_part_of_a_file(tmp_path: Path) -> None:
    tensors = {str(number): torch.zeros(100_000, dtype=torch.float64) for number in range(20)}
    tracemalloc.start()
    durable.write_stream(tmp_path / "t", tensor_files.chunks(tensors))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**20 < (tmp_path / "t").stat().st_size / 5
