"""Datasets from settings: split, lengths, cache, report; every row is in the dataset or counted."""

import json

import numpy as np
import pytest
from tiny import CHATML, tiny_tokenizer

from lora_ft.config import Data, TooLong, TrainOn
from lora_ft.data import cache, dataset
from lora_ft.errors import ConfigError, DataError
from lora_ft.io import durable

TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return str(path)


def questions(count, answer="{n} squared is {n}{n}."):
    return [{"prompt": f"What is {n} squared?", "completion": answer.format(n=n)} for n in range(count)]


def texts(rows):
    return [TOKENIZER.decode(row.ids) for row in rows]


def same(a, b):
    """Compare datasets, arrays included."""
    return all(
        len(mine) == len(theirs) and all(map(equal, mine, theirs))
        for mine, theirs in ((a.train, b.train), (a.eval, b.eval), (a.eval_prompts, b.eval_prompts))
    ) and a.report.sha256 == b.report.sha256  # fmt: skip


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.closes("F08")
def test_the_split_does_not_depend_on_other_rows_or_their_order(tmp_path):
    rows = questions(60)
    whole = dataset.prepare(Data(path=write(tmp_path, rows), eval_fraction=0.3), TOKENIZER)
    part = dataset.prepare(Data(path=write(tmp_path, rows[::-2]), eval_fraction=0.3), TOKENIZER)
    assert 5 < len(whole.eval) < 40
    assert set(texts(part.eval)) < set(texts(whole.eval))
    assert set(texts(part.train)) < set(texts(whole.train))


def test_a_larger_eval_fraction_keeps_the_eval_rows_of_a_smaller_one(tmp_path):
    path = write(tmp_path, questions(60))
    eval_sets = [set(texts(dataset.prepare(Data(path=path, eval_fraction=f), TOKENIZER).eval)) for f in (0.1, 0.4, 0.8)]
    assert eval_sets[0] < eval_sets[1] < eval_sets[2]


@pytest.mark.closes("F07")
def test_rows_that_differ_in_case_and_whitespace_are_on_one_side(tmp_path):
    rows = questions(30)
    doubles = [{k: f"  {v.upper()}\n" for k, v in row.items()} for row in rows]
    data = dataset.prepare(Data(path=write(tmp_path, rows + doubles), eval_fraction=0.3), TOKENIZER)
    sides = [{row.source.rpartition(":")[2] for row in side} for side in (data.train, data.eval)]
    for line in range(1, 31):
        assert any({str(line), str(line + 30)} <= side for side in sides)
    assert data.report.duplicates == 30


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_two_rows_give_one_training_row_and_one_eval_row(tmp_path, fraction):
    data = dataset.prepare(Data(path=write(tmp_path, questions(2)), eval_fraction=fraction), TOKENIZER)
    assert (len(data.train), len(data.eval)) == (1, 1)


def test_one_row_or_eval_fraction_0_gives_no_eval_rows(tmp_path):
    path = write(tmp_path, questions(1))
    assert dataset.prepare(Data(path=path, eval_fraction=0.5), TOKENIZER).eval.rows.tolist() == []
    assert (
        dataset.prepare(Data(path=write(tmp_path, questions(50)), eval_fraction=0), TOKENIZER).eval.rows.tolist() == []
    )


def test_all_rows_of_eval_path_are_eval_rows(tmp_path):
    rows = questions(20)
    path, extra = write(tmp_path, rows[:15]), write(tmp_path, rows[15:], "eval.jsonl")
    data = dataset.prepare(Data(path=path, eval_path=extra, eval_fraction=0.5), TOKENIZER)
    assert [row.source for row in data.eval] == [f"{extra}:{n}" for n in range(1, 6)]
    assert len(data.train) == 15


@pytest.mark.closes("F07")
def test_an_eval_row_that_is_a_training_row_is_reported_with_both_sources(tmp_path):
    rows = questions(5)
    leaked = {k: v.upper() + " " for k, v in rows[3].items()}
    path, extra = write(tmp_path, rows), write(tmp_path, [*questions(7)[5:], leaked], "eval.jsonl")
    with pytest.raises(DataError, match=r"1 eval rows .*\n  .*eval\.jsonl:3 is also .*rows\.jsonl:4"):
        dataset.prepare(Data(path=path, eval_path=extra), TOKENIZER)


