"""The allocators' settings: CUDA segments grow unless the user has chosen otherwise."""

import os

import pytest

from lora_ft.io import allocator

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # restored after the test
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_settings")
def test_cuda_segments_are_expandable_by_default() -> None:
    allocator.configure()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_user_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    allocator.configure()
    assert {n: os.environ[n] for n in NAMES if n in os.environ} == {name: "max_split_size_mb:128"}
