"""The device that a run is predicted for: its memory, its rates, and where each figure comes from.

resolve(cfg.hardware, cfg.device)  ->  Machine(name="NVIDIA GeForce RTX 4090", memory_bytes=..., ...)

hardware=rtx_4090                     specified figures of conf/hardware/rtx_4090.yaml
hardware.memory=24GiB                 a GPU of unknown speed; with device=cpu a machine without one
hardware=local, the default           this machine: its free memory, and rates specified for its GPU or measured
"""

from dataclasses import dataclass, field, fields, replace

import torch

from lora_ft.errors import ConfigError
from lora_ft.memory import cards
from lora_ft.memory.measure import Rates, rates_of
from lora_ft.models.device import resolve_device
from lora_ft.ops.device import Target, target
from lora_ft.ops.free_memory import available_bytes, resident_bytes, total_bytes
from lora_ft.settings.plan import Hardware

GIB = 2**30

# The total that CUDA reports is less than the nominal size: 23.64 of 24 GiB (RTX 4090), 7.75 of 8 (4060), 15.61 of 16
# (A4000), 31.37 of 32 (5090), 79.2 of 80 (H100), as quoted in public out-of-memory messages.
DRIVER_BYTES, DRIVER_SHARE = 0.2 * GIB, 0.01
# CUDA's context and kernels of a process of torch grow with the GPU: 0.11 GiB (4060), 0.21 (A4000), 0.42 (RTX 6000
# Ada), 0.49 (4090), 0.58 (5090), as the same messages tell: used by the process, less what torch has reserved.
CONTEXT_BYTES, CONTEXT_SHARE, CONTEXT_MOST = 0.15 * GIB, 0.015, 0.6 * GIB
# Python, torch, transformers and PEFT after their imports, on a CPU. A process that uses more holds something else.
LIBRARIES_BYTES = 700_000_000

# The host launches an operation of torch in 4 to 10 us, autograd and Python included.
LAUNCH_SECONDS = 5e-6
# A CPU's figures for arrays that its caches hold count up to this size; level 2 and a share of level 3.
CACHE_BYTES = 4 << 20

_RATES = {"bf16_tflops": "bfloat16", "fp16_tflops": "float16", "fp32_tflops": "float32"}