def test_eval_prompts_end_before_the_last_answer(tmp_path):
    chat = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    extra = write(tmp_path, [{"messages": chat}], "eval.jsonl")
    data = dataset.prepare(Data(path=write(tmp_path, questions(3)), eval_path=extra), TOKENIZER)
    (question,) = data.eval_prompts
    ids = TOKENIZER.apply_chat_template(chat[:3], add_generation_prompt=True, return_dict=False)
    assert list(question.prompt_ids) == ids
    assert question.prompt_ids.dtype == np.int32
    assert (question.prompt, question.answer, question.source) == ("c", "d", f"{extra}:1")


def test_a_row_of_several_documents_gives_one_eval_prompt(tmp_path):
    tokenizer = tiny_tokenizer()
    # This template marks earlier answers, so each answer has its own document.
    tokenizer.chat_template = CHATML.replace(
        "message['content']",
        "message['content'] + (' (earlier)' if message['role'] == 'assistant' and not loop.last else '')",
    )
    chat = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    extra = write(tmp_path, [{"messages": chat}], "eval.jsonl")
    data = dataset.prepare(Data(path=write(tmp_path, questions(3)), eval_path=extra), tokenizer)
    (question,) = data.eval_prompts
    assert len(data.eval) == 2
    ids = tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True, return_dict=False)
    assert list(question.prompt_ids) == ids


def test_plain_text_gives_no_eval_prompts(tmp_path):
    rows = [{"text": f"Document {n}."} for n in range(20)]
    data = dataset.prepare(Data(path=write(tmp_path, rows), eval_fraction=0.5), TOKENIZER)
    assert data.eval
    assert list(data.eval_prompts) == []
    assert data.answers is None


def test_labels_are_the_distinct_answers_of_the_training_rows(tmp_path):
    rows = [{"prompt": f"Is {n} even?", "completion": "no" if n % 2 else "yes"} for n in range(60)]
    assert dataset.prepare(Data(path=write(tmp_path, rows)), TOKENIZER).answers == ["no", "yes"]
    extra = write(tmp_path, [{"prompt": "Is it even?", "completion": "unseen"}], "eval.jsonl")
    assert dataset.prepare(Data(path=write(tmp_path, rows), eval_path=extra), TOKENIZER).answers == ["no", "yes"]
    assert dataset.prepare(Data(path=write(tmp_path, questions(60))), TOKENIZER).answers is None


LONG = [{"prompt": "Say it. " * n, "completion": "Said."} for n in (1, 30, 1, 40)]


def lengths(rows):
    return [len(row.ids) for row in rows]


@pytest.mark.closes("A12", "F05")
def test_rows_over_max_length_are_reported_with_count_and_longest_row(tmp_path):
    path = write(tmp_path, LONG)
    longest = max(lengths(dataset.prepare(Data(path=path, eval_fraction=0), TOKENIZER).train))
    with pytest.raises(DataError) as caught:
        dataset.prepare(Data(path=path, eval_fraction=0, max_length=40), TOKENIZER)
    assert str(caught.value).startswith(
        f"2 of 4 rows are longer than data.max_length=40, the longest is {path}:4 with {longest} tokens"
    )
    assert (
        lengths(dataset.prepare(Data(path=path, eval_fraction=0, max_length=longest), TOKENIZER).train)[-1] == longest
    )


@pytest.mark.closes("A12", "F05")
def test_dropped_rows_are_counted(tmp_path):
    settings = Data(path=write(tmp_path, LONG), eval_fraction=0, max_length=40, too_long=TooLong.drop)
    data = dataset.prepare(settings, TOKENIZER)
    assert [row.source.rpartition(":")[2] for row in data.train] == ["1", "3"]
    assert data.report.left_out == {"longer than data.max_length": 2}
    settings.max_length = 5
    with pytest.raises(DataError, match=r"no row is left to train on: 4 longer than data\.max_length"):
        dataset.prepare(settings, TOKENIZER)


TEXTS = [{"text": "The fox jumps over 12 dogs. " * n} for n in (1, 3, 9)]


def targets(rows):
    """Return each supervised token with the token that it is predicted from."""
    return sorted(
        (int(row.ids[i - 1]), int(row.ids[i])) for row in rows for i in range(len(row.ids)) if row.supervised[i]
    )


