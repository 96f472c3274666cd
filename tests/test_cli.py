"""The commands as a user calls them, each in its own process: help pages, exit codes, imports."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from lora_ft import config, validation
from lora_ft.cli import choices, entry, help

COMMAND = str(Path(sys.executable).with_name("lora-ft"))
LIGHT = ("torch", "transformers", "peft", "numpy", "hydra", "omegaconf")


def process(arguments, cwd, **env):
    return subprocess.run(arguments, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def imported(report, names):
    """Return those of the packages that appear in the report of `python -X importtime`."""
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in report.splitlines()}
    assert "lora_ft" in loaded
    return loaded & set(names)


@pytest.mark.parametrize("arguments", [[], ["train", "--help"], ["--version"], ["-sc", "query=bash"], ["tran"]])
def test_help_completion_and_unknown_commands_import_neither_torch_nor_hydra(tmp_path, arguments):
    line = {"COMP_LINE": "lora-ft train adapter."}
    done = process([sys.executable, "-X", "importtime", "-m", "lora_ft", *arguments], tmp_path, **line)
    assert done.returncode == (2 if arguments == ["tran"] else 0)
    assert not imported(done.stderr, LIGHT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["train", "adapter.rr=4"], ["train", "adapter.r=0"], ["eval", "run=absent"],
                                   ["train", "--cfg", "job"]])  # fmt: skip
def test_wrong_setting_is_found_before_torch_is_imported(tmp_path, arguments):
    done = process([sys.executable, "-X", "importtime", "-m", "lora_ft", *arguments], tmp_path)
    assert done.returncode == (0 if "--cfg" in arguments else 2)
    assert not imported(done.stderr, ["torch", "transformers", "peft"])
    assert not list(tmp_path.iterdir())


def test_command_and_both_module_forms_behave_the_same(tmp_path):
    forms = [[COMMAND, "train"], [sys.executable, "-m", "lora_ft", "train"], [sys.executable, "-m", "lora_ft.train"]]
    done = [process([*form, "data.path=x", "experiment=absent"], tmp_path) for form in forms]
    for d in done:  # importing a command may bring warnings of other libraries before the message
        assert (d.returncode, d.stdout) == (2, "") and d.stderr.endswith(
            f"lora-ft: experiment=absent: choose one of {', '.join(choices.of('experiment'))}\n"
        )
    assert done[0].stderr == done[1].stderr


@pytest.mark.parametrize("command", ["sweep", "report"])
def test_sweep_and_report_import_no_torch(command):
    code = f"import sys, lora_ft.{command}, lora_ft.sweeps.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


RUN_AS_MODULE = """
import runpy, sys
modules, sys.argv[1:] = sys.argv[1:], ["--help"]
for module in modules:
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0
import peft, bitsandbytes
from importlib.util import find_spec
from transformers.utils import is_kernels_available
print(find_spec("kernels"), is_kernels_available(), "torch._inductor.kernel.mm" in sys.modules)
"""


def test_commands_import_neither_kernels_of_the_hub_nor_the_compiler(tmp_path):
    modules = [f"lora_ft.{command}" for command in config.SCHEMAS if command not in ("sweep", "report")]
    (tmp_path / "kernels.py").write_text("print('kernels was imported')")  # bitsandbytes asks on some processors only
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    done = process([sys.executable, "-c", RUN_AS_MODULE, *modules], tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "None False False", "")
    assert "kernels was imported" not in done.stdout


def test_importing_the_package_changes_nothing_in_the_process(tmp_path):
    code = (
        "import logging, sys; before = set(sys.modules)\nimport lora_ft\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "print(sorted(new), sorted(logging.root.manager.loggerDict), logging.root.level)\n"
        "from lora_ft.io import process\nprocess.prepare()\n"
        "print(sys.modules['kernels'], logging.getLogger('bitsandbytes').level)"
    )
    done = process([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(Path(__file__).parents[1]))
    assert (done.stdout.splitlines(), done.stderr) == (["['lora_ft'] [] 30", "None 40"], "")


@pytest.mark.parametrize("arguments", ["train --help", "train data.path=x --cfg job"])
def test_closed_pipe_exits_with_141_and_no_message(tmp_path, arguments):
    # The reader has exited before the first line is written, which `| head -1` does only by chance.
    line = f"(sleep 1; {COMMAND} {arguments}; echo $? >code) | true"
    assert process(["bash", "-c", line], tmp_path).stderr == ""
    assert (tmp_path / "code").read_text() == "141\n"


@pytest.mark.parametrize("command", config.SCHEMAS)
def test_every_command_can_be_run_as_a_module(command):
    source = Path(entry.__file__).parents[1].joinpath(f"{command}.py").read_text("utf-8")
    assert source.endswith(f'if __name__ == "__main__":\n    entry.run("{command}")\n')
    assert re.search(r"^def main\(", source, re.MULTILINE)


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "data.path=x", "adapter.r=0"], "adapter.r must be at least 1, got 0"),
    (["-m", "train", "data.path=x", "adapter.rr=1,2"], "adapter.rr is not a setting; nearest: adapter.r"),
    (["train", "--cfg", "job", "--package", "adaptor"], "--package adaptor: the config has no such part"),
    (["train", "--config-dir", "absent"], "--config-dir absent is not a folder"),
])  # fmt: skip
def test_usage_error_is_one_message_and_exit_code_2(tmp_path, arguments, message):
    done = process([COMMAND, *arguments], tmp_path, HYDRA_FULL_ERROR="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"lora-ft: {message}\n")


def test_cfg_and_info_flags_show_the_composed_config_and_its_defaults(tmp_path):
    job = process([COMMAND, "train", "data.path=a,b", "--cfg", "job", "--package", "data"], tmp_path)
    assert job.returncode == 0 and "path: a,b\n" in job.stdout
    info = process([COMMAND, "train", "experiment=demo", "--info", "defaults"], tmp_path)
    assert info.returncode == 0 and "quant/nf4" in info.stdout
    assert not list(tmp_path.iterdir())


def test_overview_names_every_command():
    for command, schema in config.SCHEMAS.items():
        assert re.search(rf"^  {command} +{re.escape(schema.__doc__[:20])}", help.overview(), re.MULTILINE)


@pytest.mark.parametrize("command", config.SCHEMAS)
def test_help_page_names_every_choice_and_setting_with_type_default_and_unit(command):
    page = help.page(command)
    words = " ".join(page.split())
    assert max(map(len, page.splitlines())) <= 100
    for setting in validation.settings(config.SCHEMAS[command]):
        kind = help.type_words(setting.type).removeprefix("an ").removeprefix("a ")
        unit = f", {setting.unit}" if setting.unit else ""
        assert f"{setting.key}={help.show(setting.default)}" in words
        assert f"{setting.meaning} ({kind}{unit})" in words
    for group, default in choices.groups(command).items():
        assert f"choices of {group}" + (f" (default: {default})" if default else "") in words
        for name, meaning in choices.of(group).items():
            assert f"{group}={name} {meaning}".rstrip() in words


def test_help_page_shows_the_choices_of_config_dir(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n# rank 4 on my notes\n")
    done = process([COMMAND, "train", "--help", "--config-dir", str(tmp_path)], tmp_path)
    assert re.search(r"experiment=mine +rank 4 on my notes", done.stdout)


def test_version_is_that_of_the_package(tmp_path):
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert process([COMMAND, "--version"], tmp_path).stdout == f"lora_ft {declared}\n"
    assert metadata.version("lora_ft") == declared
