"""From the command line to a command's dataclass, in one process: quoting, errors, runs, sweeps."""

import json
import re
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_ft import config, errors, validation
from lora_ft.cli import choices, entry, overrides
from lora_ft.io import durable

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
AWKWARD = [
    "What's (roughly) 2+2, and why?", 'a "quoted" word', "back\\slash\\", "\\", "\\'", '\\"', "${x}", "\\${x}", "a${b",
    "${", "$", "{a}", "[a,b]", "a=b", "a: b", "", " ", " lead", "trail ", "~", "+", "true", "3", "Null", "'null'",
    "choice(a,b)", "größe 你好 🙂", "tab\tnewline\n", "#", "%s", "{'a': 1}", "\\\\${x}\\", "--help", "a,b", "''",
]  # fmt: skip
HERE = "hydra/launcher=basic"  # jobs run in this process, which has the stand-in commands
SWEEP = ("train", "-m", HERE)
BASE = {"adapter_path": "it's, (odd)", "model.path": "b=c"}


def _raise(error):
    def outcome(cfg):
        raise error

    return outcome


class Calls(list):
    """The calls of the stand-in commands; `outcome` is what the next one does."""

    outcome = staticmethod(lambda cfg: None)


@pytest.fixture(scope="module")
def stub():
    calls = Calls()

    def main(cfg, invocation):
        calls.append((cfg, invocation))
        return calls.outcome(cfg)

    def end(sweep):
        codes = [json.loads(path.read_text())["exit_code"] for path in sorted(sweep.glob("*/failure.json"))]
        return 0 if not codes else codes[0] if len(codes) == sum(path.is_dir() for path in sweep.iterdir()) else 3

    saved = {}
    for command in config.SCHEMAS:
        module = types.ModuleType(f"lora_ft.{command}")
        module.main, module.end = main, end
        saved[module.__name__] = sys.modules.get(module.__name__)
        sys.modules[module.__name__] = module
    yield calls
    for name, module in saved.items():
        sys.modules.pop(name)
        if module:
            sys.modules[name] = module


@pytest.fixture
def calls(stub, tmp_path, monkeypatch):
    """Run in an empty current folder; return the calls of the stand-in commands."""
    monkeypatch.chdir(tmp_path)
    stub.clear()
    stub.outcome = lambda cfg: None
    return stub


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        entry.run(None, list(arguments))
    return end.value.code


def refused(capfd, *arguments):
    """Call a command that must exit with 2 and print one message, without a traceback; return the message."""
    assert call(*arguments) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("lora-ft: ") and "Traceback" not in err and "HYDRA" not in err
    return err.removeprefix("lora-ft: ").rstrip("\n")


def store_run(folder, **groups):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(groups), "utf-8")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXT)
def test_any_text_reaches_the_command_and_its_overrides_unchanged(calls, text):
    assume(text not in ("null", "???"))
    calls.clear()
    assert call("chat", "adapter_path=a", "model.path=b", f"prompt={text}") == 0
    [(cfg, invocation)] = calls
    assert cfg.prompt == text
    assert invocation.overrides == ["adapter_path=a", "model.path=b", f"prompt={text}"]


@pytest.mark.parametrize("start", range(0, len(AWKWARD), 12))
def test_every_text_setting_takes_awkward_text_unchanged(calls, start):
    other = ("run", "data.where", "data.delimiter", *BASE)  # a mapping, and a text of one character
    keys = [s.key for s in validation.settings(config.ChatRun) if s.text and s.key not in other]
    given = dict(zip(keys, AWKWARD[start : start + 12], strict=False))
    signs = ("", "+", "++") * len(given)
    typed = [f"{sign}{key}={text}" for sign, (key, text) in zip(signs, given.items(), strict=False)]
    assert call("chat", *typed, *(f"{key}={text}" for key, text in BASE.items())) == 0
    [(cfg, invocation)] = calls
    for key, text in {**given, **BASE}.items():
        group, _, name = key.rpartition(".")
        home = text == "~" and overrides.declared("chat", key).path
        assert getattr(getattr(cfg, group) if group else cfg, name) == (str(Path.home()) if home else text)
    assert invocation.overrides == [f"{key}={text}" for key, text in {**given, **BASE}.items()]


