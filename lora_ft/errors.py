"""Exceptions of lora_ft, one for each exit code.

    LoraFtError
    ├── ConfigError      2  a wrong setting, override or command line
    ├── DataError        4  a bad row or file of rows, or rows without anything to train on
    ├── MismatchError    5  an adapter and a base model that do not match
    ├── CheckpointError  6  a damaged checkpoint, or one of another run
    ├── ResourceError    7  not enough memory or disk, or a missing model or package
    ├── NonFiniteError   8  a loss or gradient norm that is NaN or infinite
    └── SecurityError    9  a file or setting that could run code, leave its folder or reveal a secret

Exit 0 is success, 1 a bug in lora_ft, 3 a sweep with failed jobs, 128 and the number of the signal that
stopped a run (Interrupted: 130 SIGINT, 143 SIGTERM, 129 SIGHUP, on Linux 138 SIGUSR1 and 140 SIGUSR2), 141 a closed
output pipe.
"""

_TRAINING = "lower train.tokens_per_microbatch, or set train.gradient_checkpointing=every_1 or quant=nf4"
SAVES_MEMORY = {
    "train": _TRAINING,
    "sweep": _TRAINING,
    "check": _TRAINING,
    "eval": "lower eval.tokens_per_microbatch",
    "chat": "lower sampling.max_new_tokens",
    "merge": "set base_weights=dequantized, which loads one base instead of two",
}


class LoraFtError(Exception):
    """Base of all errors that a user can act on: shown as one message, without a traceback."""

    exit_code = 1


class ConfigError(LoraFtError):
    exit_code = 2


class DataError(LoraFtError):
    exit_code = 4


class MismatchError(LoraFtError):
    exit_code = 5


class CheckpointError(LoraFtError):
    exit_code = 6


class ResourceError(LoraFtError):
    exit_code = 7


class LostRank(ResourceError):
    """Another process of a run has ended or does not answer."""


class NonFiniteError(LoraFtError):
    exit_code = 8


class SecurityError(LoraFtError):
    exit_code = 9


class Interrupted(KeyboardInterrupt):
    """A signal that stops a run. A KeyboardInterrupt, so that it ends a whole sweep and not one job."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def out_of_memory(command: str, error: Exception) -> ResourceError | None:
    """Return a ResourceError with advice for an out-of-memory error, None for other errors.

    torch is not imported here, so its errors are recognized by name.
    """
    on_gpu = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
    # The second one is the system's, for a file that cannot be mapped.
    messages = ("DefaultCPUAllocator", "Cannot allocate memory")
    on_cpu = isinstance(error, RuntimeError | OSError) and any(message in str(error) for message in messages)
    if not (on_gpu or on_cpu or isinstance(error, MemoryError)):
        return None
    advice = SAVES_MEMORY.get(command, "use a machine with more memory")
    # Not chained: the frames of the error would keep the model in memory for the next jobs of a sweep.
    return ResourceError(f"{out_of_memory_reason(error)}: {advice}")


def out_of_memory_reason(error: Exception) -> str:
    """Return what an out-of-memory error says, in one line."""
    reason = str(error).partition("DefaultCPUAllocator: ")[2] or str(error)
    return f"out of memory ({reason})" if reason else "out of memory"
