"""A parent for a test to kill: python parent.py FOLDER runs one slow job in a worker process."""

import sys
from pathlib import Path

from lora_ft import config
from lora_ft.sweeps import scheduler
from lora_ft.sweeps.executors import local
from lora_ft.sweeps.jobs import Job

folder = Path(sys.argv[1])
local.command = lambda: [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_worker.py"))]
job = Job(0, folder / "0", config.TrainRun(), ["slow"])
scheduler.run([job], config.Launcher(), config.Sweep(), folder, lambda running: None)
