"""Merging of families whose code uses weights outside of their layers, or whose logits are moved far by rounding."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import tiny_tokenizer
from zoo import zoo_model

from lora_ft import config
from lora_ft.adapters import attach
from lora_ft.errors import MismatchError
from lora_ft.export import merge, verify, weight_stream


def random_adapter(name: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = attach.attach(zoo_model(name, dtype=dtype).requires_grad_(False), config.Adapter(r=4), "default", 0, [])
    torch.manual_seed(1)
    for parameter in attach.trainable(model, "default").values():
        parameter.data.normal_(std=0.05)
    return model.eval()


@pytest.mark.parametrize("name", ["gemma3n_text", "lfm2", "mamba"])
def test_streamed_model_reads_weights_that_code_uses_outside_of_their_layers(name: str) -> None:
    model = random_adapter(name)
    merged, expected = merge.MergedModel(model, torch.float32), verify.probe(model, 512)
    weight_stream.use_placeholders(merged.plain.eval())
    placeholders = dict(merged.plain.named_parameters())
    with weight_stream.streamed(merged.plain, merged.__getitem__), torch.no_grad():
        found = merged.plain(expected.ids[None], use_cache=False).logits[0]
    assert verify.distance(found, expected.logits, torch.float32) < 1e-5
    assert all(p is placeholders[n] and p.untyped_storage().nbytes() <= 8 for n, p in merged.plain.named_parameters())


@pytest.mark.parametrize(("name", "dtype"), [("gemma4_text", torch.bfloat16), ("gemma3n_text", torch.float32)])
def test_merge_is_allowed_what_rounding_moves_the_model_and_no_lost_adapter(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = random_adapter(name, dtype)
    expected = verify.probe(model, 512)
    with model.disable_adapter():
        lost = verify.distance(verify.probe(model, 512).logits, expected.logits, dtype)
    most = verify.allowed(dtype, expected.rounding)
    assert (most > verify.tolerance(dtype)) == (name == "gemma4_text")
    assert lost > 2 * most
    merge.write_folder(merge.MergedModel(model, dtype), tiny_tokenizer(), tmp_path)
    distance, allowed = verify.check(tmp_path, expected)
    assert 0 < distance <= allowed == most


def test_allowed_distance_has_a_limit() -> None:
    usual = verify.tolerance(torch.bfloat16)
    assert [verify.allowed(torch.bfloat16, usual * factor) for factor in (0.1, 1, 9)] == [usual, 3 * usual, 10 * usual]


def test_merge_that_lost_the_adapter_is_refused_though_rounding_is_large(tmp_path: Path) -> None:
    model = random_adapter("gemma4_text", torch.bfloat16)
    expected = verify.probe(model, 512)
    for parameter in attach.trainable(model, "default").values():
        parameter.data.zero_()
    merge.write_folder(merge.MergedModel(model, torch.bfloat16), tiny_tokenizer(), tmp_path)
    with pytest.raises(MismatchError, match="the merged model differs from base and adapter"):
        verify.check(tmp_path, expected)
