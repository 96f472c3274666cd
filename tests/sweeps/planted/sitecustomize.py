"""Failures planted in the processes of a sweep: PLANTED='{"3": "kill"}' lets the job with seed 3 die in its third step.

Python imports this file as it starts, in every process that has its folder in PYTHONPATH.
"""

import json
import os
import signal
import sys
import time

if "lora_ft.sweeps.worker" in sys.orig_argv:
    from lora_ft.training import trainer

    _planted = json.loads(os.environ["PLANTED"])
    _gradient = trainer.compute_gradient

    def planted(state, *given, **options):
        match _planted.get(str(state.cfg.seed)) if state.step == 2 else None:
            case "raise":
                raise ZeroDivisionError("planted")
            case "exit":
                os._exit(9)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(10**6)
            case "memory":
                raise MemoryError
            case "nan":
                state.flat.values.fill_(float("nan"))
        return _gradient(state, *given, **options)

    trainer.compute_gradient = planted
