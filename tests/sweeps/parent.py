"""A parent for a test to kill: python parent.py FOLDER EXECUTOR BEHAVIOUR runs one job in a worker."""

import sys
from pathlib import Path

from lora_ft import config
from lora_ft.sweeps import scheduler
from lora_ft.sweeps.executors import children
from lora_ft.sweeps.jobs import Job

folder, executor, behaviour = Path(sys.argv[1]), *sys.argv[2:]
children.command = lambda: [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_worker.py"))]
job = Job(0, folder / "0", config.TrainRun(), [behaviour])
scheduler.run([job], config.Launcher(executor=executor), config.Sweep(), folder, lambda running: None)
