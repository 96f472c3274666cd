"""One training step under the profiler: launches, time without a kernel, synchronisations, the longest kernels."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from gpu_stages.setting import Setting
from gpu_stages.training import WARM_UP, measure
from lora_ft.training.callbacks import Callback, Metrics
from lora_ft.training.shared import Shared

LONGEST = 15
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


class Profiled(Callback):
    """Profiles the step after the warm-up, and writes its trace to `path`."""

    def __init__(self, path: Path, dry: bool) -> None:
        self.path = path
        # Without the operators of the CPU, which would slow down what is to be seen: the launches.
        self.profile = profile(activities=[ProfilerActivity.CPU if dry else ProfilerActivity.CUDA])

    def on_step(self, state: Any, metrics: Metrics) -> None:
        if state.step == WARM_UP:
            self.profile.start()
        elif state.step == WARM_UP + 1:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.path))


def profiled(setting: Setting, overrides: list[str], shared: Shared) -> dict[str, Any]:
    """Train a run whose steps are more than the warm-up, and return the summary of one of them."""
    callback = Profiled(setting.work / "profile.json", setting.dry)
    measure(setting, overrides, shared, [callback])
    events = json.loads(callback.path.read_text("utf-8"))["traceEvents"]
    found = summary(events)
    if setting.dry:  # a CPU launches no kernel: operators stand for them
        found["operators"] = sum(event.get("cat") == "cpu_op" for event in events)
    return found


def summary(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the events of a Chrome trace, whose times are in microseconds."""
    kernels = [e for e in events if e.get("cat") in _ON_GPU]
    calls = Counter(e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    # The profiler itself calls cudaDeviceSynchronize at its end.
    waits = {name: n for name, n in calls.items() if "Synchronize" in name}
    busy, span = occupied([(e["ts"], e["ts"] + e["dur"]) for e in kernels])
    seconds, launched = Counter[str](), Counter[str]()
    for kernel in kernels:
        seconds[kernel["name"]] += kernel["dur"]
        launched[kernel["name"]] += 1
    synchronisations = sum(n for name, n in waits.items() if name != "cudaDeviceSynchronize")
    idle = 1 - busy / span if span else 0.0
    return {
        "launches": sum(e["cat"] == "kernel" for e in kernels),
        "copies_and_fills": sum(e["cat"] != "kernel" for e in kernels),
        "synchronisations": synchronisations,
        "waits": waits,
        "seconds": span / 1e6,
        "idle_share": idle,
        "longest": [[name[:120], round(us / 1e3, 3), launched[name]] for name, us in seconds.most_common(LONGEST)],
        "summary": f"{len(kernels)} launches, {idle:.0%} idle, {synchronisations} synchronisations",
    }


def occupied(intervals: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the length of the union of intervals, and the length from the first to the last moment."""
    busy, end = 0.0, -float("inf")
    for begin, finish in sorted(intervals):
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return busy, end - min(begin for begin, _ in intervals) if intervals else 0.0
