"""LORA_FT_TEST_PLAIN_CPU=1 simulates a CPU with AVX2 only in all tests, by means of tests/plain_cpu/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lora_ft.models.quantize import import_bitsandbytes

CHILD = "import json, test_plain_cpu; print(json.dumps(test_plain_cpu.features()))"


def features() -> list[object]:
    """Return the CPU features by which torch and bitsandbytes choose kernels."""
    bitsandbytes_bfloat16 = bool(import_bitsandbytes().functional.has_avx512bf16())
    onednn_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    newer = sorted(k for k, v in torch.cpu.get_capabilities().items() if k.startswith(("avx512", "amx")) and v)
    return [torch.backends.cpu.get_cpu_capability(), bitsandbytes_bfloat16, onednn_bfloat16, newer]


def features_of_child(*folders: Path) -> list[object]:
    python_path = os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=os.environ | {"PYTHONPATH": python_path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_plain_cpu_has_no_avx512_for_torch_and_bitsandbytes() -> None:
    here = Path(__file__).parent
    capability, bitsandbytes_bfloat16, _, newer = features_of_child(here / "plain_cpu", here)
    assert capability != "AVX512" and not bitsandbytes_bfloat16 and newer == []


def test_child_processes_have_the_same_cpu_features() -> None:
    assert features_of_child(Path(__file__).parent) == features()