@pytest.mark.parametrize("text", ["a, b ${x} 'q' \\", "\\${x}\\' größe"])
def test_any_text_reaches_every_job_of_a_sweep_unchanged(calls, text):
    assert call(*SWEEP, f"data.path=x{text}", "adapter.r=4,8") == 0
    assert [(cfg.data.path, cfg.adapter.r) for cfg, _ in calls] == [(f"x{text}", 4), (f"x{text}", 8)]
    assert [i.overrides for _, i in calls] == [[f"data.path=x{text}", f"adapter.r={r}"] for r in (4, 8)]


def test_null_unsets_an_optional_text_and_is_text_elsewhere(calls):
    assert call("train", "data.path=null", "data.system=null", "model.path=null") == 0
    cfg = calls[0][0]
    assert (cfg.data.path, cfg.data.system, cfg.model.path) == ("null", None, "null")


def test_three_question_marks_are_refused_as_text(calls, capfd):
    assert "means a missing value" in refused(capfd, "chat", "adapter_path=a", "model.path=b", "prompt=???")


def test_values_of_where_are_text_on_the_command_line_and_any_value_in_a_mapping(calls):
    values = {"source": "[a, b]", "label": "1", "a.b": "x: ${y}, 'z'", "ok": "null"}
    assert call("train", "data.path=x", *(f"data.where.{key}={value}" for key, value in values.items())) == 0
    cfg, invocation = calls[0]
    assert cfg.data.where == values
    assert call("train", *invocation.overrides) == 0 and calls[1][0] == cfg
    assert call("train", "data.path=x", "data.where={source:[a,b],label:1,ok:true}", "data.delimiter=;") == 0
    assert calls[2][0].data.where == {"source": ["a", "b"], "label": 1, "ok": True}
    assert calls[2][0].data.delimiter == ";"


def test_mappings_take_new_keys_without_plus_and_dotted_layer_names(calls):
    columns = ["data.columns.source=English, plain", "data.columns.b=${x}"]
    patterns = ["adapter.rank_pattern.q_proj=4", "adapter.rank_pattern.layers.0.q_proj=8"]
    assert call("train", "data.path=x", *columns, *patterns, "adapter.alpha_pattern={k_proj:2}") == 0
    cfg, invocation = calls[0]
    assert cfg.data.columns == {"source": "English, plain", "b": "${x}"}
    assert cfg.adapter.rank_pattern == {"q_proj": 4, "layers.0.q_proj": 8}
    assert cfg.adapter.alpha_pattern == {"k_proj": 2.0}
    assert call("train", *invocation.overrides) == 0  # what is reported can be typed again
    assert calls[1][0] == cfg and calls[1][1].overrides == invocation.overrides


@pytest.mark.closes("E06")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rr=4", "adapter.rr is not a setting; nearest: adapter.r"),
        ("lr=1", "lr is not a setting; nearest: optim.lr"),
        ("foo=3", "foo is not a setting of lora-ft train"),
        ("model@other=gpt2", "model@other is not a setting; nearest: model.path"),
        ("quant=nf5", "quant=nf5: choose one of fp4, int8, nf4, none"),
        ("quant=null", "quant=null: choose one of fp4, int8, nf4, none"),
        ("experiment=dmo", f"experiment=dmo: choose one of {', '.join(choices.of('experiment'))}"),
        ("adapter.r=abc", "adapter.r must be an integer, got abc"),
        ("adapter.r=[1,2]", "adapter.r=[1,2]: adapter.r takes one value; lora-ft sweep adapter.r=1,2 trains with each"),
        ("adapter.r=${x}", "adapter.r must be an integer, but: Interpolation key 'x' not found"),
        ("adapter.r=0", "adapter.r must be at least 1, got 0"),
        ("adapter.lora_alpha=nan", "adapter.lora_alpha must be finite, got nan"),
        ("adapter.alpha_pattern={q_proj:inf}", "adapter.alpha_pattern.q_proj must be finite, got inf"),
        ("adapter.r=${oc.env:NOPE}", "adapter.r: the environment variable NOPE is not set"),
        ("hydra.run.dir=${oc.env:NOPE}", "hydra.run.dir: the environment variable NOPE is not set"),
        ("optim.lr=fast", "optim.lr must be a number, got fast"),
        ("train.packing=maybe", "train.packing must be true or false, got maybe"),
        ("model.dtype=f32", "model.dtype must be one of auto, float32, bfloat16, float16, fp32, bf16, fp16, got f32"),
        ("adapter.target_modules=all-linear", "adapter.target_modules must be a list like [a,b], got all-linear"),
        ("adapter.rank_pattern={q:b}", "adapter.rank_pattern.q must be an integer, got {q:b}"),
        (
            "adapter.target_modules=q,v",
            "adapter.target_modules=q,v names several values: write adapter.target_modules=[q,v]",
        ),
        ("adapter.r=4,8", "adapter.r=4,8 names several values: lora-ft sweep trains with each of them"),
        ("adapter.r", "'adapter.r' is not of the form key=value"),
        ("~adapter.r", "~adapter.r: a setting cannot be deleted; give it a value"),
    ],
)
def test_wrong_override_is_refused_with_its_name_rule_and_value(calls, capfd, tmp_path, override, message):
    assert refused(capfd, "train", "data.path=x", override) == message
    assert not calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["adapter.target_modules=[a", "model.added_tokens=[<a>]", "=3", "hydra.run.dir"])
