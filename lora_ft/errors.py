"""The exit codes of lora-ft, one exception for each.

    LoraFtError
    ├── ConfigError      2  a setting, an override or the way a command was called
    ├── DataError        4  a row, a file of rows, or what the rows leave to learn from
    ├── MismatchError    5  an adapter and a base model that do not belong together
    ├── CheckpointError  6  a saved state that does not verify
    ├── ResourceError    7  memory, disk, or a model or package that is not on this machine
    ├── NonFiniteError   8  a loss or gradient norm that is not a number
    └── SecurityError    9  a file or setting that could run code or leave its folder

Exit 0 is success, 1 a bug of ours, 3 a sweep that failed in part, 130 and 143 a signal (Interrupted), 141 a reader
of the output that left.
"""

_TRAINING = "lower train.tokens_per_microbatch, or set train.gradient_checkpointing=every_1 or quant=nf4"
_SAVES_MEMORY = {
    "train": _TRAINING,
    "sweep": _TRAINING,
    "check": _TRAINING,
    "eval": "lower eval.tokens_per_microbatch",
    "chat": "lower sampling.max_new_tokens",
}


class LoraFtError(Exception):
    """A mistake or a condition that the user can act on: shown as one message, without a traceback."""

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


class NonFiniteError(LoraFtError):
    exit_code = 8


class SecurityError(LoraFtError):
    exit_code = 9


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, with what it left behind; as a KeyboardInterrupt it ends a whole sweep, not a job of it."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def out_of_memory(command: str, error: Exception) -> ResourceError | None:
    """Return the error to show for memory that did not suffice, with settings that need less; None for other errors.

    torch is not imported here: its errors are known by their names.
    """
    on_gpu = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not (on_gpu or on_cpu or isinstance(error, MemoryError)):
        return None
    advice = _SAVES_MEMORY.get(command, "use a machine with more of it")
    reason = str(error).partition("DefaultCPUAllocator: ")[2] or str(error)
    # The error is not the cause: its frames would keep the model in memory for the next jobs of a sweep.
    return ResourceError(f"out of memory{f' ({reason})' if reason else ''}: {advice}")
