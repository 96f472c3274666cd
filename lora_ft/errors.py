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
