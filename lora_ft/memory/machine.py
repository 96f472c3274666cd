"""The device that a run is predicted for: its memory, its rates, and where each figure comes from.

resolve(cfg.hardware, cfg.device)  ->  Machine(name="NVIDIA GeForce RTX 4090", memory_bytes=..., ...)
"""

import re
from dataclasses import dataclass, field

from lora_ft.models.device import resolve_device
from lora_ft.ops.device import Target, target
from lora_ft.ops.gradient_checkpointing import available_bytes
from lora_ft.settings.plan import Hardware

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Machine:
    """A device and its limits; a rate that is not known is None.

    memory_bytes: of the device, None if unknown. used_bytes: of it, what others use, the driver and a desktop.
    context_bytes: what this process needs beside tensors: CUDA's context and libraries, or on a CPU the imports.
    bandwidth: bytes per second. matmul: products' FLOP per second by dtype, as measured or specified.
    launch_seconds: time of the host for one operation. link: bytes per second between host and device.
    sources: by field, where it comes from: "measured here", "specified: URL" or "assumed".
    """

    name: str
    target: Target
    memory_bytes: int | None
    used_bytes: int = 0
    context_bytes: int = 0
    bandwidth: float | None = None
    matmul: dict[str, float] = field(default_factory=dict)
    launch_seconds: float = 5e-6
    link: float | None = None
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that a run may use, its context included."""
        return None if self.memory_bytes is None else self.memory_bytes - self.used_bytes


def resolve(hardware: Hardware, device: str) -> Machine:
    """Return the device of the settings."""
    if hardware.memory is None:
        found = resolve_device(device)
        return Machine(str(found), target(found), available_bytes(found))
    amount, unit = re.fullmatch(r"([0-9.]+)(.*)", hardware.memory).groups()  # type: ignore[union-attr]
    major, minor = map(int, hardware.capability.split("."))
    kind = "cpu" if hardware.kind == "cpu" or device == "cpu" else "cuda"
    chosen = Target(kind, (major, minor), has_flash=major >= 8) if kind == "cuda" else Target(kind)
    return Machine(hardware.name or hardware.memory, chosen, int(float(amount) * UNITS[unit]))
