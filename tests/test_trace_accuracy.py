"""The predicted peak of live tensor bytes on a CPU, against that of a real step: within 5 % in every case."""

import gc
from pathlib import Path
from typing import Any

import pytest
from memory_cases import Case, measured, predicted

CASES = [
    Case("llama", (512,)),
    Case("llama", (512,), fast=False),
    Case("llama", (200, 120, 64), "nf4", 4, "every_1"),
    Case("llama", (1100,), "int8", 64, "every_2"),
    Case("llama", (256,), "nf4", 256, optimizer="adamw_8bit"),
    Case("llama", (512,), recompute="every_1", checkpoint="bfloat16"),
    Case("llama", (256,), "nf4", 16, "every_2", fast=False, checkpoint="bfloat16"),
    Case("gpt2", (128,), rank=4),
    Case("gpt2", (1024,), "none", 16, "every_1"),
    Case("gpt2", (512,), "nf4", 64, "every_2", fast=False),
    Case("gpt2", (300, 200), "int8", 8),
    Case("gpt2", (256,), "int8", 128, fast=False, optimizer="adamw_8bit"),
    Case("qwen3", (2048,), "none", 8, "every_1"),
    Case("qwen3", (128,), "int8", 256),
    Case("qwen3", (700,), "nf4", 32, "every_2"),
    Case("qwen3", (256, 100), "none", 16, fast=False),
    Case("qwen3", (512,), "nf4", 16, "every_1", optimizer="adamw_8bit"),
    Case("qwen3", (400,), "int8", 4, "every_2", fast=False),
    Case("gemma2", (512,), "nf4"),
    Case("gemma2", (300, 128), "none", 32, "every_2", fast=False),
    Case("gemma2", (256,), "int8", 8, "every_1"),
    Case("gemma3", (700,)),
    Case("gemma3", (128,), "nf4", 128, optimizer="adamw_8bit"),
    Case("gemma3", (600,), "int8", 16, "every_1", fast=False),
    Case("gemma3", (400, 300), "none", 64, "every_2", checkpoint="bfloat16"),
    Case("qwen3_moe", (300, 200), "nf4"),
    Case("qwen3_moe", (600,), "int8", 8),
    Case("gpt_oss", (400,), "nf4", 32, "every_2", fast=False),
    Case("qwen3_moe", (400,), "none"),
]
SMOLLM2 = [
    Case("smollm2_135m", (1024, 400), "none", 16, "off", checkpoint="bfloat16"),
    Case("smollm2_135m", (2048,), "nf4", 64, "every_2"),
    Case("smollm2_135m", (512,), "int8", 256, "every_1", optimizer="adamw_8bit"),
    Case("smollm2_135m", (512,), "none", 4, "off", fast=False),
]


@pytest.fixture(autouse=True)
def _only_new_tensors() -> None:
    """Leave what other tests hold out of the count."""
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize(
    "case",
    [
        # Each third one by default.
        *(
            pytest.param(case, id=f"{number}-{case.shape}", marks=pytest.mark.nightly if number % 3 else ())
            for number, case in enumerate(CASES)
        ),
        pytest.param(Case("smollm2_135m", (128,), recompute="every_1"), id="smollm2"),
        *(pytest.param(case, id=f"smollm2-{number}", marks=pytest.mark.nightly) for number, case in enumerate(SMOLLM2)),
    ],
)
@pytest.mark.filterwarnings("ignore:We strongly recommend")
def test_peak_of_tensors_is_predicted_within_5_percent(case: Case, tmp_path: Path, record_property: Any) -> None:
    expected, found = predicted(case).peak_bytes, measured(case, tmp_path)
    error = expected / found - 1
    record_property(
        "figure", f"{case!s:72} predicted {expected / 1e6:8.2f} MB, measured {found / 1e6:8.2f} MB, {error:+.1%}"
    )
    assert abs(error) <= 0.05
