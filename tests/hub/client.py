"""Drives destinations in a process of its own, because the hub's client reads its settings when it is imported.

One request per line, {"to": "hf:me/x", "do": "send", "with": ["folder", "message", false], "env": {...}}, one answer
per line, {"value": ...} or {"error": "ConfigError", "message": ...}. time.sleep only adds up the seconds.
"""

import json
import os
import sys
import time
from pathlib import Path

waited = 0.0


def add_up(seconds: float) -> None:
    global waited
    waited += seconds


time.sleep = add_up

from lora_ft.errors import LoraFtError  # noqa: E402
from lora_ft.publishing import destinations  # noqa: E402

for line in sys.stdin:
    request = json.loads(line)
    os.environ.update(request["env"])
    waited = 0.0
    try:
        destination = destinations.parse(request["to"])
        given = [Path(v) if isinstance(v, str) and v.startswith("/") else v for v in request["with"]]
        answer = {"value": getattr(destination, request["do"])(*given)}
    except LoraFtError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(answer | {"waited": waited}) + "\n")
    sys.stdout.flush()