def test_override_that_cannot_be_parsed_is_named(calls, capfd, override):
    assert override in refused(capfd, "train", "data.path=x", override)


def test_one_message_names_all_broken_rules(calls, capfd):
    message = refused(capfd, "train", "adapter.r=0", "optim.lr=-1")
    assert [line.split()[0] for line in message.splitlines()] == ["adapter.r", "optim.lr", "data.path"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter: {rr: 4}", "experiment/mine.yaml: adapter.rr is not a setting; nearest: adapter.r"),
        ("adapter: {r: abc}", "experiment/mine.yaml: adapter.r must be an integer, got abc"),
        ("adapter: {r: '${oc.env:NOPE}'}", "adapter.r: the environment variable NOPE is not set"),
        ("adapter: {r: '${nope}'}", "adapter.r must be an integer, but: Interpolation key 'nope' not found"),
        ("adapter: {rank_pattern: {q: b}}", "experiment/mine.yaml: adapter.rank_pattern.q must be an integer, got b"),
        ("foo: 3", "experiment/mine.yaml: foo is not a setting of lora-ft train"),
        ("defaults: [{override /quant: nf5}]", "quant=nf5: choose one of fp4, int8, nf4, none"),
        ("adapter: {r: 1", r"while parsing .*experiment/mine\.yaml"),
    ],
)
def test_mistake_in_a_config_file_of_the_user_names_file_and_key(calls, capfd, tmp_path, text, message):
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    error = refused(capfd, "train", "data.path=x", "experiment=mine", "--config-dir", "own")
    assert error == message or re.search(message, error)


@pytest.mark.parametrize("text", ["adapter: {r: 1}", "defaults: [{override /quant: nf4}]"])
def test_experiment_without_package_directive_is_told_the_missing_line(calls, capfd, tmp_path, text):
    for group, sign in {"experiment": "", "extra": "+"}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
        error = refused(capfd, "train", "data.path=x", f"{sign}{group}=mine", "--config-dir", ".")
        assert error == f"{group}/mine.yaml: its first line must be '# @package _global_'"


def test_file_that_is_not_utf_8_is_named(calls, capfd, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "good.yaml").write_text("# @package _global_\n")
    (tmp_path / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n# gr\xfcn\n")
    error = refused(capfd, "train", "data.path=x", "experiment=mine", "--config-dir", ".")
    assert error == f"{tmp_path}/experiment/mine.yaml is not UTF-8"
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_bytes(b"data: {path: gr\xfcn}")
    assert refused(capfd, "eval", "run=r").startswith("r/config.yaml is not valid YAML in UTF-8: 'utf-8' codec")


@pytest.mark.parametrize("typed", [["data.path=x"], ["experiment=demo"], ["experiment=named"]])
def test_typed_model_path_clears_the_hub_id_of_the_default_model(calls, tmp_path, typed):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "named.yaml").write_text(
        "# @package _global_\nmodel: {path: p, hub_id: someone/p, revision: main}\ndata: {path: x}\n"
    )
    assert call("train", "--config-dir", ".", *typed) == 0
    assert call("train", "--config-dir", ".", *typed, "model.path=base/llama") == 0
    assert call("train", "--config-dir", ".", *typed, "model.path=base/llama", "model.hub_id=me/mine") == 0
    default, cleared, named = (cfg.model for cfg, _ in calls)
    assert default.hub_id and default.path != "base/llama"
    assert (cleared.path, cleared.hub_id, cleared.revision) == ("base/llama", None, None)
    assert (named.path, named.hub_id, named.revision) == ("base/llama", "me/mine", None)
    assert calls[1][1].overrides == [*typed, "model.path=base/llama"]


