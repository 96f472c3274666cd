"""The process of one stage: python -m gpu_stages.worker STAGE PARTS_FILE WORK_FOLDER dry|gpu

Each part is appended to the file when it is finished, and fsynced. When stdin closes, the driver has been killed: then
the work folder is removed, and the process ends with its children.
"""

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from gpu_stages.setting import Setting
from lora_ft.io import durable, process


def end_with_parent(work: str) -> None:
    os.read(0, 1)  # nothing is ever written to it
    shutil.rmtree(work, ignore_errors=True)  # up to 30 GB, perhaps of memory, that nobody else would remove
    os.killpg(0, signal.SIGKILL)


def check_device() -> None:
    """End the process if torch has no GPU that it can use; the message says why."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU: --dry needs none")


def main() -> None:
    name, parts, work, mode = sys.argv[1:]
    threading.Thread(target=end_with_parent, args=(work,), daemon=True).start()
    process.prepare()  # also the allocators, which so are the same for all trainers
    setting = Setting(Path(work), dry=mode == "dry")
    stage = importlib.import_module(f"gpu_stages.{name}")
    gc.freeze()  # each part ends with a collection, which would walk a million objects of the libraries
    if not setting.dry:
        check_device()
    for part, figures in stage.run(setting):
        durable.append_line(Path(parts), json.dumps({"part": part, **figures}))
        durable.settle(Path(parts))


if __name__ == "__main__":
    main()
