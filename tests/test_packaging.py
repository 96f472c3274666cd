"""The wheel: it builds without a network, contains the package and conf/, and works from another folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [path] = folder.glob("*.whl")
    return path


def relative_files(folder, pattern):
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def test_wheel_contains_exactly_the_modules_and_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = {name for name in names if ".dist-info/" not in name}
    modules = {f"{top}/{n}" for top in ("lora_ft", "hydra_plugins") for n in relative_files(ROOT / top, "*.py")}
    modules |= {f"lora_ft/sweeps/{name}" for name in ("page.html.jinja", "page.css", "page.js")} | {
        "lora_ft/publishing/card.md.jinja",
        "lora_ft/memory/plan.html.jinja",
    }
    modules |= {f"lora_ft/models/configs/{name}" for name in relative_files(ROOT / "lora_ft/models/configs", "*.json")}
    configs = {f"lora_ft/conf/{name}" for name in relative_files(ROOT / "conf", "*.yaml")}
    assert len(configs) > 30 and files == modules | configs
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"lora-ft = lora_ft.__main__:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_unpacked_wheel_works_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()

    def run(*arguments):
        env = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run([sys.executable, *arguments], cwd=elsewhere, env=env, capture_output=True, text=True)

    where = run("-c", "from lora_ft import config; print(config.CONF)")
    assert where.stdout.strip() == str(site / "lora_ft" / "conf")
    page = run("-m", "lora_ft", "train", "--help")
    assert page.returncode == 0 and "experiment=demo" in page.stdout
    composed = run("-m", "lora_ft", "train", "experiment=demo", "--cfg", "job", "-p", "quant")
    assert composed.returncode == 0 and "kind: nf4" in composed.stdout
    assert run("-m", "lora_ft", "--version").stdout == f"lora_ft {wheel.name.split('-')[1]}\n"
    assert run("-m", "lora_ft", "train", "adapter.rr=4").returncode == 2
    assert not list(elsewhere.iterdir())