def test_typed_model_path_keeps_the_hub_id_of_a_typed_choice_but_not_of_a_run(calls, tmp_path):
    assert call("train", "data.path=x", "model=smollm2_135m", "model.path=copy") == 0
    assert calls[0][0].model.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    store_run(tmp_path / "r", model={"path": "hub/one", "hub_id": "hub/one", "revision": "abc", "dtype": "float32"})
    assert call("chat", "run=r", "model.path=hub/two") == 0
    assert calls[1][0].model == config.Model(path="hub/two", dtype=config.Dtype.float32)


def test_cfg_flag_shows_the_config_that_the_command_receives(capfd):
    assert call("train", "data.path=x", "model.path=base", "--cfg", "job", "--package", "model") == 0
    assert "hub_id: null\n" in capfd.readouterr().out


def test_existing_paths_are_made_absolute_and_others_stay(calls, tmp_path):
    for name in ("base", "rows.jsonl", "held, out.jsonl", "template.jinja", "start"):
        (tmp_path / name).mkdir()
    typed = ["model=local", "model.path=base", "model.chat_template=./template.jinja", "data.path=rows.jsonl",
             "data.eval_path=held, out.jsonl", "adapter.init_from=../" + tmp_path.name + "/start"]  # fmt: skip
    assert call("train", *typed) == 0
    cfg, invocation = calls[0]
    found = [cfg.model.path, cfg.model.chat_template, cfg.data.path, cfg.data.eval_path, cfg.adapter.init_from]
    assert found == [str(tmp_path / n) for n in ("base", "template.jinja", "rows.jsonl", "held, out.jsonl", "start")]
    assert invocation.overrides == typed
    typed = ["model.path=owner/name", "data.path=package:a/b", "adapter.init_from=owner/name", "data.prompt=base"]
    assert call("train", *typed) == 0
    cfg = calls[1][0]
    assert (cfg.model.path, cfg.data.path, cfg.adapter.init_from) == ("owner/name", "package:a/b", "owner/name")
    assert cfg.data.prompt == "base"  # free text, not a path


