"""lm-eval with peft=: the log-likelihoods that it scores tasks by are those of the model that was trained."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import finished
import pytest
import torch
from finished import QUESTIONS

from lora_ft.adapters import files, provenance

SCRIPT = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
base, adapter, pairs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = HFLM(pretrained=base, peft=adapter, device="cpu", dtype="float32", batch_size=2)
found = model.loglikelihood([Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)])
print(json.dumps([value for value, _ in found]))
"""


@pytest.mark.interop
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_lm_eval_scores_what_was_trained(
    options: dict[str, bool], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")
    cfg = finished.settings(tmp_path, "llama", **options)
    base, model = finished.adapted(cfg)
    folder = tmp_path / "adapter"
    files.save(model, "first", folder, base.tokenizer, provenance.Provenance(base.identity, cfg.quant, "d"))
    pairs = [(question, " " + answer) for question, answer in QUESTIONS]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "llama"), str(folder), json.dumps(pairs)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    found = torch.tensor(json.loads(answer.splitlines()[-1]))
    expected = torch.tensor([likelihood(model, base.tokenizer, *pair) for pair in pairs])
    with model.disable_adapter():
        plain = torch.tensor([likelihood(model, base.tokenizer, *pair) for pair in pairs])
    away = float((found - expected).abs().max())
    record_property("figure", f"lm-eval {options}: {away:.1e} nats away")
    assert away <= 1e-3 < 0.01 * float((plain - expected).abs().max())


def likelihood(model: torch.nn.Module, tokenizer: object, question: str, answer: str) -> float:
    """Log-probability, in nats, of an answer after its question."""
    before, whole = (tokenizer(text)["input_ids"] for text in (question, question + answer))
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].double(), -1)
    return sum(float(logs[at - 1, whole[at]]) for at in range(len(before), len(whole)))
