"""The command plan: terms of the peak, verdict, page, pictures, sweeps, and the same from Python."""

import dataclasses
import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from finished import call
from rich.console import Console
from tiny import FAMILIES, tiny_folder, tiny_model
from transformers import LlamaConfig

import lora_ft
from lora_ft import config
from lora_ft.cli import entry
from lora_ft.errors import ConfigError
from lora_ft.memory import plan_bars, plan_page, planning, prediction, workload
from lora_ft.memory.machine import resolve
from lora_ft.memory.planning import Known, Plan
from lora_ft.memory.prediction import predict
from lora_ft.models.described import packaged

MIB, GIB = 2**20, 2**30
CARD = config.Hardware(memory="24GiB")
ROWS = [{"prompt": f"{n}+{n}?" * (n % 5 + 1), "completion": f"{n + n}"} for n in range(30)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json alone for each family, and with a tokenizer for llama."""
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        tiny_model(family).config.save_pretrained(folder / family)
    tiny_folder(folder / "whole", "llama")
    return folder


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def composed(base: Path, *overrides: str) -> config.PlanRun:
    words = ["model=local", f"model.path={base}", "data.max_length=64", "train.tokens_per_step=128", *overrides]
    return lora_ft.compose("plan", words)


def planned(base: Path, *overrides: str, hardware: config.Hardware = CARD, known: Known | None = None) -> Plan:
    return planning.make(composed(base, *overrides), hardware, advice=False, known=known)


def run(base: Path, *overrides: str) -> int:
    """Run the command as the command line does; return its exit code."""
    words = ["model=local", f"model.path={base}", "data.max_length=64", "train.tokens_per_step=128", *overrides]
    with pytest.raises(SystemExit) as ended:
        entry.run("plan", words)
    return int(ended.value.code or 0)


def shown(plan: Plan, width: int = plan_page.WIDTH) -> str:
    console = Console(width=width)
    with console.capture() as text:
        console.print(plan_page.page(plan))
    return text.get()


# Terms and verdict.


@pytest.mark.parametrize(("family", "quant"), [*((family, "none") for family in FAMILIES), ("llama", "nf4")])
def test_terms_are_the_peak_and_all_on_the_page(family: str, quant: str, bases: Path) -> None:
    plan = planned(bases / family, f"quant={quant}")
    found = plan.prediction
    traced = [term for term in found.terms if term.source == "traced"]
    assert sum(term.bytes for term in traced) == found.trace.peak_bytes
    assert sum(term.bytes for term in found.terms) == found.peak_bytes > found.least_bytes >= found.trace.peak_bytes
    assert found.left_bytes == (found.machine.budget_bytes or 0) - found.peak_bytes
    assert {f"base weights, {kind}" for kind in found.trace.base_bytes} <= {term.name for term in traced}
    page = shown(plan)
    assert max(map(len, page.splitlines())) <= 100 and "\x1b" not in page
    for term in found.terms:
        assert re.search(rf"^  {term.name} +(<?[\d.]+) +(<?\d+%)  {term.source}", page, re.MULTILINE), term.name
    assert plan_page.verdict(found) in page and f"in the {found.phase}" in page


def test_more_memory_never_fits_less_and_recomputes_no_more(bases: Path) -> None:
    known, plans = Known(), []
    least = planned(bases / "llama", "train.gradient_checkpointing=every_1", known=known).prediction
    most = planned(bases / "llama", "train.gradient_checkpointing=off", known=known).prediction
    assert least.peak_bytes < most.peak_bytes
    # Machines differ in their context, which grows with the memory, so a budget is set instead.
    for budget in (least.peak_bytes - 1, least.peak_bytes, most.peak_bytes - 1, most.peak_bytes, 2 * most.peak_bytes):
        machine = dataclasses.replace(least.machine, memory_bytes=budget, used_bytes=0)
        cfg, base = composed(bases / "llama"), known.bases[next(iter(known.bases))]
        plans.append(planning.make_for(cfg, base, None, machine, False, known).prediction)
    assert [plan.fits for plan in plans] == [False, True, True, True, True]
    settings = [plan.gradient_checkpointing for plan in plans]
    assert settings[:2] == ["every_1"] * 2 and settings[2] in ("every_1", "every_2") and settings[3:] == ["off"] * 2
    assert [plan.left_bytes for plan in plans][1] == 0


def test_loading_the_base_counts_if_it_needs_more_than_a_step(tmp_path: Path) -> None:
    """A large layer is there twice while it is quantized to 8 bits."""
    sizes = {"hidden_size": 1024, "intermediate_size": 65536, "num_hidden_layers": 1, "vocab_size": 512}
    LlamaConfig(**sizes, num_attention_heads=8, dtype="bfloat16").save_pretrained(tmp_path)
    known, short = Known(), ("data.max_length=8", "train.tokens_per_step=8", "adapter.r=1", "quant=int8")
    first = planned(tmp_path, *short, known=known)
    found = first.prediction
    assert found.loading_bytes == first.storage.loading_device_bytes + found.machine.context_bytes
    assert found.needed_bytes == found.loading_bytes > found.peak_bytes
    cfg, base = composed(tmp_path, *short), next(iter(known.bases.values()))
    for budget, fits in ((found.loading_bytes - 1, False), (found.loading_bytes, True)):
        machine = dataclasses.replace(found.machine, memory_bytes=budget, used_bytes=0)
        made = planning.make_for(cfg, base, None, machine, None, known)
        assert made.prediction.fits is fits and made.to_dict()["fits"] is fits
        assert "GiB while the base is loaded" in shown(made)
        # NF4 loads in less; neither shorter rows nor a smaller adapter do.
        assert [each.changes for each in made.advice] == ([] if fits else [["quant.kind=nf4"]])


def test_unknown_memory_has_no_verdict_and_recomputes_nothing(bases: Path) -> None:
    known = Known()
    machine = dataclasses.replace(planned(bases / "llama", known=known).prediction.machine, memory_bytes=None)
    plan = planning.make_for(composed(bases / "llama"), next(iter(known.bases.values())), None, machine, None, known)
    assert plan.prediction.fits is None and plan.prediction.left_bytes is None and plan.advice == ()
    assert plan.prediction.gradient_checkpointing == "off"
    assert "is not known" in shown(plan)


def test_higher_ranks_and_added_tokens_need_more_bytes(bases: Path) -> None:
    def size(*overrides: str, term: str = "adapter") -> int:
        terms = {each.name: each.bytes for each in planned(bases / "llama", *overrides).prediction.terms}
        return terms[term]

    ranks = [size(f"adapter.r={r}") for r in (2, 8, 32)]
    assert ranks == sorted(set(ranks))
    assert size("model.added_tokens=['<a>','<b>']") > size("adapter.r=16")


def test_float16_is_planned_for_a_gpu_and_refused_for_a_cpu(bases: Path) -> None:
    turing = config.Hardware(memory="16GiB", capability="7.5")
    half, auto = (planned(bases / "llama", f"model.dtype={name}", hardware=turing) for name in ("float16", "auto"))
    assert half.prediction == auto.prediction and half.prediction.fits
    with pytest.raises(ConfigError, match="float16 is not for CPUs"):
        planned(bases / "llama", "model.dtype=float16", hardware=config.Hardware(kind="cpu", memory="16GiB"))


def test_optimizer_on_the_cpu_is_not_on_the_device(bases: Path) -> None:
    names = {term.name for term in planned(bases / "llama", "optim.offload=true").prediction.terms}
    assert "optimizer" not in names and "adapter" in names


def test_8b_in_nf4_fits_on_12_gib_but_not_on_8() -> None:
    cfg, traces = lora_ft.compose("plan", ["quant=nf4", "data.max_length=4096"]), {}
    cfg.train.gradient_checkpointing = "every_1"  # the least memory, which auto tries as well
    work, base = workload.of_settings(cfg), packaged("meta-llama/Llama-3.1-8B-Instruct")
    fits = {
        memory: predict(cfg, base, work, resolve(config.Hardware(memory=memory), "auto"), traces).fits
        for memory in ("8GiB", "12GiB", "16GiB", "24GiB")
    }
    assert fits == {"8GiB": False, "12GiB": True, "16GiB": True, "24GiB": True}
    assert len(traces) == 1


def test_model_that_cannot_be_traced_is_one_clear_error(
    bases: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no meta function")

    monkeypatch.setattr(prediction, "trace_step", fail)
    assert run(bases / "llama", "hardware.memory=24GiB") == 2
    err = capfd.readouterr().err
    assert err.startswith("lora-ft: the memory of llama cannot be predicted") and "no meta function" in err
    assert "Traceback" not in err


# The work of the run.


def test_rows_give_their_own_lengths_and_need_no_assumption(bases: Path) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base, words = bases / "whole" / "llama", ("data.path=rows.jsonl", "data.eval_fraction=0.2", "train.epochs=2")
    plan = planned(base, *words, "train.tokens_per_step=100")
    work = plan.prediction.workload
    assert work.assumed == "" and work.epochs == 2 and max(work.largest) < 64 and sum(work.largest) <= 100
    assert work.steps and work.tokens and work.tokens / work.steps <= 100
    assert f"{work.steps:,} steps, {work.tokens:,} tokens, 2 epochs" in shown(plan)
    cut = planned(base, *words, "train.tokens_per_step=100", "train.tokens_per_microbatch=50").prediction.workload
    assert len(cut.typical) > 1 and max(map(sum, cut.typical)) <= sum(cut.largest) <= 50
    assert (cut.steps, cut.tokens) == (work.steps, work.tokens)


@pytest.mark.parametrize(
    ("train", "largest", "typical"),
    [
        ({}, [48, 48, 4], [[48, 48, 4]]),
        ({"tokens_per_microbatch": 60}, [48, 12], [[48, 12], [40]]),
        ({"tokens_per_microbatch": 30}, [30], [[30], [30], [30], [10]]),
        ({"packing": False}, [48], [[48], [48], [4]]),
        ({"tokens_per_step": 20}, [48], [[48]]),
    ],
)
def test_work_without_rows_is_full_micro_batches_of_the_longest_rows(
    train: dict[str, object], largest: list[int], typical: list[list[int]]
) -> None:
    cfg = config.TrainRun(data=config.Data(max_length=48), train=config.Train(**{"tokens_per_step": 100, **train}))
    work = workload.of_settings(cfg, context=512)
    assert (work.largest, work.typical) == (largest, typical)
    assert work.steps is None and "rows of" in work.assumed
    assert workload.of_settings(cfg, context=16).longest == 16
    known = workload.of_settings(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, max_steps=7)))
    assert (known.steps, known.tokens) == (7, 7 * known.typical_tokens)


def test_automatic_micro_batch_is_the_whole_step_where_it_fits_and_smaller_where_not(bases: Path) -> None:
    words, known = ("train.tokens_per_step=2048", "train.tokens_per_microbatch=auto"), Known()
    whole = planned(bases / "llama", *words, known=known)
    assert whole.cfg.train.tokens_per_microbatch == 2048
    peak = whole.prediction.peak_bytes
    machine = dataclasses.replace(whole.prediction.machine, memory_bytes=peak - 2 * MIB, used_bytes=0)
    cfg, base = composed(bases / "llama", *words), next(iter(known.bases.values()))
    plan = planning.make_for(cfg, base, None, machine, False, known)
    assert plan.prediction.fits
    assert plan.cfg.train.tokens_per_microbatch < 2048 or plan.cfg.train.gradient_checkpointing != "off"


# The command.


def test_exit_code_is_7_with_advice_if_the_run_does_not_fit(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(bases / "llama", "hardware.memory=24GiB") == 0
    out = capfd.readouterr().out
    assert "\nfits: " in out and "makes it fit" not in out
    assert run(bases / "llama", "hardware.memory=256MiB", "train.gradient_checkpointing=off") == 7
    out, err = capfd.readouterr()
    assert "\ndoes not fit: " in out and err.startswith("lora-ft: does not fit: ")
    assert re.search(r"it fits on hardware=\w+", out) or "each of these makes it fit" in out


def test_fit_lists_changes_also_for_a_run_that_fits(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(bases / "llama", "hardware.memory=24GiB", "fit=true") == 0
    out = capfd.readouterr().out
    assert "each of these saves memory" in out and re.search(r"^ +1\. \w+", out, re.MULTILINE)


def test_this_machine_is_the_default_and_no_file_is_written(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "model=local", f"model.path={bases / 'gpt2'}", "data.max_length=64") == 0
    out = capfd.readouterr().out
    assert ", on cpu" in out and "measured: Python and the libraries" in out and "tokens/s" in out
    assert list(Path().iterdir()) == []


# The picture.


def test_bars_stack_the_terms_in_order_and_reach_the_peak(bases: Path) -> None:
    found = planned(bases / "llama").prediction
    series = plan_bars.stacked(found)
    assert list(series) == [name for name in plan_bars.LOOKS if name in series]
    assert max(map(sum, zip(*series.values(), strict=True))) == found.peak_bytes
    for width in (60, 100):
        lines = [line.plain for line in plan_bars.bars(found, width)]
        assert max(map(len, lines)) <= width
        assert f"{found.peak_bytes / GIB:.3g}" in lines[0] and lines[0].strip()[-1] != "|"
        legend = " ".join(lines[-3:])
        assert all(f"{plan_bars.look(name)[0]} {name}" in legend for name in series)
        assert all(phase in " ".join(lines) for phase in set(found.trace.timeline.phases))


def test_picture_files_are_valid_and_never_replaced(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = planned(bases / "llama")
    for name in ("plan.png", "plan.html"):
        assert run(bases / "llama", "hardware.memory=24GiB", f"out={name}") == 0
        assert name in capfd.readouterr().out
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = Path("plan.html").read_text("utf-8")
    svg = ET.fromstring(re.findall(r"<svg[^>]*chart.*?</svg>", page, re.DOTALL)[0])
    words = {element.text for element in svg.iter("text")}
    assert {"forward", "backward", "memory, GiB"} <= words
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= set(re.findall(r"--(\w+):", page))  # colours of the chart
    assert all(f"<td>{term.name}</td>" in page for term in plan.prediction.terms)
    assert "http" not in re.sub(r"http-equiv", "", page).replace("http://www.w3.org", "")
    assert run(bases / "llama", "hardware.memory=24GiB", "out=plan.png") == 2
    assert "plan.png exists" in capfd.readouterr().err
    assert run(bases / "llama", "out=plan.pdf") == 2
    assert "out=plan.pdf must end with .png or .html" in capfd.readouterr().err


# Sweeps.


def test_jobs_of_a_sweep_are_planned_and_equal_traces_shared(
    bases: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    traced = []
    trace_step = prediction.trace_step
    monkeypatch.setattr(prediction, "trace_step", lambda *given: traced.append(given) or trace_step(*given))
    words = ("hardware.memory=24GiB", "adapter.r=2,4,8", "optim.lr=1e-4,1e-3", "seed=1,2", "train.max_steps=5")
    assert run(bases / "llama", *words) == 0
    out = capfd.readouterr().out
    assert len(traced) == 3 * 2, out  # of three ranks, models of two and of three layers
    rows = re.findall(r"^ *(\d+)  adapter\.r=(\d) optim\.lr=([\d.]+) seed=(\d) +([\d.]+)  fits", out, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(12))
    assert len({row[1:4] for row in rows}) == 12
    assert re.search(r"^12 jobs on a GPU of 24GiB: the largest fits: ", out, re.MULTILINE) and "on the disk" in out
    assert list(Path().iterdir()) == []


def test_sweep_with_a_bad_job_names_it(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(bases / "llama", "adapter.r=4,0") == 2
    assert re.search(r"job 1 \(.*adapter\.r=0\): adapter\.r must be at least 1", capfd.readouterr().err)
    assert run(bases / "llama", "adapter.r=4,8", "out=plan.png") == 2
    assert "for the plan of one run" in capfd.readouterr().err


def test_sweep_with_a_job_that_does_not_fit_has_exit_code_7(bases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("hardware.memory=24GiB,200MiB", "--multirun")
    assert run(bases / "llama", *words) == 7
    out, err = capfd.readouterr()
    assert "does not fit" in out and "1 of 2 jobs do not fit: 1" in err


# Python.


def test_plan_from_python_is_the_command_and_becomes_json(bases: Path) -> None:
    base = bases / "llama"
    given = lora_ft.compose("train", ["model=local", f"model.path={base}", "data.max_length=64"])
    before = dataclasses.replace(given)
    plan = lora_ft.plan(given, hardware="rtx_4090")
    assert given == before
    assert plan.prediction.machine.name == "NVIDIA GeForce RTX 4090" and plan.prediction.fits
    plain = plan.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["peak_bytes"] == sum(term["bytes"] for term in plain["terms"]) == plan.prediction.peak_bytes
    assert lora_ft.plan(given, config.Hardware(memory="24GiB")).prediction.machine.name == "a GPU of 24GiB"
    with pytest.raises(ConfigError, match=r"choose one of .*rtx_4090"):
        lora_ft.plan(given, hardware="rtx_4091")
    with pytest.raises(ConfigError, match="a config of train, check or plan, got EvalRun"):
        lora_ft.plan(config.EvalRun())