def test_tilde_is_the_home_folder_in_every_path(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    store_run(tmp_path / "home" / "r", **STORED)
    assert call("merge", "run=~/r", "out=~/merged") == 0
    cfg = calls[0][0]
    assert (cfg.run, cfg.out, cfg.model.path) == (str(tmp_path / "home/r"), str(tmp_path / "home/merged"), "a${b")
    assert call("chat", "adapter_path=~nobody-of-this-name/x", "model.path=" + "long" * 99, "prompt=~/r") == 0
    cfg = calls[1][0]
    assert (cfg.adapter_path, cfg.prompt) == ("~nobody-of-this-name/x", "~/r")


def test_sweep_folder_that_cannot_be_made_is_named_with_the_reason(calls, capfd, tmp_path):
    (tmp_path / "file").write_text("")
    assert call("train", "data.path=x", "-m", "hydra/launcher=basic", f"hydra.sweep.dir={tmp_path}/file") == 7
    assert re.fullmatch(rf"lora-ft: {tmp_path}/file cannot be written: (Not a|File exists).*\n", capfd.readouterr().err)
    assert not calls


def test_write_error_is_a_message_and_other_system_errors_are_tracebacks(calls, capfd, tmp_path):
    (tmp_path / "folder").mkdir()
    calls.outcome = lambda cfg: durable.write_text(tmp_path / "folder", "x")
    assert call("train", "data.path=x") == 7
    assert capfd.readouterr().err == f"lora-ft: {tmp_path / 'folder'} cannot be written: Is a directory\n"
    calls.outcome = lambda cfg: (tmp_path / "absent").read_text()
    with pytest.raises(FileNotFoundError):
        entry.run("train", ["data.path=x"])


def run_out_on_a_cpu(cfg):
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def run_out_on_a_gpu(cfg):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def run_out_in_numpy(cfg):
    import numpy as np

    np.empty(1 << 60, dtype=np.uint8)


@pytest.mark.parametrize(
    "outcome",
    [
        run_out_on_a_cpu,
        pytest.param(run_out_on_a_gpu, marks=pytest.mark.nightly),
        pytest.param(run_out_in_numpy, marks=pytest.mark.nightly),
        pytest.param(_raise(MemoryError()), marks=pytest.mark.nightly),
    ],
)
def test_out_of_memory_is_a_message_with_settings_that_need_less(calls, capfd, outcome):
    calls.outcome = outcome
    assert call("train", "data.path=x") == 7
    err = capfd.readouterr().err
    assert err.startswith("lora-ft: out of memory") and err.count("\n") == 1
    assert err.endswith("lower train.tokens_per_microbatch, or set train.gradient_checkpointing=every_1 or quant=nf4\n")
    assert call(*SWEEP, "data.path=x", "seed=1,2") == 7
    assert re.match(r"job 0 \(.*\): out of memory", capfd.readouterr().err)
    assert call("merge", "adapter_path=a", "model.path=b", "out=c") == 7
    assert "train." not in capfd.readouterr().err


def test_other_errors_of_torch_are_tracebacks(calls):
    calls.outcome = _raise(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        entry.run("train", ["data.path=x"])


def test_config_dir_adds_choices_groups_and_experiments(calls, tmp_path):
    for path, text in {"data/mine.yaml": "path: a", "experiment/small.yaml": "# @package _global_\nadapter: {r: 3}",
                       "extra/slow.yaml": "# @package _global_\noptim: {lr: 1e-5}"}.items():  # fmt: skip
        (tmp_path / "own" / path).parent.mkdir(parents=True)
        (tmp_path / "own" / path).write_text(text)
    assert call("train", "--config-dir", "own", "data=mine", "experiment=small", "+extra=slow") == 0
    cfg, invocation = calls[0]
    assert (cfg.data.path, cfg.adapter.r, cfg.optim.lr) == ("a", 3, 1e-5)
    assert invocation.overrides == ["data=mine", "experiment=small", "+extra=slow"]
    assert call("train", "--config-dir", "absent", "data=mine") == 2


@pytest.mark.parametrize("override", ["data.columns._target_=os.system", "+_target_=x", "hydra/job_logging=default"])
def test_typed_target_or_logging_class_is_a_security_error(calls, capfd, override):
    assert call("train", "data.path=x", override) == 9
    assert "never code to run" in capfd.readouterr().err and not calls


@pytest.mark.parametrize("text", ["model: {_target_: os.system}", "data: {columns: {_target_: os.system}}"])
def test_target_in_a_file_is_a_security_error(calls, tmp_path, text):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "x.yaml").write_text(f"# @package _global_\n{text}\n")
    assert call("train", "data.path=x", "experiment=x", "--config-dir", ".") == 9
    assert not calls


@pytest.mark.parametrize("flag", ["--experimental-rerun=config.pickle", "--no-such-flag"])
def test_unknown_flags_and_the_unpickling_flag_of_hydra_are_refused(calls, flag):
    assert call("train", "data.path=x", flag) == 2


STORED = {
    "model": {"path": "a${b", "dtype": "float32"},
    "quant": {"kind": "nf4"},
    "adapter": {"r": 3},
    "data": {"path": "x,y.jsonl", "system": "be kind", "columns": {"a b.c": "d ${e}"}, "too_long": "drop"},
    "seed": 7,
}


def test_run_takes_the_stored_groups_and_typed_settings_win(calls, tmp_path):
    store_run(tmp_path / "my,run", **STORED)
    assert call("eval", "data.path=other.jsonl", "run=my,run", "quant.double=false") == 0
    cfg = calls[0][0]
    assert cfg.run == str(tmp_path / "my,run") and cfg.seed == 0
    assert cfg.model == config.Model(path="a${b", dtype=config.Dtype.float32)
    assert cfg.quant == config.RecordedQuant(kind=config.QuantKind.nf4, double=False)
    assert cfg.data == config.Data(path="other.jsonl", system="be kind", columns={"a b.c": "d ${e}"},
                                   too_long=config.TooLong.drop)  # fmt: skip
    assert calls[0][1].overrides == ["data.path=other.jsonl", "run=my,run", "quant.double=false"]


def test_quantization_is_unset_unless_given_and_none_is_a_value(calls):
    assert call("eval", "adapter_path=a") == call("eval", "adapter_path=a", "quant=none") == 0
    assert call("chat", "adapter_path=a", "quant.kind=none") == call("train", "data.path=x") == 0
    none = config.QuantKind.none
    assert [cfg.quant.kind for cfg, _ in calls] == [None, none, none, none]


def test_group_chosen_with_run_replaces_the_whole_stored_group(calls, tmp_path):
    store_run(tmp_path / "r", **STORED)
    assert call("chat", "run=r", "data=chat", "data.path=other.jsonl") == 0
    assert calls[0][0].data == config.Data(path="other.jsonl", format=config.Format.messages)
    assert calls[0][0].model.path == "a${b"


def test_run_can_be_evaluated_with_several_settings(calls, tmp_path):
    store_run(tmp_path / "my,run", **STORED)
    assert call("eval", "-m", "run=my,run", "eval.rows=1,2") == 0
    assert [(cfg.run, cfg.eval.rows, cfg.data.system) for cfg, _ in calls] == [
        (str(tmp_path / "my,run"), 1, "be kind"), (str(tmp_path / "my,run"), 2, "be kind")]  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "r is not a run folder: it has no config.yaml"),
        ("[]", "r: config.yaml contains no settings"),
        ("data: {foo: 3}", "r/config.yaml: data.foo is not a setting; nearest: data.format"),
        ("data: {max_length: a}", "r/config.yaml: data.max_length must be an integer, got a"),
        ("[3", "r/config.yaml is not valid YAML in UTF-8: while parsing a flow sequence"),
    ],
)
def test_run_folder_that_cannot_be_read_is_named(calls, capfd, tmp_path, stored, message):
    if stored is not None:
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "config.yaml").write_text(stored)
    assert refused(capfd, "eval", "run=r").startswith(message)


