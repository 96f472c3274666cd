"""Native Windows gets one error message, from the command line, from the modules and from Python."""

import subprocess
import sys

import pytest

MESSAGE = "lora_ft needs Linux, macOS or WSL2"

# Windows has no fcntl and no resource. The platform is set last, and libraries may import both: in the test they are
# those of Linux.
PREPARE = """
import builtins, sys
real = builtins.__import__
def importing(name, names=None, *rest, **more):
    if name in ("fcntl", "resource") and names and names["__name__"].startswith("lora_ft"):
        raise ModuleNotFoundError(name)
    return real(name, names, *rest, **more)
builtins.__import__ = importing
import {module}
sys.platform = "win32"
"""
COMMAND = PREPARE.format(module="lora_ft.__main__") + "sys.argv = ['lora-ft', 'train']; lora_ft.__main__.main()"
MODULE = PREPARE.format(module="lora_ft.train") + "from lora_ft.cli import entry; entry.run('train')"
PYTHON = (
    PREPARE.format(module="lora_ft, lora_ft.errors")
    + """
calls = [lambda: lora_ft.train(None), lambda: lora_ft.load("x"), lambda: lora_ft.evaluate("x"),
         lambda: lora_ft.merge("x", "y"), lambda: lora_ft.publish("x", "dir:y"), lambda: lora_ft.sweep([], "x")]
for call in calls:
    try:
        call()
    except lora_ft.errors.ConfigError as error:
        print(error, file=sys.stderr)
"""
)


@pytest.mark.parametrize(("code", "exit_code", "count"), [(COMMAND, 2, 1), (MODULE, 2, 1), (PYTHON, 0, 6)])
def test_windows_is_refused_with_one_message(code: str, exit_code: int, count: int) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert [MESSAGE in line for line in done.stderr.splitlines()] == [True] * count