@pytest.mark.closes("A12", "F05")
@pytest.mark.parametrize("max_length", [2, 7, 20, 1000])
def test_windows_have_every_target_of_a_text_once_and_one_end_token(tmp_path, max_length):
    path = write(tmp_path, TEXTS)
    whole = dataset.prepare(Data(path=path, eval_fraction=0, max_length=4096), TOKENIZER)
    settings = Data(path=path, eval_fraction=0, max_length=max_length, too_long=TooLong.split)
    data = dataset.prepare(settings, TOKENIZER)
    assert targets(data.train) == targets(whole.train)
    assert all(2 <= len(row.ids) <= max_length and not row.supervised[0] for row in data.train)
    for row in whole.train:
        windows = [window.ids for window in data.train if window.source == row.source]
        assert np.array_equal(np.concatenate([windows[0], *(ids[1:] for ids in windows[1:])]), row.ids)
        assert [TOKENIZER.eos_token_id in ids for ids in windows] == [False] * (len(windows) - 1) + [True]
    cut = sum(len(row.ids) > max_length for row in whole.train)
    assert (data.report.split, data.report.truncated) == (cut, 0)
    assert (f"{cut} texts cut into windows" in str(data.report)) == bool(cut)


def test_windows_of_a_text_are_on_one_side_of_the_split(tmp_path):
    rows = [{"text": f"Number {n}. " * 9} for n in range(20)]
    settings = Data(path=write(tmp_path, rows), eval_fraction=0.4, max_length=9, too_long=TooLong.split)
    data = dataset.prepare(settings, TOKENIZER)
    assert not {row.source for row in data.train} & {row.source for row in data.eval}
    assert len({row.source for row in data.eval}) < len(data.eval)


@pytest.mark.parametrize(
    ("rows", "settings", "advice"),
    [
        (TEXTS, {}, "drop or split"),
        (TEXTS, {"too_long": TooLong.truncate_prompt}, "drop or split"),
        (LONG, {}, "drop or truncate_prompt"),
        (LONG, {"too_long": TooLong.split}, "drop or truncate_prompt"),
        ([{"prompt": "Say.", "completion": "Said. " * 40}], {}, "drop"),
        ([{"prompt": "Say.", "completion": "Said. " * 40}], {"too_long": TooLong.truncate_prompt}, "drop"),
    ],
)
def test_the_advice_for_long_rows_works(tmp_path, rows, settings, advice):
    data = Data(path=write(tmp_path, rows), eval_fraction=0, max_length=20, **settings)
    with pytest.raises(DataError, match=rf"data\.max_length=20.*raise it, or choose data\.too_long={advice}$"):
        dataset.prepare(data, TOKENIZER)
    for cure in advice.split(" or "):
        settings["too_long"] = TooLong[cure]
        more = write(tmp_path, [*rows, {"text": "a"} if rows is TEXTS else {"prompt": "a", "completion": "b"}])
        dataset.prepare(Data(path=more, eval_fraction=0, max_length=20, **settings), TOKENIZER)