def test_run_gets_an_absolute_folder_and_hydra_writes_nothing(calls, tmp_path):
    assert call("train", "data.path=x", "experiment=demo") == 0
    folder = calls[0][1].folder
    assert folder.is_absolute() and folder.parent == tmp_path / "runs"
    assert not list(tmp_path.iterdir())


@pytest.mark.closes("E03")
def test_fifty_starts_within_a_second_get_fifty_folders(calls):
    assert call("train", "data.path=x") == 0 and call("train", "data.path=x") == 0  # Hydra's resolvers are there now
    assert calls[0][1].folder != calls[1][1].folder
    pattern = yaml.safe_load((config.CONF / "train.yaml").read_text())["hydra"]["run"]["dir"]
    start = time.monotonic()
    assert len({OmegaConf.create({"folder": pattern}).folder for _ in range(50)}) == 50
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("name", ["odd, (na=me) {1} [2] 'q' \"d\"", "größe", "b\\c", "a:b"])
def test_run_folder_may_have_any_name(calls, tmp_path, name):
    assert call("train", "data.path=x", f"hydra.run.dir={name}") == 0
    assert calls[0][1].folder == tmp_path / name
    assert calls[0][1].overrides == ["data.path=x"]


def test_time_stamp_of_hydra_works_in_a_typed_run_folder(calls, tmp_path):
    assert call("train", "data.path=x", "hydra.run.dir=mine, ${now:%Y}") == 0
    assert re.fullmatch(r"mine, \d{4}", calls[0][1].folder.name)


def test_commands_that_make_no_run_write_nothing(calls, tmp_path):
    assert call("chat", "adapter_path=a", "model.path=b") == 0
    assert calls[0][1].folder == tmp_path and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["-m", "train", HERE, "data.path=x", "adapter.r=4,8"],
                                   ["train", "-m", HERE, "data.path=x", "adapter.r=4,8"],
                                   ["sweep", HERE, "data.path=x", "adapter.r=4,8"],
                                   ["train", HERE, "data.path=x", "-m", "adapter.r=4,8"],
                                   ["train", HERE, "data.path=x", "adapter.r=4,8", "--multirun"],
                                   ["train", HERE, "data.path=x", "adapter.r=4,8", "hydra.mode=MULTIRUN"]])  # fmt: skip
