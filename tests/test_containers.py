"""The Dockerfile and the files for Kubernetes and SkyPilot: pinned, complete, and with commands that compose."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import lora_ft
from lora_ft import errors

ROOT = Path(lora_ft.__file__).parent.parent
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
IMAGE = f"lora_ft:{VERSION}"


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docs" / name).read_text("utf-8"))


def command_of_kubernetes() -> list[str]:
    return document("kubernetes.yaml")["spec"]["template"]["spec"]["containers"][0]["args"]


def command_of_skypilot() -> list[str]:
    words = shlex.split(document("skypilot.yaml")["run"].replace("\\\n", " "))
    return words[words.index("/opt/lora_ft/bin/lora-ft") + 1 :]


@pytest.mark.parametrize("words", [command_of_kubernetes(), command_of_skypilot()], ids=["kubernetes", "skypilot"])
def test_command_composes_and_continues_a_run_on_the_volume(words: list[str]) -> None:
    command, *overrides = words
    cfg = lora_ft.compose(command, overrides)
    assert cfg.resume == "auto" and "hydra.run.dir=/data/run" in overrides
    assert cfg.data.path == "/data/my.jsonl" and cfg.train.save_every_steps


def test_kubernetes_job_has_its_keys_and_mounts() -> None:
    job = document("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job") and job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows nothing else"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/data"]
    assert container["image"] == IMAGE and container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    [codes] = [rule["onExitCodes"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes["containerName"] == container["name"]
    codes_of_errors = {error.exit_code for error in errors.LoraFtError.__subclasses__()}
    assert set(codes["values"]) == codes_of_errors - {errors.ResourceError.exit_code}


def test_skypilot_task_has_known_keys_and_the_volume() -> None:
    task = document("skypilot.yaml")
    assert task.keys() == {"name", "resources", "volumes", "run"}
    assert task["resources"].keys() == {"accelerators", "use_spot", "image_id"}
    assert task["resources"]["image_id"] == f"docker:{IMAGE}" and task["volumes"] == {"/data": "lora-ft"}


def test_dockerfile_is_pinned_and_runs_lora_ft() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    by_instruction = {line.split()[0]: line.partition(" ")[2] for line in lines if line and not line.startswith("#")}
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04", by_instruction["FROM"])
    assert text.count("\nFROM ") == 1 and "latest" not in text
    assert by_instruction["ENTRYPOINT"] == '["lora-ft"]' and by_instruction["WORKDIR"] == "/data"
    [install] = [line for line in lines if "pip install" in line]
    assert "--constraint /src/constraints.txt" in install
    extras = re.search(r"/src\[(.+?)\]", install)[1].split(",")
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
               for extra in extras)  # fmt: skip
    assert all(tag == IMAGE for tag in re.findall(r"lora_ft:[\w.]+", text + (ROOT / "docs/cluster.md").read_text()))