@dataclass(frozen=True)
class Machine:
    """A device and its limits; a rate that is not known is None.

    memory_bytes: of the device, None if unknown. used_bytes: of it, what others use, the driver and a desktop.
    context_bytes: what this process needs beside tensors: CUDA's context and libraries, or on a CPU the imports.
    bandwidth: bytes per second, of a CPU beyond its caches. cached_bandwidth: within them, None on a GPU.
    matmul: products' FLOP per second by dtype, as measured or specified.
    launch_seconds: time of the host for one operation. link: bytes per second between host and device.
    sources: by field, where it comes from: "measured here", "specified: URL" or "assumed: reason".
    """

    name: str
    target: Target
    memory_bytes: int | None
    used_bytes: int = 0
    context_bytes: int = 0
    bandwidth: float | None = None
    matmul: dict[str, float] = field(default_factory=dict)
    launch_seconds: float = LAUNCH_SECONDS
    link: float | None = None
    cached_bandwidth: float | None = None
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that a run may use, its context included."""
        return None if self.memory_bytes is None else self.memory_bytes - self.used_bytes

    def is_measured(self, name: str) -> bool:
        """Return True if a field was measured on the device itself."""
        return self.sources.get(name, "").startswith("measured")


def resolve(hardware: Hardware, device: str, *, rates: bool = True) -> Machine:
    """Return the device of the settings. Without `rates`, nothing is measured: for its memory alone.

    Raises ConfigError for settings that contradict each other, or that need a GPU which this machine does not have.
    """
    _check(hardware, device)
    if hardware.memory is None:
        return _local(hardware, device, rates)
    if hardware.kind == "cpu" or device == "cpu":
        return _described_cpu(hardware, rates)
    return _described_gpu(hardware)


def _check(hardware: Hardware, device: str) -> None:
    of_device = device.partition(":")[0]
    if hardware.kind != "auto" and of_device in ("cpu", "cuda") and of_device != hardware.kind:
        raise ConfigError(
            f"hardware.kind={hardware.kind} and device={device} name different devices: leave out device= to plan for "
            "the hardware"
        )
    if hardware.memory is not None and of_device == "mps":
        raise ConfigError("device=mps cannot be planned for by hardware.memory: leave out hardware.memory")
    if hardware.memory is not None and not cards.bytes_of(hardware.memory):
        raise ConfigError(f"hardware.memory={hardware.memory} is nothing: give the size of the device, as in 24GiB")


def _described_gpu(hardware: Hardware) -> Machine:
    """Return a GPU that is not here, from its nominal figures."""
    memory = cards.bytes_of(hardware.memory or "")
    given = _given(hardware)
    sources = {
        "memory_bytes": given["sources"].get("memory_bytes", "given: hardware.memory"),
        "used_bytes": f"assumed: the driver keeps 0.2 GiB and {DRIVER_SHARE:.0%}; nothing else uses the GPU",
        "context_bytes": "assumed: CUDA's context and kernels, which grow with the GPU",
        "launch_seconds": "assumed: hosts launch an operation in 4 to 10 us",
    }
    major, minor = map(int, hardware.capability.split("."))
    return Machine(
        name=hardware.name or f"a GPU of {hardware.memory}",
        target=Target("cuda", (major, minor), has_flash=major >= 8),
        memory_bytes=memory,
        used_bytes=int(DRIVER_BYTES + DRIVER_SHARE * memory),
        context_bytes=_cuda_context(memory),
        **{**given, "sources": sources | given["sources"]},
    )


def _described_cpu(hardware: Hardware, rates: bool) -> Machine:
    """Return a machine without a GPU that has another size than this one."""
    here = _with_rates(Machine("", target(torch.device("cpu")), None), torch.device("cpu"), rates, "assumed: as here")
    sources = {
        "memory_bytes": "given: hardware.memory",
        "used_bytes": "assumed: nothing else uses the memory",
        "context_bytes": "assumed: Python and the libraries",
    }
    found = replace(
        here,
        name=hardware.name or f"a CPU with {hardware.memory}",
        memory_bytes=cards.bytes_of(hardware.memory or ""),
        context_bytes=LIBRARIES_BYTES,
        sources=here.sources | sources,
    )
    return _overridden(found, hardware)


def _local(hardware: Hardware, device: str, rates: bool) -> Machine:
    """Return a device of this machine, with the memory that is free now."""
    found = _local_device(hardware, device)
    total, free = total_bytes(found), available_bytes(found)
    name, context, why = str(found), 0, ""
    if found.type == "cuda":
        name, context, why = torch.cuda.get_device_name(found), _cuda_context(total or 0), "assumed: CUDA's context"
        free = None if free is None else free + torch.cuda.memory_allocated(found)
    elif (resident := resident_bytes()) is not None:
        context, why = min(resident, LIBRARIES_BYTES), "measured here: Python and the libraries"
    # This process has its context already, so the free memory is less by it.
    used = 0 if total is None or free is None else max(0, total - free - context)
    known = "" if total is None else "measured here"
    machine = Machine(name, target(found), total, used, context)
    machine = replace(machine, sources={"memory_bytes": known, "used_bytes": known, "context_bytes": why})
    card = cards.same_card(name, total or 0)
    if card:
        machine = replace(machine, **_merged(machine, _given(card.hardware)))
    return _overridden(_with_rates(machine, found, rates and card is None, "measured here"), hardware)


def _local_device(hardware: Hardware, device: str) -> torch.device:
    try:
        return resolve_device(device if hardware.kind == "auto" else hardware.kind if device == "auto" else device)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. To plan for a GPU that is not here, choose it, as in hardware=rtx_4090, or give its memory, as "
            "in hardware.memory=24GiB"
        ) from error


def _cuda_context(memory: int) -> int:
    return int(min(CONTEXT_BYTES + CONTEXT_SHARE * memory, CONTEXT_MOST))


def _given(hardware: Hardware) -> dict:  # type: ignore[type-arg]
    """Return the rates among the settings as fields of Machine, with their sources."""
    address = cards.source_of(hardware)
    source = f"specified: {address}" if address else "given: hardware"
    matmul = {dtype: getattr(hardware, name) * 1e12 for name, dtype in _RATES.items() if getattr(hardware, name)}
    found = {name: getattr(hardware, name) * 1e9 for name in ("bandwidth", "link") if getattr(hardware, name)}
    found |= {"matmul": matmul} if matmul else {}
    return {**found, "sources": dict.fromkeys([*found, *["memory_bytes"] * bool(address)], source)}


def _merged(machine: Machine, given: dict) -> dict:  # type: ignore[type-arg]
    sources = {**machine.sources, **given["sources"], "memory_bytes": machine.sources["memory_bytes"]}
    return {**given, "matmul": machine.matmul | given.get("matmul", {}), "sources": sources}


def _overridden(machine: Machine, hardware: Hardware) -> Machine:
    """Return a machine of which the rates among the settings replace those found."""
    found = replace(machine, name=hardware.name or machine.name)
    return replace(found, **_merged(found, _given(replace(hardware, memory=None))))


def _with_rates(machine: Machine, device: torch.device, rates: bool, source: str) -> Machine:
    """Return a machine with the rates measured on a device of this one."""
    if not rates:
        return machine
    measured: Rates = rates_of(device)
    values = {each.name: getattr(measured, each.name) for each in fields(Rates)}
    if device.type == "cpu":
        values["link"] = None
    else:
        values["cached_bandwidth"] = None
        values["launch_seconds"] = machine.launch_seconds
    sources = machine.sources | {name: source for name, value in values.items() if value}
    return replace(machine, **values, sources=sources)