def test_multirun_flag_works_anywhere_on_the_line(calls, arguments):
    assert call(*arguments) == 0
    assert [cfg.adapter.r for cfg, _ in calls] == [4, 8]
    folders = [invocation.folder for _, invocation in calls]
    assert [f.name for f in folders] == ["0", "1"] and folders[0].parent == folders[1].parent


def test_sweep_over_texts_and_choices(calls):
    assert call(*SWEEP, "data.path=choice(a,'b, c')", "data=chat,alpaca") == 0
    assert [(cfg.data.path, cfg.data.format.name) for cfg, _ in calls] == [
        ("a", "messages"), ("a", "alpaca"), ("b, c", "messages"), ("b, c", "alpaca")]  # fmt: skip
    assert calls[2][1].overrides == ["data.path=b, c", "data=chat"]


def test_ambiguous_text_in_a_sweep_is_refused_with_both_notations(calls, capfd):
    message = refused(capfd, *SWEEP, "data.path=a,b")
    several, one = re.findall(r"data\.path=choice\([^)]*\)", message)
    assert call(*SWEEP, several) == 0 and call(*SWEEP, one) == 0
    assert [cfg.data.path for cfg, _ in calls] == ["a", "b", "a,b"]


@pytest.mark.parametrize("kind", errors.LoraFtError.__subclasses__())
def test_error_of_a_command_is_one_message_and_its_exit_code(calls, capfd, kind):
    calls.outcome = _raise(kind("rows.jsonl:3: what is wrong"))
    assert call("train", "data.path=x") == kind.exit_code
    assert capfd.readouterr().err == "lora-ft: rows.jsonl:3: what is wrong\n"


def test_every_error_has_an_exit_code_of_its_own():
    kinds = errors.LoraFtError.__subclasses__()
    assert len({kind.exit_code for kind in kinds}) == len(kinds) == 7


def test_interrupt_exits_with_130(calls):
    calls.outcome = _raise(KeyboardInterrupt())
    assert call("train", "data.path=x") == 130


def test_bug_keeps_its_traceback(calls):
    calls.outcome = _raise(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        entry.run("train", ["data.path=x"])


@pytest.mark.closes("E01")
@pytest.mark.parametrize(("failing", "code"), [([], 0), ([4], 3), ([4, 8], 4)])
def test_sweep_continues_after_a_failed_job_and_exits_with_its_code(calls, capfd, failing, code):
    def outcome(cfg):
        if cfg.adapter.r in failing:
            raise errors.DataError("no rows")
        return 1.0

    calls.outcome = outcome
    assert call(*SWEEP, "data.path=x", "adapter.r=4,8") == code
    err = capfd.readouterr().err.splitlines()
    assert err == [f"job {[4, 8].index(r)} (data.path=x adapter.r={r}): no rows" for r in failing]
    assert len(calls) == 2


def test_bug_in_one_job_of_a_sweep_prints_a_traceback_and_the_others_run(calls, capfd):
    calls.outcome = lambda cfg: 1 / (cfg.adapter.r - 4)
    assert call(*SWEEP, "data.path=x", "adapter.r=4,8") == 3
    err = capfd.readouterr().err
    assert "ZeroDivisionError" in err and "Error executing job" not in err and len(calls) == 2


@pytest.mark.parametrize("override", ["+hydra.job.env_set.HF_TOKEN=hush", "hydra.job.env_copy=[MY_API_KEY]"])
def test_secrets_are_kept_out_of_the_files_of_a_sweep(calls, capfd, tmp_path, monkeypatch, override):
    monkeypatch.setenv("MY_API_KEY", "hush")
    assert call(*SWEEP, "data.path=x", "adapter.r=4,8", override) == 9
    assert "export it" in capfd.readouterr().err
    assert not any("hush" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(("command", "near"), [("tran", "train"), ("evaluate", "eval"), ("mrge", "merge")])
def test_unknown_command_names_the_nearest(calls, capfd, command, near):
    assert f"{command} is not a command; nearest: {near}" in refused(capfd, command, "data.path=x")
