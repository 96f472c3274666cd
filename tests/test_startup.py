"""A run on local files uses no network and no slow import that it does not need, and aligns large tensors.

Checked in its own process.
"""

import json
import os
import subprocess
import sys

from tiny import tiny_folder

# torch's compiler (2.7 s), datasets of the hub (1 s), trackers, and packages of tests and extras
UNUSED = ("torch._inductor.kernel.mm", "datasets", "pandas", "pyarrow", "tensorboard", "sklearn", "sacrebleu", "gguf")

CHILD = """
import socket, sys
def refuse(*arguments, **options):
    sys.stderr.write(f"NETWORK {arguments}")
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from lora_ft.cli import entry
try:
    entry.run("train", sys.argv[2:])
finally:
    import gc
    unused = [name for name in sys.argv[1].split() if name in sys.modules]
    import torch
    is_aligned = torch.empty(3 << 20, dtype=torch.uint8).data_ptr() % 4096 == 0 or sys.platform != "linux"
    print(gc.get_freeze_count() > 100_000, gc.isenabled(), is_aligned, *unused)
"""


def test_local_run_uses_no_network_and_no_unneeded_imports(tmp_path):
    rows = [{"prompt": f"How many legs have {n} spiders?", "completion": f"{8 * n} legs."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"model.path={tiny_folder(tmp_path, 'llama')}", "quant=nf4", "data.path=rows.jsonl",
             "train.max_steps=1", "hydra.run.dir=run"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, " ".join(UNUSED), *overrides],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    assert done.stdout.splitlines()[-1] == "True True True"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