@pytest.mark.closes("A12")
def test_truncation_cuts_the_start_of_the_prompt_and_keeps_bos_and_answer(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    path = write(tmp_path, LONG)
    whole = dataset.prepare(Data(path=path, eval_fraction=0), tokenizer)
    data = dataset.prepare(Data(path=path, eval_fraction=0, max_length=40, too_long=TooLong.truncate_prompt), tokenizer)
    assert data.report.truncated == 2
    for before, after in zip(whole.train, data.train, strict=True):
        assert len(after.ids) == min(len(before.ids), 40)
        assert after.ids[0] == tokenizer.bos_token_id
        tail = len(after.ids) - 1
        assert np.array_equal(after.ids[1:], before.ids[-tail:])
        assert np.array_equal(after.supervised[1:], before.supervised[-tail:])
        assert tokenizer.decode(after.ids[after.supervised]) == "Said.<|im_end|>"


@pytest.mark.closes("A12")
def test_truncation_keeps_one_token_before_the_answer(tmp_path):
    path = write(tmp_path, [{"prompt": "Say it. " * 9, "completion": "Said."}])
    answer = int(dataset.prepare(Data(path=path), TOKENIZER).train[0].supervised.sum())
    settings = Data(path=path, max_length=answer + 1, too_long=TooLong.truncate_prompt)
    assert dataset.prepare(settings, TOKENIZER).train[0].supervised.tolist() == [False] + [True] * answer
    settings.max_length = answer
    with pytest.raises(DataError, match="answers are never cut"):
        dataset.prepare(settings, TOKENIZER)


def test_the_eval_prompt_of_a_truncated_row_ends_where_its_answer_begins(tmp_path):
    settings = Data(path=write(tmp_path, LONG[:1]), eval_path=write(tmp_path, LONG[1:2], "eval.jsonl"),
                    max_length=40, too_long=TooLong.truncate_prompt)  # fmt: skip
    data = dataset.prepare(settings, TOKENIZER)
    (row,), (question,) = data.eval, data.eval_prompts
    assert np.array_equal(question.prompt_ids, row.ids[: row.supervised.argmax()])


@pytest.mark.closes("A12")
@pytest.mark.parametrize(
    ("row", "train_on"),
    [
        ({"prompt": "Say it.", "completion": "Said. " * 40}, TrainOn.answers),
        ({"text": "Said. " * 40}, TrainOn.answers),
        (
            {"messages": [{"role": r, "content": "word " * 9} for r in ["user", "assistant"] * 3]},
            TrainOn.all,
        ),
    ],
)
def test_answers_are_never_truncated(tmp_path, row, train_on):
    settings = Data(path=write(tmp_path, [row]), max_length=40, too_long=TooLong.truncate_prompt, train_on=train_on)
    with pytest.raises(
        DataError, match=r"1 of 1 rows .*rows\.jsonl:1 .* even without their prompts, and answers are never cut"
    ):
        dataset.prepare(settings, TOKENIZER)


def test_the_report_lists_unused_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",text,label\n0,a,b\n1,c,d\n")
    report = dataset.prepare(Data(path=str(path)), TOKENIZER).report
    assert report.unused == ["(unnamed)", "label"]
    assert str(report).endswith("; columns not used: (unnamed), label")
    assert "not used" not in str(dataset.prepare(Data(path=write(tmp_path, questions(3))), TOKENIZER).report)


def test_the_report_adds_up(tmp_path):
    data = dataset.prepare(Data(path=write(tmp_path, questions(30)), eval_fraction=0.3), TOKENIZER)
    report = data.report
    assert report.train_tokens == sum(lengths(data.train))
    assert report.eval_tokens == sum(lengths(data.eval))
    assert report.supervised_tokens == sum(int(row.supervised.sum()) for row in data.train)
    assert report.longest == max(lengths([*data.train, *data.eval]))
    assert all(row.ids.dtype == np.int32 and row.supervised.dtype == np.bool_ for row in data.train)


@pytest.mark.closes("A04")
def test_a_text_of_one_token_has_nothing_to_supervise(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: row: has no supervised token"):
        dataset.prepare(Data(path=write(tmp_path, [{"text": "fine"}, {"text": "<|im_end|>"}])), TOKENIZER)


def test_a_slow_tokenizer_is_refused(tmp_path):
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="must be a fast one"):
        dataset.prepare(Data(path=write(tmp_path, questions(2))), Slow())


@pytest.fixture
def cached(monkeypatch):
    monkeypatch.setattr(dataset, "_CACHED_FROM_ROWS", 1)


def test_few_rows_are_not_cached(tmp_path):
    dataset.prepare(Data(path=write(tmp_path, questions(9))), TOKENIZER)
    assert not cache.folder().exists()


def test_a_second_run_loads_the_same_rows_from_the_cache(tmp_path, cached):
    settings = Data(path=write(tmp_path, questions(30)), eval_fraction=0.3)
    first, second = (dataset.prepare(settings, TOKENIZER) for _ in range(2))
    assert (first.report.cached, second.report.cached) == (False, True)
    assert same(first, second)
    # Settings that apply after tokenizing do not change the key.
    settings.max_length, settings.eval_fraction, settings.too_long = 20, 0.6, TooLong.truncate_prompt
    assert dataset.prepare(settings, TOKENIZER).report.cached


