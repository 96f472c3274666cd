"""Compute tasks in processes and return the results in the order of the tasks, the same for any number of processes.

    mapped(Encoder, (tokenizer, data), chunks, workers=4)      yields Encoder(tokenizer, data)(chunk) for each chunk

A worker is a new Python process, not a fork: it inherits no thread, no lock and no CUDA, and runs no code of the
program that started it. It needs one second to start. Tasks go to the workers in turn, one at a time, so that neither
side can wait for the other. A worker ends when its pipe is closed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn, TypeVar

from lora_ft.errors import LoraFtError, ResourceError

Task = TypeVar("Task")
Result = TypeVar("Result")

_SERVE = "from lora_ft.data.workers import serve; serve()"


def number(asked: int | None) -> int:
    """Return the number of workers that `data.workers` asks for: by default one for each core."""
    return len(os.sched_getaffinity(0)) if asked is None else asked


def mapped(
    make: Callable[..., Callable[[Task], Result]], arguments: tuple[Any, ...], tasks: Iterable[Task], workers: int
) -> Generator[Result]:
    """Yield make(*arguments)(task) for each task, in order; with at most one worker, in this process.

    An error of a task, or of the iterable of tasks, is raised after the results before it. Raises ResourceError if a
    worker dies.
    """
    if workers < 2:
        yield from map(make(*arguments), tasks)
        return
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(_Worker()) for _ in range(workers)]
        for worker in pool:  # when all have started
            worker.send((make, arguments))
        yield from _in_turns(pool, iter(tasks))


def _in_turns(pool: list["_Worker"], tasks: Iterator[Task]) -> Iterator[Any]:
    failure: Exception | None = None
    sent = received = 0
    while True:
        while failure is None and sent - received < len(pool):
            try:
                task = next(tasks)
            except Exception as error:  # StopIteration too
                failure = error
            else:
                pool[sent % len(pool)].send(task)
                sent += 1
        if sent == received:
            break
        yield pool[received % len(pool)].receive()
        received += 1
    if failure is not None and not isinstance(failure, StopIteration):
        raise failure


class _Worker:
    """One process, which makes its function and then answers each task with a result or an error."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        # One thread: the other cores have workers of their own. The path is that of this process, which may be changed.
        limits = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        environment = {**os.environ, **limits, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", "-c", _SERVE, str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, start_new_session=True,  # Ctrl-C is for the main process
            )  # fmt: skip
        except OSError as error:
            raise ResourceError(f"data.workers: a process cannot be started: {error}") from None
        finally:
            theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def send(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_death()

    def receive(self) -> Any:
        try:
            failed, result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._raise_death()
        if failed:
            raise result
        return result

    def _raise_death(self) -> NoReturn:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise ResourceError(
            f"a process that reads rows {how}: the machine may be short of memory; lower data.workers, or read in this "
            "process with data.workers=0"
        )


def serve() -> None:
    """Answer the tasks of one pipe, whose descriptor is the first argument, until it is closed."""
    pipe = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        make, arguments = pipe.recv()
        function, failure = None, None
        try:
            function = make(*arguments)
        except Exception as error:
            failure = _portable(error)
        while True:
            task = pipe.recv()
            if failure is not None or function is None:
                pipe.send((True, failure))
                continue
            try:
                answer = False, function(task)
            except Exception as error:
                answer = True, _portable(error)
            pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """Return an error that the main process can raise: our own as it is, a bug with its traceback as text."""
    if isinstance(error, LoraFtError):
        return error
    return RuntimeError("in a process that reads rows:\n" + "".join(traceback.format_exception(error)))
