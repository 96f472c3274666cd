"""The benchmark gives all trainers the same rows, compares within rounds and disqualifies runs that do not learn."""

import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_folder, tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
import case  # noqa: E402
import ceiling  # noqa: E402
import measure  # noqa: E402
import ranks  # noqa: E402
import summary  # noqa: E402
from peers import protocol  # noqa: E402

from lora_ft import config  # noqa: E402
from lora_ft.adapters import attach  # noqa: E402
from lora_ft.data.sampler import epoch_order, steps_of_epoch  # noqa: E402


def record(trainer: str, number: int = 0, **changes: object) -> summary.Record:
    """Return a valid run of two steps of 100 tokens that lowered the eval loss by 0.5."""
    valid = {
        "trainer": trainer, "round": number, "error": "", "tokens": [100, 100], "seconds": [9.0, 1.0],
        "losses": [4.0, 3.8], "grad_norms": [1.0, 0.9], "tokens_per_second": 100.0, "peak_tree_bytes": 3e9,
        "first_step_seconds": 5.0, "base_eval_loss": 4.0, "eval_loss": 3.5,
    }  # fmt: skip
    return valid | changes


@pytest.fixture(scope="module")
def small_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case with a tiny model instead of SmolLM2 and rows of the real corpus."""
    cache = tmp_path_factory.mktemp("cache")
    tiny_folder(cache, "llama").rename(cache / "SmolLM2-135M-Instruct")
    return case.build("mixed", "answers", 3, cache)


def test_drawn_lengths_are_lognormal_or_equal() -> None:
    drawn = np.array(case.drawn_lengths("mixed", 400, random.Random(1)))
    assert 170 <= drawn.mean() <= 195
    assert np.percentile(drawn, 5) == pytest.approx(case.MEDIAN_TOKENS * math.exp(-1.645 * case.SIGMA), rel=0.02)
    assert np.percentile(drawn, 95) == pytest.approx(case.MEDIAN_TOKENS * math.exp(1.645 * case.SIGMA), rel=0.02)
    assert set(case.drawn_lengths("equal", 9, random.Random(1))) == {case.EQUAL_TOKENS}


def test_case_is_reproducible_and_has_the_drawn_lengths(small_case: Path, tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(small_case.parent / "SmolLM2-135M-Instruct")
    again = case.build("mixed", "answers", 3, tmp_path)
    for name in ("train.jsonl", "train_ids.jsonl", "eval_ids.jsonl"):
        assert (again / name).read_bytes() == (small_case / name).read_bytes()
    lengths = sorted(len(row["input_ids"]) for row in protocol.token_rows(small_case, "train"))
    assert lengths == sorted(case.drawn_lengths("mixed", 3 * case.ROWS_PER_STEP, random.Random(5)))


def test_ids_follow_the_chat_template_and_labels_cover_only_answers(small_case: Path) -> None:
    tokenizer = tiny_tokenizer()
    chats = [json.loads(line)["messages"] for line in (small_case / "train.jsonl").read_text("utf-8").splitlines()]
    for messages, row in zip(chats, protocol.token_rows(small_case, "train"), strict=True):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert row["input_ids"] == tokenizer(text.rstrip("\n"))["input_ids"]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert learned == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_eval_questions_are_not_in_the_training_rows(small_case: Path) -> None:
    def questions(part: str) -> set[str]:
        lines = (small_case / f"{part}.jsonl").read_text("utf-8").splitlines()
        turns = [message for line in lines for message in json.loads(line)["messages"]]
        return {turn["content"].casefold().strip(" ?.!") for turn in turns if turn["role"] == "user"}

    assert len(questions("eval")) > case.EVAL_ROWS
    assert questions("train").isdisjoint(questions("eval"))


def test_case_is_rebuilt_if_its_code_changed(small_case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = small_case / "leftover"
    leftover.touch()
    assert case.build("mixed", "answers", 3, small_case.parent) == small_case
    assert leftover.exists()
    rows = (small_case / "train.jsonl").read_bytes()
    monkeypatch.setattr(case, "sources_digest", lambda: "of other code")
    case.build("mixed", "answers", 3, small_case.parent)
    assert not leftover.exists()
    assert (small_case / "train.jsonl").read_bytes() == rows


def test_steps_by_tokens_have_the_same_number_and_rows_as_steps_by_rows() -> None:
    lengths = case.drawn_lengths("mixed", 40, random.Random(2))
    for seed in range(4):
        size = case.smallest_step(lengths, 5, seed)
        steps = steps_of_epoch(lengths, epoch_order(40, seed, 0), size)
        assert len(steps) == 5
        assert sorted(np.concatenate(steps).tolist()) == list(range(40))
        assert size < 1.25 * sum(lengths) / 5


def test_throughput_counts_all_rows_and_ratios_are_per_round() -> None:
    for order in ([0, 1, 2], [2, 0, 1]):  # the order of steps does not matter
        tokens, seconds = ([values[i] for i in order] for values in ([100, 100, 300], [2.0, 1.0, 3.0]))
        assert summary.tokens_per_second(tokens, seconds) == pytest.approx(500 / 6)
    runs = [
        record(trainer, number, tokens_per_second=speed)
        for trainer, speeds in (("ours:fp32", [100.0, 20.0, 90.0]), ("peer:a", [50.0, 10.0, 30.0]))
        for number, speed in enumerate(speeds)
    ]
    runs[3]["error"] = "ended with 1"  # the peer has no round 0, so it is not compared
    assert summary.ratios(runs, "ours:fp32", "peer:a", "tokens_per_second") == [2.0, 3.0]
    assert summary.spread([3.0, 1.0, 2.0]) == summary.Spread(2.0, 1.0, 3.0)
    assert summary.Spread(2.0, 1.0, 3.0).shown(1) == "2.0 (1.0-3.0)"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"grad_norms": [1.0, 0.0]}, "gradient norms"),
        ({"grad_norms": [1.0, math.nan]}, "gradient norms"),
        ({"eval_loss": 4.0}, "learned nothing"),
        ({"eval_loss": 3.65}, "learned less"),
        ({"eval_loss": 2.0}, "learned more"),
        ({"eval_loss": math.nan}, "not finite"),
        ({"tokens": [100, 90]}, "2 steps of 190 tokens, not 2 of 200"),
        ({"error": "ended with 1"}, "ended with 1"),
    ],
)
def test_trainer_that_does_not_learn_is_disqualified(changes: dict[str, object], reason: str) -> None:
    runs = [
        record("ours:fp32"),
        record("one:a", eval_loss=3.53),
        record("two:b", tokens_per_second=9e9, **changes),
    ]
    verdicts = summary.verdicts(runs, 200, 2)
    assert reason in verdicts["two:b"]
    assert verdicts["ours:fp32"] == verdicts["one:a"] == ""
    last = summary.table(runs, verdicts).splitlines()[-1]
    assert "two:b" in last and "OUT" in last


@pytest.mark.parametrize(
    ("gains", "reason"),
    [((-0.3, 0.0, 0.5), "learned nothing"), ((0.5, 0.0, 0.5), "learned nothing"), ((0.5, 0.01, 0.5), "learned less"),
     ((0.1, 0.5, 0.9), "learned less"), ((0.5, 0.5, 0.9), "learned more")],
)  # fmt: skip
def test_every_round_is_checked_with_the_tolerance_of_the_other_trainers(gains: tuple[float, ...], reason: str) -> None:
    usual = [record(t, n) for t in ("ours:fp32", "one:a", "two:a") for n in range(3)]
    bad = [record("bad:a", n, eval_loss=4.0 - gain) for n, gain in enumerate(gains)]
    verdicts = summary.verdicts([*usual, *bad], 200, 2)
    assert reason in verdicts.pop("bad:a")
    assert set(verdicts.values()) == {""}


def test_typical_result_counts_each_project_once() -> None:
    ours = [record(f"ours:{n}", eval_loss=3.9) for n in range(5)]
    verdicts = summary.verdicts([*ours, record("one:a"), record("two:a"), record("three:a")], 200, 2)
    assert verdicts["one:a"] == verdicts["two:a"] == verdicts["three:a"] == ""
    assert all("learned less" in verdicts[f"ours:{n}"] for n in range(5))


def test_tolerance_grows_with_the_spread_over_seeds() -> None:
    steady = [record(t, n) for t in ("a", "b", "d") for n in range(3)]
    steady += [record("c", n, eval_loss=3.6) for n in range(3)]
    assert "learned less" in summary.verdicts(steady, 200, 2)["c"]
    spread = [r | {"eval_loss": r["eval_loss"] + 0.1 * (r["round"] - 1)} for r in steady]
    assert summary.verdicts(spread, 200, 2)["c"] == ""


def test_trainer_with_failed_preparation_is_disqualified(small_case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def one_run(trainer: str, _: Path, number: int, *rest: object) -> summary.Record:
        ran.append(trainer)
        return record(trainer, number, error="ended with 1: why" if trainer.endswith(":prepare") else "")

    monkeypatch.setattr(bench, "one_run", one_run)
    monkeypatch.setattr(bench, "evaluate", lambda *_: None)
    monkeypatch.setattr(bench, "gemm_rate", lambda *_: 1e11)
    arguments = bench.parsed(["--rounds", "2", "--steps", "3"])
    trainers = ["ours:fp32", "litgpt_lora:default", "litgpt_lora:batch"]
    pythons = dict.fromkeys(bench.PEERS, Path("python"))
    result = bench.run_case("mixed-answers", small_case, trainers, arguments, pythons)
    assert ran == ["litgpt_lora:prepare", "ours:fp32", "ours:fp32"]
    assert [run["trainer"] for run in result["runs"]] == trainers * 2
    for trainer in trainers[1:]:
        assert result["verdicts"][trainer] == "prepare: ended with 1: why"


def test_results_name_every_trainer_and_replace_only_the_marked_section() -> None:
    runs = [record("ours:fp32"), record("peer:a", tokens_per_second=40.0), record("peer:b", error="ended with 1")]
    result = {
        "name": "mixed-all", "rows": "some", "steps": 2, "tokens": 200, "flop": {"linears": 200 * 10**9},
        "gemm_flop_per_second": [2e11, 2e11], "verdicts": summary.verdicts(runs, 200, 2), "runs": runs,
    }  # fmt: skip
    text = summary.document({"date": "d", "machine": "m", "threads": 2, "rounds": 1, "cases": [result]})
    assert "ceiling 200 tokens/s" in text and "Ours reaches 50% of it" in text
    assert "| peer:a | 40 | 2.50 | 3.0 | 5.0 | 3.500 | learned |" in text
    assert "OUT: ended with 1" in text
    readme = f"before {summary.BEGIN} old {summary.END} after"
    written = summary.written_between(readme, text)
    assert text in written and "old" not in written
    assert written.startswith("before ") and written.endswith(" after")
    assert summary.written_between(written, text) == written
    with pytest.raises(ValueError, match="must hold"):
        summary.written_between("no markers", text)


def test_flop_count_matches_torch() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    adapted = attach.attach(model, config.Adapter(r=4), "default", 0, [])
    length = 24
    counter = FlopCounterMode(display=False)
    with counter:
        adapted(input_ids=torch.arange(length)[None], use_cache=False).logits.square().sum().backward()
    of_operator: dict[str, int] = {}
    for operator, count in counter.get_flop_counts()["Global"].items():
        of_operator[str(operator)] = of_operator.get(str(operator), 0) + count
    counted = ceiling.flop(model.config.to_dict(), [length], length, 4)
    # Eager attention computes the full square; causal attention needs only the lower half with its diagonal.
    assert of_operator.pop("aten.bmm") == counted.attention * 2 * length // (length + 1)
    assert sum(of_operator.values()) == counted.linears + counted.head + counted.lora


def test_peak_memory_includes_child_processes(tmp_path: Path) -> None:
    child = "import sys, time; held = b'1' * int(sys.argv[1]); time.sleep(1.2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, '200000000'])"
    process = measure.run([sys.executable, "-c", parent], {}, tmp_path / "log")
    assert process.returncode == 0
    assert 200e6 < process.peak_tree_bytes < 300e6


def test_outcome_is_parsed_from_the_last_line() -> None:
    watch = protocol.Stopwatch()
    for tokens in (5, 7):
        watch.forward(tokens)
        watch.forward(tokens)
        watch.step()
        watch.learned(2.0, 1.0)
    outcome = watch.outcome(Path("adapter"))
    assert outcome.tokens == [10, 14] and len(outcome.seconds) == 2 and outcome.first_forward > 0
    line = json.dumps(vars(outcome))
    assert protocol.parse(f"noise\n{line}\n") == outcome
    for output in ("", "noise", f"{line}\nnoise"):
        with pytest.raises(ValueError):
            protocol.parse(output)


def test_unknown_trainers_and_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.parsed(["--trainers", "ours:fp32,trl_sft"]).trainers == [
        "ours:fp32",
        "trl_sft:default",
        "trl_sft:best",
        "trl_sft:padding_free",
    ]
    for arguments, name in ((["--trainers", "ours:fp64"], "ours:fp64"), (["--cases", "long-all"], "long-all")):
        with pytest.raises(SystemExit):
            bench.parsed(arguments)
        assert name in capsys.readouterr().err


def test_page_about_clusters_has_the_bytes_and_times_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    ranks.on_paper()
    page = (BENCHMARKS.parent / "docs" / "cluster.md").read_text("utf-8").replace(",", "")
    for line in capsys.readouterr().out.splitlines():
        name, *figures = re.fullmatch(
            r"(.+?) +products +(\d+) ms, ddp ([\d.]+) GB +(\d+) ms, shard ([\d.]+) GB +(\d+) ms", line
        ).groups()
        products, *moved = figures
        row = "| {} | {} ms | {} GB {} ms | {} GB {} ms |".format(name.replace(",", ""), products, *moved)
        assert row in page