def changed_tokenizer(template=None, token=None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    if token:
        tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.closes("F06")
@pytest.mark.parametrize(
    ("settings", "tokenizer", "answer"),
    [
        ({"system": "Be brief."}, TOKENIZER, None),
        ({"train_on": TrainOn.all}, TOKENIZER, None),
        ({}, changed_tokenizer(template="{# 2 #}" + CHATML), None),
        ({}, changed_tokenizer(token="squared"), None),
        ({}, TOKENIZER, "{n} squared is {n}{n}!"),
    ],
)
def test_a_change_of_any_input_is_a_cache_miss(tmp_path, cached, settings, tokenizer, answer):
    dataset.prepare(Data(path=write(tmp_path, questions(9))), TOKENIZER)
    rows = questions(9) if answer is None else [*questions(8), *questions(9, answer)[8:]]
    assert not dataset.prepare(Data(path=write(tmp_path, rows), **settings), tokenizer).report.cached


@pytest.mark.closes("F06")
def test_a_change_of_code_or_libraries_is_a_cache_miss(tmp_path, cached, monkeypatch):
    settings = Data(path=write(tmp_path, questions(9)))
    dataset.prepare(settings, TOKENIZER)
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    assert not dataset.prepare(settings, TOKENIZER).report.cached


@pytest.mark.closes("F06")
@pytest.mark.parametrize("damage", [b"", b"not a tensor file", "cut", "flip"])
def test_a_damaged_cache_file_is_replaced(tmp_path, cached, damage, caplog):
    settings = Data(path=write(tmp_path, questions(9)))
    first = dataset.prepare(settings, TOKENIZER)
    (file,) = cache.folder().iterdir()
    whole = file.read_bytes()
    if damage == "cut":
        damage = whole[:-1]
    elif damage == "flip":
        damage = whole[:-400] + bytes([whole[-400] ^ 1]) + whole[-399:]
    file.write_bytes(damage)
    again = dataset.prepare(settings, TOKENIZER)
    assert not again.report.cached
    assert same(first, again)
    assert "damaged row cache, tokenizing again" in caplog.text
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, cached, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write_stream", full)
    assert dataset.prepare(Data(path=write(tmp_path, questions(9))), TOKENIZER).train
    assert "rows are not cached: [Errno 28] No space left" in caplog.text


def test_the_dataset_hash_depends_on_ids_masks_and_split(tmp_path):
    path = write(tmp_path, questions(9))
    settings = [{}, {"train_on": TrainOn.all}, {"system": "s"}, {"eval_fraction": 0}, {"max_rows": 8}]
    hashes = {dataset.prepare(Data(path=path, **given), TOKENIZER).report.sha256 for given in settings}
    assert len(hashes) == len(settings)


@pytest.mark.closes("F07")
def test_duplicates_are_counted_and_left_out_on_request(tmp_path):
    path = write(tmp_path, questions(9) + questions(4))
    both = {drop: dataset.prepare(Data(path=path, deduplicate=drop), TOKENIZER) for drop in (False, True)}
    assert [both[drop].report.duplicates for drop in (False, True)] == [4, 4]
    assert len(both[False].train) + len(both[False].eval) == 13
    once = dataset.prepare(Data(path=write(tmp_path, questions(9), "once.jsonl")), TOKENIZER)
    assert both[True].report.sha256 == once.report.sha256 != both[False].report.sha256
    assert both[True].report.left_out == {"equal to an earlier row": 4}
    assert "4 equal to an earlier row" in str(both[True].report)


def test_a_split_of_a_hub_dataset_can_be_the_eval_set(monkeypatch):
    import datasets

    splits = {"train": questions(9), "test": [{"prompt": "Who?", "completion": "Nobody."}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, *, split, revision, streaming: splits[split])
    prepared = dataset.prepare(Data(path="org/rows", eval_split="test"), TOKENIZER)
    assert (len(prepared.train), len(prepared.eval)) == (9, 1)
    assert prepared.eval_prompts[0].answer == "Nobody."


def split_folder(folder, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        write(folder, rows, f"{name}.jsonl")
    return str(folder)


def sources(rows):
    return sorted(row.source.rpartition("/")[2] for row in rows)


TEN = questions(10)


def test_validation_files_of_a_folder_are_eval_rows_and_test_files_are_not_read(tmp_path, caplog):
    folder = split_folder(tmp_path / "rows", train=TEN[:6], val=TEN[6:8], test=[{"prompt": "bad row"}])
    with caplog.at_level("INFO", logger="lora_ft"):
        prepared = dataset.prepare(Data(path=folder), TOKENIZER)
    assert sources(prepared.train) == [f"train.jsonl:{n}" for n in range(1, 7)]
    assert sources(prepared.eval) == ["val.jsonl:1", "val.jsonl:2"]
    assert f"eval rows: the validation files of {folder}; data.eval_fraction is not used" in caplog.text


@pytest.mark.parametrize(
    ("settings", "trained", "evaluated"),
    [
        ({"eval_fraction": 0}, "train", []),
        ({"eval_split": "test"}, "train", ["test"]),
        ({"eval_split": "validation", "eval_fraction": 0}, "train", ["val"]),
        ({"split": "test", "eval_fraction": 0}, "test", []),
        ({"split": "test", "eval_split": "dev"}, "test", ["val"]),
    ],
)
def test_settings_choose_other_splits_of_a_folder(tmp_path, settings, trained, evaluated):
    folder = split_folder(tmp_path / "rows", train=TEN[:6], val=TEN[6:8], test=TEN[8:])
    prepared = dataset.prepare(Data(path=folder, **settings), TOKENIZER)
    assert {source.partition(".")[0] for source in sources(prepared.train)} == {trained}
    assert sorted({source.partition(".")[0] for source in sources(prepared.eval)}) == evaluated


def test_without_validation_files_a_part_of_the_train_files_is_the_eval_set(tmp_path):
    folder = split_folder(tmp_path / "rows", train=TEN[:8], test=TEN[8:])
    prepared = dataset.prepare(Data(path=folder, eval_fraction=0.3), TOKENIZER)
    assert len(prepared.eval) > 0 and len(prepared.train) + len(prepared.eval) == 8
    assert {source.partition(".")[0] for source in sources(prepared.eval)} == {"train"}


def test_eval_path_with_splits_needs_eval_split(tmp_path):
    rows = write(tmp_path, TEN[:6])
    folder = split_folder(tmp_path / "more", train=TEN[6:8], test=TEN[8:])
    with pytest.raises(ConfigError, match=r"more has files of the splits test, train: set data\.eval_split"):
        dataset.prepare(Data(path=rows, eval_path=folder), TOKENIZER)
    prepared = dataset.prepare(Data(path=rows, eval_path=folder, eval_split="test"), TOKENIZER)
    assert sources(prepared.eval) == ["test.jsonl:1", "test.jsonl:2"]


def test_the_cache_of_a_template_with_a_clock_is_valid_for_a_day(tmp_path, cached, monkeypatch):
    class Tomorrow(cache.datetime.date):
        @classmethod
        def today(cls):
            return super().today() + cache.datetime.timedelta(days=1)

    settings = Data(path=write(tmp_path, questions(9)))
    for template, kept in ((CHATML, True), ("{{ strftime_now('%d %B %Y') }}" + CHATML, False)):
        dataset.prepare(settings, changed_tokenizer(template))
        with monkeypatch.context() as patch:
            patch.setattr(cache.datetime, "date", Tomorrow)
            assert dataset.prepare(settings, changed_tokenizer(template)).report.cached is kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, r"data\.split=test needs a hub dataset or a folder .*, and .*rows\.jsonl is neither"),
        ({"name": "small"}, r"data\.name=small is a setting of hub datasets"),
        ({"revision": "v1"}, r"data\.revision=v1 is a setting of hub datasets"),
        (
            {"eval_split": "test"},
            r"data\.eval_split=test needs a hub dataset or a folder .*, and .*rows\.jsonl is neither: .*eval_path",
        ),
    ],
)
def test_settings_of_hub_datasets_are_refused_for_local_rows(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        dataset.prepare(Data(path=write(tmp_path, questions(9)), **settings), TOKENIZER)
    with pytest.raises(ConfigError, match=r"needs a hub dataset or a folder|is a setting of hub datasets"):
        dataset.prepare(Data(path="package:chatterbot_corpus/data/english", **settings), TOKENIZER)


def test_settings_of_hub_datasets_are_allowed_if_only_the_eval_rows_are_local(tmp_path, monkeypatch):
    import datasets

    splits = {"train[:9]": questions(9)}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, *, split, revision, streaming: splits[split])
    extra = write(tmp_path, questions(12)[9:])
    prepared = dataset.prepare(Data(path="org/rows", split="train[:9]", eval_path=extra), TOKENIZER)
    assert (len(prepared.train), len(prepared.eval)) == (9, 3)
