"""Training on several sources: rows, proportions, losses of each source, resume to the same bytes, sweeps, eval."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import call
from hypothesis import given
from hypothesis import strategies as st
from sweep_folders import job, sweep_folder
from test_resume import curve, weights
from tiny import tiny_folder, tiny_tokenizer

import lora_ft
from lora_ft import config, mixing, runs
from lora_ft.data import cache, dataset, split
from lora_ft.data.examples import NO_GROUP, Examples
from lora_ft.data.joined import Chained, joined
from lora_ft.data.mixed_dataset import combined, mix_of, prepare, prepare_each, read_sources
from lora_ft.data.rows import Example
from lora_ft.errors import ConfigError, DataError
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.publishing import training_summary
from lora_ft.sweeps import leaderboard, report, results
from lora_ft.sweeps.jobs import Job, grouped
from lora_ft.training import checkpoint
from lora_ft.training.state import choose_eval, plan_steps

CHATS = [(f"What is {n} plus {n}?", f"It is {n + n}.") for n in range(24)]
TEXTS = [f"The number {n} is followed by the number {n + 1}, and nobody has ever seen the last." for n in range(30)]
QUICK = ("train.tokens_per_step=150", "train.tokens_per_microbatch=80", "train.eval_every_steps=3", "train.samples=1",
         "adapter.r=2", "adapter.lora_dropout=0.1", "adapter.target_modules=[q_proj,v_proj]", "optim.lr=0.01",
         "train.save_every_steps=2", "data.eval_fraction=0.2")  # fmt: skip


def write_chats(path: Path, pairs: Iterable[tuple[str, str]] = CHATS) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return path


def write_texts(path: Path, texts: Iterable[str] = TEXTS) -> Path:
    path.write_text("\n\n".join(texts) + "\n")
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two files of rows and `whole`, an uninterrupted run; no test changes it."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny_folder(folder, "llama")
    write_chats(folder / "chat.jsonl")
    write_texts(folder / "wiki.txt")
    assert call("train", *inputs(folder), "train.epochs=2", f"hydra.run.dir={folder / 'whole'}") == 0
    return folder


def inputs(folder: Path) -> tuple[str, ...]:
    return ("model=local", f"model.path={folder / 'llama'}", f"data.sources.chat.path={folder / 'chat.jsonl'}",
            f"data.sources.wiki.path={folder / 'wiki.txt'}", "data.mix.chat=0.6", "data.mix.wiki=0.4",
            *QUICK)  # fmt: skip


def data_of(folder: Path, **sources: dict[str, Any]) -> config.Data:
    """Return settings of two sources, chat and wiki, with these settings over those of the files."""
    files = {"chat": {"path": str(folder / "chat.jsonl")}, "wiki": {"path": str(folder / "wiki.txt")}}
    return config.Data(
        sources={name: file | sources.get(name, {}) for name, file in files.items()}, mix={"chat": 0.6, "wiki": 0.4},
        eval_fraction=0.2,
    )  # fmt: skip


# --- rows ---


def test_each_part_has_the_examples_of_its_source_alone(prepared: Path) -> None:
    data = data_of(prepared, wiki={"max_rows": 9}, chat={"train_on": "all", "system": "Be short."})
    whole = prepare(data, tiny_tokenizer())
    for name, source in mixing.sources(data).items():
        alone, part = dataset.prepare(source, tiny_tokenizer()), whole.parts[name]
        for side in ("train", "eval"):
            chosen = getattr(part, side)
            ours = list(getattr(whole, side)[chosen.start : chosen.stop])
            theirs = list(getattr(alone, side))
            assert [e.ids.tolist() for e in ours] == [e.ids.tolist() for e in theirs]
            assert [e.supervised.tolist() for e in ours] == [e.supervised.tolist() for e in theirs]
            assert [e.source for e in ours] == [e.source for e in theirs]
        assert whole.report.sources[name] == alone.report
    chat, wiki = whole.parts["chat"], whole.parts["wiki"]
    assert (chat.train.stop, wiki.train.stop) == (wiki.train.start, len(whole.train))
    assert (whole.report.rows, whole.report.format) == (33, "prompt_completion and text")
    assert whole.report.train_tokens == int(whole.train.lengths.sum())
    # A row of text has no prompt; each prompt is that of a chat, by its own row.
    prompts = [(prompt.source, prompt.prompt) for prompt in whole.eval_prompts]
    assert len(prompts) == len(chat.eval) > 0
    assert all(CHATS[int(source.rpartition(":")[2]) - 1][0] == prompt for source, prompt in prompts)


def test_groups_of_joined_examples_have_different_numbers() -> None:
    def some(*groups: int | None) -> Examples:
        ids = np.arange(3, dtype=np.int32)
        return Examples.of([Example(ids, ids > 0, f"f:{n}", n, group=group) for n, group in enumerate(groups)])

    both = joined([some(0, 0, 1), some(None, None), some(5, None, 5).select([0, 2])], [3, 2, 3])
    groups = both.groups
    assert groups is not None and groups[0] == groups[1] != groups[2]
    assert groups[3:5].tolist() == [NO_GROUP, NO_GROUP] and groups[5] == groups[6]
    assert len(set(groups.tolist())) == 4
    assert both.rows.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert [example.source for example in both] == ["f:0", "f:1", "f:2", "f:0", "f:1", "f:0", "f:2"]
    assert [example.row for example in both] == both.rows.tolist()


def test_prompts_of_rows_are_those_of_their_source(prepared: Path) -> None:
    data = data_of(prepared, wiki={"format": "text"})
    made = prepare_each(read_sources(data), data, tiny_tokenizer())
    whole = combined(made)
    rows = whole.eval.rows
    found = whole.eval_prompts.of_rows(np.concatenate([rows[::-1], rows]))
    alone = [p for name in ("wiki", "chat") for p in made[name].eval_prompts.of_rows(made[name].eval.rows[::-1])]
    assert [prompt.source for prompt in found] == [prompt.source for prompt in alone] != []
    assert [p.prompt_ids.tolist() for p in found] == [p.prompt_ids.tolist() for p in alone]
    assert [p.source for p in whole.eval_prompts[-2:]] == [p.source for p in list(whole.eval_prompts)[-2:]]


@given(st.lists(st.lists(st.integers(), max_size=4), max_size=5), st.data())
def test_chained_sequences_are_one_list(parts: list[list[int]], data: st.DataObject) -> None:
    items, chained = [item for part in parts for item in part], Chained(parts)
    assert list(chained) == items and len(chained) == len(items)
    assert [chained[n] for n in range(-len(items), len(items))] == items * 2
    chosen = data.draw(st.slices(len(items) + 1))
    assert chained[chosen] == items[chosen]
    with pytest.raises(IndexError):
        chained[len(items)]


@given(*[st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=9)] * 2)
def test_rows_among_others_are_those_with_an_equal_hash(hashes: list[Any], others: list[Any]) -> None:
    arrays = [np.array(side, np.uint64).reshape(-1, 2) for side in (hashes, others)]
    assert split.are_among(*arrays).tolist() == [each in others for each in hashes]


def test_eval_row_that_another_source_trains_on_is_refused(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text((prepared / "wiki.txt").read_text())
    write_chats(tmp_path / "chat.jsonl")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": f"  {TEXTS[4].upper()} "}) + "\n")
    data = data_of(tmp_path, chat={"eval_path": str(tmp_path / "test.jsonl"), "format": "auto"},
                   wiki={"eval_fraction": 0.0})  # fmt: skip
    with pytest.raises(DataError, match=r"1 eval rows are training rows too:\n .*test\.jsonl:1 is also .*wiki\.txt:9"):
        prepare(data, tiny_tokenizer())


def test_duplicates_of_earlier_sources_are_counted_or_left_out(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.txt", TEXTS[:9])
    write_texts(tmp_path / "b.txt", [*TEXTS[5:9], *TEXTS[20:26]])
    sources = {name: {"path": str(tmp_path / f"{name}.txt")} for name in "ab"}
    data = config.Data(sources=sources, mix={"a": 1, "b": 1}, eval_fraction=0)
    counted = prepare(data, tiny_tokenizer()).report
    assert (counted.rows, counted.duplicates, counted.sources["b"].duplicates) == (19, 4, 4)
    left_out = prepare(dataclasses.replace(data, deduplicate=True), tiny_tokenizer()).report
    assert (left_out.rows, left_out.left_out) == (15, {"equal to an earlier row": 4})
    assert left_out.sources["a"].rows == 9


def test_error_of_a_source_names_it_and_its_rows(tmp_path: Path) -> None:
    write_chats(tmp_path / "chat.jsonl")
    (tmp_path / "wiki.txt").write_text("one text\n")
    with pytest.raises(DataError, match=r"data\.sources\.wiki: 1 bad rows?|data\.sources\.wiki: .*"):
        prepare(data_of(tmp_path, wiki={"format": "messages"}), tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"data\.sources\.chat: data\.columns names question, which is not a column"):
        prepare(data_of(tmp_path, chat={"columns": {"prompt": "question"}}), tiny_tokenizer())


def test_cache_has_an_entry_for_each_source(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_CACHED_FROM_ROWS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = data_of(prepared)
    first = prepare(data, tiny_tokenizer())
    assert len(list(cache.folder().iterdir())) == 2 and not first.report.cached
    other = prepare(data_of(prepared, wiki={"max_rows": 5}), tiny_tokenizer())
    assert [other.report.sources[name].cached for name in ("chat", "wiki")] == [True, False]
    again = prepare(data, tiny_tokenizer())
    assert again.report.cached and again.report.sha256 == first.report.sha256


def test_shares_decide_no_row(prepared: Path) -> None:
    data = data_of(prepared)
    other = dataclasses.replace(data, mix={"chat": 0.1, "wiki": 0.9})
    hashes = {prepare(each, tiny_tokenizer()).report.sha256 for each in (data, other)}
    assert len(hashes) == 1


# --- training ---


def test_proportions_hold_at_every_step(prepared: Path) -> None:
    """From the run folder alone: cumulative supervised tokens are within those of one row of the shares."""
    data = data_of(prepared)
    longest = int(prepare(data, tiny_tokenizer()).train.supervised_tokens.max())
    given_ = {"chat": 0, "wiki": 0}
    steps = [line for line in runs.read_metrics(prepared / "whole") if "loss" in line]
    assert len(steps) > 10
    for line in steps:
        for name in given_:
            given_[name] += line[f"supervised_tokens/{name}"]
        assert line["supervised_tokens/chat"] + line["supervised_tokens/wiki"] == line["supervised_tokens"]
        assert abs(given_["chat"] - 0.6 * sum(given_.values())) <= longest
    checked = json.loads((prepared / "whole" / "check.json").read_text())["steps"]["sources"]
    assert {name: source["supervised_tokens"] for name, source in checked.items()} == given_
    assert {name: source["share"] for name, source in checked.items()} == {"chat": 0.6, "wiki": 0.4}


def test_losses_of_each_source_are_in_metrics_result_and_checkpoints(prepared: Path) -> None:
    run = prepared / "whole"
    result = json.loads((run / "result.json").read_text())
    lines = [line for line in runs.read_metrics(run) if "eval_loss" in line]
    assert lines[0]["step"] == 0 and len(lines) > 2
    for key, line in (("base_eval_losses", lines[0]), ("eval_losses", lines[-1])):
        assert result[key] == {name: line[f"eval_loss/{name}"] for name in ("chat", "wiki")}
    saved = checkpoint.newest(run)
    assert saved is not None
    last = json.loads((saved / "state.json").read_text())["evaluations"][-1]["result"]
    restored = EvalLoss.from_plain(last)
    assert restored.losses == result["eval_losses"] and dataclasses.asdict(restored) == last
    # The loss of all is the mean over all supervised tokens, however many each source has.
    each = restored.sources.values()
    assert result["eval_loss"] == pytest.approx(sum(e.loss * e.tokens for e in each) / sum(e.tokens for e in each))
    assert restored.tokens == sum(e.tokens for e in each) and restored.rows == sum(e.rows for e in each)


def test_loss_of_a_source_is_that_of_its_rows_alone(prepared: Path, tmp_path: Path) -> None:
    alone = [word for word in inputs(prepared) if "data.sources" not in word and "data.mix" not in word]
    run = tmp_path / "run"
    path = f"data.path={prepared / 'wiki.txt'}"
    assert call("train", *alone, path, "train.max_steps=1", f"hydra.run.dir={run}") == 0
    losses = json.loads((prepared / "whole" / "result.json").read_text())["base_eval_losses"]
    assert losses["wiki"] == pytest.approx(json.loads((run / "result.json").read_text())["base_eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("train.epochs=2",), marks=pytest.mark.nightly),
        ("data.mix_until=all", "data.mix={chat: 3, wiki: 1}", "train.max_steps=12"),
    ],
)
def test_resumed_run_matches_an_uninterrupted_run(
    words: tuple[str, ...], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared / "whole"
    if words != ("train.epochs=2",):
        whole = tmp_path / "whole"
        assert call("train", *inputs(prepared), *words, f"hydra.run.dir={whole}") == 0
    append = runs.append_metrics

    def append_and_fail(folder: Path, metrics: dict[str, float]) -> None:
        append(folder, metrics)
        if metrics["step"] == 7:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "append_metrics", append_and_fail)
        assert call("train", *inputs(prepared), *words, f"hydra.run.dir={run}") == 130
    assert checkpoint.newest(run) == run / "checkpoints" / "step-00000006"
    assert call("train", f"resume={run}") == 0
    assert weights(run) == weights(whole) and curve(run) == curve(whole)
    passes = json.loads((run / "check.json").read_text())["steps"]["sources"]
    assert passes["chat"]["passes"] > 1  # its rows repeat


@pytest.mark.parametrize("until", config.MixUntil)
def test_longer_run_begins_with_the_steps_of_a_shorter_one(until: config.MixUntil, prepared: Path) -> None:
    data = dataclasses.replace(data_of(prepared), mix_until=until)
    whole = prepare(data, tiny_tokenizer())

    def planned(**train: Any) -> list[list[int]]:
        steps = plan_steps(whole.train, config.Train(tokens_per_step=150, **train), 0, mix_of(whole, data))
        return [step.tolist() for step in steps]

    one, three, many = planned(epochs=1), planned(epochs=3), planned(max_steps=200)
    assert len(one) < len(three) < 200
    assert three[: len(one)] == one and many[: len(three)] == three
    assert planned(max_steps=7) == many[:7]


def test_source_with_share_0_is_evaluated_only(prepared: Path, tmp_path: Path) -> None:
    words = (*inputs(prepared), "train.max_steps=4")
    assert call("train", *words, "data.mix.wiki=0", f"hydra.run.dir={tmp_path / 'measured'}") == 0
    kept = [word for word in words if "wiki" not in word]
    assert call("train", *kept, f"hydra.run.dir={tmp_path / 'alone'}") == 0
    assert weights(tmp_path / "measured") == weights(tmp_path / "alone")
    measured, alone = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("measured", "alone"))
    assert measured["eval_losses"]["chat"] == pytest.approx(alone["eval_losses"]["chat"], rel=1e-6)
    assert "wiki" in measured["eval_losses"] and "wiki" not in alone["eval_losses"]
    lines = [line for line in runs.read_metrics(tmp_path / "measured") if "loss" in line]
    assert {line["supervised_tokens/wiki"] for line in lines} == {0}


def test_order_in_which_sources_are_given_changes_no_step(prepared: Path) -> None:
    data = data_of(prepared)
    other = dataclasses.replace(data, sources=dict(reversed(data.sources.items())), mix={"wiki": 0.4, "chat": 0.6})
    assert list(other.sources) != list(data.sources)
    steps = []
    for each in (data, other):
        whole = prepare(each, tiny_tokenizer())
        planned = plan_steps(whole.train, config.Train(tokens_per_step=150), 0, mix_of(whole, each))
        steps.append([[whole.train[i].ids.tolist() for i in step] for step in planned])
    assert steps[0] == steps[1]


def test_eval_rows_are_chosen_for_each_source(prepared: Path) -> None:
    whole = prepare(data_of(prepared), tiny_tokenizer())
    few = choose_eval(whole, 2)
    assert few.sources == {"chat": range(2), "wiki": range(2, 4)}
    alone = choose_eval(dataset.prepare(mixing.sources(data_of(prepared))["wiki"], tiny_tokenizer()), 2)
    assert [e.source for e in few.examples[2:4]] == [e.source for e in alone.examples] and alone.sources == {}


def test_made_datasets_without_sources_are_not_combined(prepared: Path) -> None:
    data = config.Data(path=str(prepared / "wiki.txt"))
    made = prepare_each(read_sources(data), data, tiny_tokenizer())
    assert combined(made) is made[""] and mix_of(made[""], data) is None


# --- check, eval, sweeps, the API ---


def test_check_shows_each_source_and_its_part_of_the_run(prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("check", *inputs(prepared), "data.mix_until=all", "data.mix={chat: 30, wiki: 1}") == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert re.search(r"source chat 24 rows \(prompt_completion\), \d+ documents", shown)
    assert re.search(r"source chat [\d,]+ supervised tokens, 9[67]\.\d% \(data\.mix\.chat: 96\.8%\), in \d+", shown)
    assert re.search(r"source wiki [\d,]+ supervised tokens, 3\.\d% \(data\.mix\.wiki: 3\.2%\), in 1 passes", shown)
    assert "the rows of data.sources.chat are seen" in shown
    assert re.search(r"wiki\.txt:\d+ \(median of wiki\): \d+ tokens", shown) and "(median of chat)" in shown


def test_eval_reports_each_source_of_the_run(prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = prepared / "whole"
    assert call("eval", f"run={run}", "eval.samples=0") == 0
    assert re.search(r"eval loss wiki +[\d.]+ +[\d.]+ +\d+ tokens of \d+ rows", capfd.readouterr().out)
    written, result = (json.loads((run / name).read_text()) for name in ("eval.json", "result.json"))
    for side, key in (("base", "base_eval_losses"), ("adapter", "eval_losses")):
        losses = {name: source["loss"] for name, source in written[side]["sources"].items()}
        assert losses == pytest.approx(result[key], rel=1e-5)
    summary = training_summary.read(run)
    assert "loss of wiki" in summary.evaluations[-1].adapter and str(prepared) not in str(summary)
    assert summary.data == "chat (share 0.6): a local file (.jsonl); wiki (share 0.4): a local file (.txt)"


def test_eval_of_other_rows_refuses_training_rows_of_any_source(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_chats(tmp_path / "other.jsonl", [("How many legs does a spider have?", "Eight.")])
    words = (f"run={prepared / 'whole'}", "eval.samples=0")
    assert call("eval", *words, f"data.path={other}") == 0
    assert "eval loss chat" not in capfd.readouterr().out
    assert call("eval", *words, f"data.path={prepared / 'chat.jsonl'}") == 4
    assert "eval rows are training rows too" in capfd.readouterr().err


def test_jobs_that_differ_in_their_mix_share_a_base(tmp_path: Path) -> None:
    words = [*inputs(tmp_path), "data.mix_until=all"]
    changes = ["data.mix.wiki=0", "data.mix.wiki=0.7", "data.mix_until=first", "data.sources.wiki.max_rows=3"]
    cfgs = [lora_ft.compose("train", [*words, change]) for change in changes]
    groups = grouped([Job(n, tmp_path, cfg, []) for n, cfg in enumerate(cfgs)], share=True)
    assert [[job.number for job in group] for group in groups] == [[0, 1, 2], [3]]


@pytest.mark.nightly
def test_sweep_over_shares_compares_the_losses_of_each_source(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    words = [*inputs(prepared), "train.max_steps=3", "device=cpu"]
    lora_ft.sweep([*words, "data.mix.wiki=0,0.4"], folder)
    ranking = leaderboard.rank(results.read(folder))
    assert ranking.columns == ("data.mix.wiki",) and len(ranking.boards) == 1
    assert call("train", *words, "data.mix.wiki=0.4", f"hydra.run.dir={tmp_path / 'alone'}") == 0
    assert weights(folder / "1") == weights(tmp_path / "alone")
    assert "eval loss wiki" in (folder / "report.md").read_text()


def test_report_shows_the_loss_of_each_source(tmp_path: Path) -> None:
    folder = sweep_folder(tmp_path, ["data.mix.wiki=0,0.3"])
    losses = {"eval_losses": {"wiki": 3.5, "chat": 1.5}, "base_eval_losses": {"wiki": 3.0, "chat": 4.0}}
    job(folder, 0, ["data.mix.wiki=0"], {"data.mix": {"wiki": 0}}, loss=2.0, result=losses)
    job(folder, 1, ["data.mix.wiki=0.3"], {"data.mix": {"wiki": 0.3}}, loss=2.5)
    report.write(folder, pictures=False)
    lines = [re.sub(r" +", " ", line) for line in (folder / "report.md").read_text().splitlines()]
    header = next(line for line in lines if line.startswith("| place"))
    assert "| eval loss chat, nats per token | eval loss wiki, nats per token |" in header
    assert any("| base |" in line and "| 4.0000 | 3.0000 |" in line for line in lines)
    assert any("| 1.5000 | 3.5000 |" in line for line in lines)
    record = json.loads((folder / "report.json").read_text())["jobs"][0]
    assert record["eval_losses_nats_per_token"] == losses["eval_losses"]
    (folder / "1" / "result.json").write_text(json.dumps({"eval_losses": [1]}))
    assert "eval_losses must be a mapping" in results.read(folder).jobs[1].reason


def test_python_takes_sources_and_refuses_other_rows_beside_them(prepared: Path, tmp_path: Path) -> None:
    cfg = lora_ft.compose("train", ["train.max_steps=1", f"model.path={prepared / 'llama'}", "device=cpu", *QUICK])
    cfg.data = data_of(prepared)
    assert set(lora_ft.train(cfg, folder=tmp_path / "run").result.eval_losses) == {"chat", "wiki"}
    with pytest.raises(ConfigError, match=r"rows and data\.sources name different rows"):
        lora_ft.train(cfg, rows=[{"text": "a"}], folder=tmp_path / "other")
