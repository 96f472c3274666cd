"""Reports from a sweep's files: ranking, seeds, failures, damaged files, exit codes, report.json, report.md, charts."""

import io
import json
import math
import os
import platform
import shlex
import statistics

import pytest
from rich.console import Console
from sweep_folders import BASE_LOSS, job, metrics, sweep_folder

from lora_ft import runs
from lora_ft.errors import ConfigError
from lora_ft.sweeps import figures, leaderboard, report, results, tables, terminal
from lora_ft.sweeps.results import State

read = results.read


def names(jobs):
    return [one.name for one in jobs]


def only_board(folder):
    [board] = leaderboard.rank(read(folder)).boards
    return board


def record(folder, **options):
    report.write(folder, pictures=False, **options)
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def printed(sweep, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal.table(leaderboard.rank(sweep)))
    return console.file.getvalue()


@pytest.fixture
def twenty(tmp_path):
    """Twenty jobs of which eight failed, one of them before its config was written."""
    folder = sweep_folder(tmp_path, ["data.path=x", "adapter.r=2,4,8,16,32", "seed=1,2,3,4"])
    cases = [(r, seed) for r in (2, 4, 8, 16, 32) for seed in (1, 2, 3, 4)]
    for number, (r, seed) in enumerate(cases):
        overrides, settings = [f"adapter.r={r}", f"seed={seed}"], {"adapter.r": r, "seed": seed}
        if number % 5 in (1, 3):
            early = number == 1
            job(folder, number, overrides, None if early else settings, failure=("DataError", 4, f"no row {number}"))
        else:
            job(folder, number, overrides, settings, loss=2 + 1 / (1 + number), adapter_bytes=1000 * r)
    return folder


@pytest.mark.closes("E01", "E07")
def test_report_ranks_finished_jobs_and_names_failed_ones_with_reason_and_log(twenty):
    sweep = report.write(twenty, pictures=False).sweep
    known = leaderboard.rank(sweep)
    assert [board.eval_tokens for board in known.boards] == [859]
    assert len(known.boards[0].ranked) == 12
    assert names(known.rest) == [str(n) for n in range(20) if n % 5 in (1, 3)]
    shown, text = printed(sweep), (twenty / "report.md").read_text()
    for one in known.rest:
        for output in (shown, text):
            assert f"DataError: no row {one.name}" in output
            assert str(twenty / one.name / "log.txt") in output
    assert report.exit_code(sweep) == 3


def test_jobs_are_ranked_by_loss_and_equal_losses_share_a_place(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1,2,3,4"])
    for number, loss in enumerate([2.5, 2.25, 2.5, 2.75]):
        job(folder, number, [f"adapter.r={number + 1}"], {"adapter.r": number + 1}, loss=loss)
    board = only_board(folder)
    assert names(board.ranked) == ["1", "0", "2", "3"]
    assert [board.place(one) for one in board.ranked] == [1, 2, 2, 4]


@pytest.mark.closes("E07")
@pytest.mark.parametrize("loss", [math.nan, -math.inf, math.inf, None])
def test_loss_that_is_not_finite_has_no_place_and_is_null_in_json(tmp_path, loss):
    folder = sweep_folder(tmp_path, ["seed=0,1"])
    job(folder, 0, ["seed=0"], {"seed": 0}, result={"eval_loss": loss})
    job(folder, 1, ["seed=1"], {"seed": 1}, loss=900.0)
    board = only_board(folder)
    assert names(board.ranked) == ["1", "0"]
    assert [board.place(one) for one in board.ranked] == [1, None]
    [setting] = board.settings
    assert (setting.mean, setting.deviation, len(setting.results)) == (900.0, None, 1)
    stored = record(folder)
    assert stored["best_job"] == "1"
    assert stored["jobs"][0]["eval_loss_nats_per_token"] is None
    assert stored["jobs"][1]["perplexity"] is None  # exp(900) is no float


def test_settings_table_has_mean_and_sample_deviation_over_seeds(tmp_path):
    folder, losses = sweep_folder(tmp_path, ["adapter.r=4,8", "seed=1,2,3"]), {}
    for number, (r, seed) in enumerate((r, seed) for r in (4, 8) for seed in (1, 2, 3)):
        losses[r, seed] = 2 + 1 / (r + seed * seed)
        job(folder, number, [f"adapter.r={r}"], {"adapter.r": r, "seed": seed}, loss=losses[r, seed])
    known = leaderboard.rank(read(folder))
    assert (known.columns, known.has_seeds) == (("adapter.r",), True)
    for setting in known.boards[0].settings:
        own = [losses[setting.values["adapter.r"], seed] for seed in (1, 2, 3)]
        assert setting.mean == pytest.approx(math.fsum(own) / 3)
        assert setting.deviation == pytest.approx(
            math.sqrt(math.fsum((x - statistics.fmean(own)) ** 2 for x in own) / 2)
        )
    assert [table.title for table in tables.tables(known)] == ["Leaderboard", "Settings"]


def test_jobs_evaluated_on_different_rows_or_bases_are_on_different_leaderboards(tmp_path):
    folder = sweep_folder(tmp_path, ["data.max_length=64,128,256"])
    job(folder, 0, ["data.max_length=64"], {"data.max_length": 64}, loss=2.5)
    job(folder, 1, ["data.max_length=128"], {"data.max_length": 128}, loss=2.4, base_loss=BASE_LOSS * (1 + 1e-7))
    job(folder, 2, ["data.max_length=256"], {"data.max_length": 256}, loss=1.0, result={"eval_tokens": 5})
    job(folder, 3, ["data.max_length=512"], {"data.max_length": 512}, loss=1.1, base_loss=BASE_LOSS - 0.5)
    known = leaderboard.rank(read(folder))
    assert names(known.boards[0].ranked) == ["1", "0"]
    assert len(known.boards) == 3
    assert known.best is None
    titles = [table.title for table in tables.tables(known)]
    assert titles == ["Leaderboard 1", "Leaderboard 2", "Leaderboard 3"]
    assert "Do not compare losses of different leaderboards" in next(tables.tables(known)).note


def test_losses_of_classifiers_with_a_head_are_of_rows_and_on_a_leaderboard_of_their_own(tmp_path):
    folder = sweep_folder(tmp_path, ["objective=sft,classification"])
    for number, name in enumerate(("sft", "classification")):
        job(folder, number, [f"objective={name}"], {"objective.name": name}, loss=0.5)
    stored, boards = record(folder), leaderboard.rank(read(folder)).boards
    assert [[job.has_head for job in board.ranked] for board in boards] == [[False], [True]]
    made = [table.columns for table in tables.tables(leaderboard.rank(read(folder)))]
    units = [next(column.unit for column in columns if column.title == "eval loss") for columns in made]
    assert units == ["nats per token", "nats per row"]
    assert stored["jobs"][0]["eval_loss_nats_per_token"] == stored["jobs"][1]["eval_loss_nats_per_row"] == 0.5
    assert stored["jobs"][0]["perplexity"] == math.exp(0.5) and stored["jobs"][1]["perplexity"] is None


def test_settings_that_differ_are_columns_in_the_order_of_declaration(tmp_path):
    folder = sweep_folder(tmp_path, ["optim.lr=1e-4,2e-4"])
    for number, (lr, alpha) in enumerate([(1e-4, 8.0), (2e-4, 16.0)]):
        job(
            folder,
            number,
            [f"optim.lr={lr}"],
            {"optim.lr": lr, "adapter.lora_alpha": alpha, "data.path": "x"},
            loss=2.0,
        )
    known = leaderboard.rank(read(folder))
    assert known.columns == ("adapter.lora_alpha", "optim.lr")
    assert tables.value_text(known.values(known.sweep.jobs[0])["optim.lr"]) == "0.0001"


def test_settings_of_a_job_without_config_are_its_overrides(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=4,8", "adapter=lora,dora"])
    job(folder, 0, ["adapter=lora", "adapter.r=4"], {"adapter.r": 4}, loss=2.0)
    job(folder, 1, ["adapter=dora", "adapter.r=8"])
    known = leaderboard.rank(read(folder))
    assert known.columns == ("adapter.r", "adapter")
    assert [known.values(one)["adapter.r"] for one in known.sweep.jobs] == [4, 8]
    assert [known.values(one)["adapter"] for one in known.sweep.jobs] == ["lora", "dora"]


def test_stopped_jobs_count_as_finished_and_show_the_reason(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1,2"])
    why = "halving at step 20: eval loss 2.41 ranks 3 of 4, 2 continue"
    job(folder, 0, ["adapter.r=1"], {"adapter.r": 1}, loss=2.41, result={"stopped_by": why})
    job(folder, 1, ["adapter.r=2"], {"adapter.r": 2}, loss=2.2, result={"stopped_early": True})
    sweep = report.write(folder, pictures=False).sweep
    assert [one.state for one in sweep.jobs] == [State.stopped] * 2
    assert why in printed(sweep)
    assert why in (folder / "report.md").read_text()
    assert sweep.jobs[1].reason == "patience at step 20"
    assert report.exit_code(sweep) == 0


def test_running_paused_waiting_and_interrupted_jobs_are_distinguished(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1,2,3,4"])
    for number in (0, 1):
        job(folder, number, [f"adapter.r={number}"], {"adapter.r": number + 1}, steps=12)
    loading = job(folder, 2, ["adapter.r=2"], {"adapter.r": 3})
    job(folder, 3, ["adapter.r=3"])
    if results._locked_inodes() is None:
        pytest.skip("this system lists no locks (/proc/locks)")
    with runs.locked(folder / "0"), runs.locked(loading):
        states = [(one.state, one.reason) for one in read(folder).jobs]
        with runs.locked(folder):  # as a sweep does while it runs
            assert [one.state for one in read(folder).jobs][1:] == [State.paused, State.running, State.waiting]
    assert states[0] == (State.running, "step 12 of 40, eval loss 2.5137")
    assert states[1] == (State.interrupted, "step 12 of 40, eval loss 2.5137")
    assert states[2] == (State.running, "loading")
    assert states[3] == (State.waiting, "")
    assert read(folder).jobs[0].state is State.interrupted
    assert report.exit_code(read(folder)) == 3


def test_job_of_a_worker_on_another_machine_is_running_while_its_heartbeat_is_young(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1"])
    path = job(folder, 0, ["adapter.r=1"], {"adapter.r": 1}, steps=12)
    (folder / runs.CHILDREN).mkdir()
    beat = folder / runs.CHILDREN / "1.json"

    def state(host: str) -> State:
        beat.write_text(json.dumps({"folder": str(path), "beat": 7, "doing": "step", "host": host}))
        return read(folder).jobs[0].state

    assert state("another") is State.running
    assert state(platform.node()) is State.interrupted, "its lock is seen here"
    state("another")
    os.utime(beat, (0, 0))
    assert read(folder).jobs[0].state is State.interrupted
    for damaged in ("{", "[]", '{"host": "another"}'):
        beat.write_text(damaged)
        assert read(folder).jobs[0].state is State.interrupted


def test_half_written_line_of_metrics_is_ignored(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1"])
    path = job(folder, 0, ["adapter.r=1"], {"adapter.r": 1}, steps=5) / "metrics.jsonl"
    whole = read(folder).jobs[0].curve
    path.write_text(path.read_text() + '{"step": 6, "lo')
    assert read(folder).jobs[0].curve == whole


DAMAGED = {
    "result.json": ['{"eval_loss": 2.', '{"eval_loss": "good"}', "[]", "\xff", '{"steps": true}', "[" * 10**5],
    "metrics.jsonl": ['{"step": 1, "loss": 2.0}\nnonsense\n', '{"loss": 1.0}\n', "\x00\x00\n", "[1]\n", '"\udcff"\n'],
    "config.yaml": ["adapter: [", "just text", "&a [*a, *a]", "a: !!python/object:os.system x", "\x00"],
    "failure.json": ["{", "[]"],
    "changed.json": ["{", '{"device.x": 1}'],
    "overrides.txt": ["\udcff\n"],
    "check.json": ["{"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_damaged_file_makes_only_its_own_job_unreadable(tmp_path, name, text):
    folder = sweep_folder(tmp_path, ["adapter.r=1,2"])
    job(folder, 0, ["adapter.r=1"], {"adapter.r": 1}, loss=2.0)
    damaged = job(folder, 1, ["adapter.r=2"], {"adapter.r": 2}, steps=3)
    (damaged / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    sweep = read(folder)
    assert [one.state for one in sweep.jobs] == [State.finished, State.unreadable]
    assert sweep.jobs[1].reason
    assert report.exit_code(sweep) == 3
    assert sweep.jobs[1].reason.splitlines()[0] in printed(sweep, 2000)


def test_link_out_of_a_job_and_folder_named_as_a_file_make_jobs_unreadable(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1,2"])
    (tmp_path / "secret.json").write_text('{"eval_loss": 0.1}')
    (job(folder, 0, ["adapter.r=1"], {"adapter.r": 1}) / "result.json").symlink_to(tmp_path / "secret.json")
    (job(folder, 1, ["adapter.r=2"], {"adapter.r": 2}) / "metrics.jsonl").mkdir()
    assert [one.state for one in read(folder).jobs] == [State.unreadable] * 2
    assert "outside of its folder" in read(folder).jobs[0].reason


def test_jobs_are_found_at_any_depth_and_sorted_by_number_or_name(tmp_path):
    numbered, nested = sweep_folder(tmp_path, ["a=1"], "n"), sweep_folder(tmp_path, ["a=1"], "m")
    for number in (10, 9, 2):
        job(numbered, number, ["seed=1"])
    for name in ("b/x", "a/y z", "a/c/d"):
        job(nested, name, ["seed=1"])
    job(nested, ".0.tmp-01234567", ["seed=1"])
    job(nested, "a/y z/checkpoints/inner", ["seed=1"])
    assert names(read(numbered).jobs) == ["2", "9", "10"]
    assert names(read(nested).jobs) == ["a/c/d", "a/y z", "b/x"]


def test_exit_code_is_0_3_or_that_of_the_first_failure(tmp_path):
    folder = sweep_folder(tmp_path, ["seed=1,2"])
    assert report.exit_code(read(folder)) == 0
    job(folder, 0, ["seed=1"], {}, failure=("ResourceError", 7, "no memory"))
    job(folder, 1, ["seed=2"], {}, failure=("DataError", 4, "no rows"))
    assert report.exit_code(read(folder)) == 7
    (folder / "0" / "failure.json").write_text(json.dumps({"kind": "KeyError", "exit_code": "0", "message": "x"}))
    assert report.exit_code(read(folder)) == 1
    job(folder, 2, ["seed=3"], {}, loss=2.0)
    assert report.exit_code(read(folder)) == 3


def test_empty_sweep_has_a_report_and_other_folders_are_refused(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1"])
    assert record(folder)["jobs"] == []
    assert "Leaderboard" in printed(read(folder))
    with pytest.raises(ConfigError, match=r"is not a sweep folder: it has no sweep\.json"):
        report.write(tmp_path, pictures=False)


def test_command_of_a_job_is_quoted_for_a_shell(tmp_path):
    overrides = ["data.system=What's 2+2, and why?", "adapter.lora_alpha=${adapter.r}", "data.path=a b.jsonl", 'x=<b>"']
    folder = sweep_folder(tmp_path, overrides, config_dir=str(tmp_path))
    job(folder, 0, overrides)
    [command] = [one["command"] for one in record(folder)["jobs"]]
    assert shlex.split(command) == ["lora-ft", "train", "--config-dir", str(tmp_path), *overrides]
    assert command in (folder / "report.md").read_text()


def test_report_json_is_sorted_and_names_its_units(twenty):
    stored = record(twenty)
    assert list(stored) == sorted(stored)
    assert {"train_seconds", "adapter_bytes", "eval_loss_nats_per_token"} <= stored["jobs"][0].keys()


def test_markdown_cells_are_escaped(tmp_path):
    folder = sweep_folder(tmp_path, ["data.path=a,b"])
    job(folder, 0, ["data.path=a"], {"data.path": "<script>x|y</script>`*"}, loss=2.0)
    job(folder, 1, ["data.path=b"], {"data.path": "b"}, failure=("ConfigError", 2, "two\nlines | and a bar"))
    report.write(folder, pictures=False)
    lines = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")]
    head = lines[0].count("|")
    board = lines[: lines.index(next(line for line in lines if line.startswith("| job")))]
    assert all(line.replace("\\|", "").count("|") == head for line in board)
    assert "\\<script\\>x\\|y" in board[3]


def test_reports_hold_no_secrets_and_no_control_characters(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "s3cr3t&value<9")
    folder = sweep_folder(tmp_path, ["data.system=s3cr3t&value<9"])
    job(folder, 0, ["data.system=s3cr3t&value<9"], failure=("OSError", 1, "\x1b[31mred s3cr3t&value<9"))
    job(folder, 1, ["a=1"], {"data.system": "s3cr3t&value<9"}, loss=2.0)
    shown = printed(report.write(folder, pictures=False).sweep)
    for text in (shown, *((folder / name).read_text() for name in (report.MARKDOWN, report.HTML, report.JSON))):
        assert "s3cr3t" not in text
        assert "\x1b[31m" not in text
        assert "redacted MY_API_KEY" in text


def test_long_curve_is_thinned_and_keeps_its_ends_and_every_evaluation(tmp_path):
    folder = sweep_folder(tmp_path, ["seed=0"])
    metrics(job(folder, 0, ["seed=0"], {}), 5000, 3.0, 2.0, evaluations=50)
    curve = read(folder).jobs[0].curve
    assert len(curve.losses) < 250
    assert [step for step, _ in curve.eval_losses] == list(range(0, 5001, 100))
    assert (curve.last_step, curve.losses[-1][0]) == (5000, 5000)
    assert curve.stride == math.ceil(5001 / results._POINTS)


def drawn(folder):
    return {chart.name: chart for chart in figures.charts(leaderboard.rank(read(folder)))}


def lines_of(chart):
    [axes] = chart.figure.axes
    return axes.get_lines()


def test_smoothing_is_the_mean_of_a_window():
    flat = [(step, 2.0) for step in range(100)]
    assert [y for _, y in figures.smoothed(flat)] == pytest.approx([2.0] * 100)
    points = [(step, float(step * step % 17)) for step in range(100)]
    half = 100 // 16
    assert figures.smoothed(points)[50][1] == pytest.approx(
        statistics.fmean(y for _, y in points[50 - half : 51 + half])
    )


def test_pareto_front_holds_exactly_the_points_that_no_other_dominates():
    points = [(float(7 * i % 13), float(5 * i % 11)) for i in range(40)]
    front = figures.front(points)
    for x, y in front:
        assert not any(px <= x and py <= y and (px, py) != (x, y) for px, py in points)
    for px, py in points:
        assert any(x <= px and y <= py for x, y in front)


def test_line_of_a_sweep_over_ranks_only_is_labelled(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=2,8"])
    for n, r in enumerate((2, 8)):
        job(folder, n, [f"adapter.r={r}"], {"adapter.r": r}, loss=2.5 - n, steps=5)
    assert drawn(folder)["rank"].means == ("all jobs",)


def test_rank_chart_has_a_line_of_means_over_seeds_for_each_other_setting(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=2,8", "optim.lr=1e-4,1e-3", "seed=1,2"])
    cases = [(r, lr, seed) for r in (2, 8) for lr in (1e-4, 1e-3) for seed in (1, 2)]
    for number, (r, lr, seed) in enumerate(cases):  # alpha follows the rank and makes no line of its own
        settings = {"adapter.r": r, "adapter.lora_alpha": 2.0 * r, "optim.lr": lr, "seed": seed}
        job(folder, number, [f"adapter.r={r}"], settings, loss=r + lr + seed / 8, adapter_bytes=r * 1000)
    chart = drawn(folder)["rank"]
    means = [line for line in lines_of(chart) if line.get_gid() == "mean"]
    assert [(line.get_label(), [*map(tuple, line.get_xydata())]) for line in means] == [
        (f"optim.lr {lr:g}", [(r, pytest.approx(r + lr + 1.5 / 8)) for r in (2, 8)]) for lr in (1e-4, 1e-3)
    ]
    assert chart.means == ("optim.lr 0.0001", "optim.lr 0.001")
    points = {line.get_gid(): tuple(line.get_xydata()[0]) for line in lines_of(chart) if line.get_gid() != "mean"}
    assert points == {f"job-{n}": (r, r + lr + seed / 8) for n, (r, lr, seed) in enumerate(cases)}
    assert chart.figure.axes[0].get_xscale() == "log"


def test_charts_without_anything_to_compare_are_omitted(tmp_path):
    folder = sweep_folder(tmp_path, ["seed=0"])
    assert drawn(folder) == {}
    job(folder, 0, ["seed=0"], {}, loss=2.0)
    assert [*drawn(folder)] == ["train_loss", "eval_loss"]


def test_diverged_run_is_cut_off_and_does_not_flatten_the_others(tmp_path):
    folder = sweep_folder(tmp_path, ["seed=0,1,2,3"])
    for number in range(3):
        job(folder, number, [f"seed={number}"], {"seed": number}, loss=2.25)
    assert "cut off" not in drawn(folder)["eval_loss"].note
    metrics(job(folder, 3, ["seed=3"], {"seed": 3}), 2, 3.0, 1e6, evaluations=1)
    chart = drawn(folder)["eval_loss"]
    low, high = chart.figure.axes[0].get_ylim()
    assert "cut off" in chart.note and low < 2.25 and 3.25 < high < 10


@pytest.mark.parametrize("number", ["-1e308", "1" + "0" * 400, "NaN"])
def test_extreme_numbers_do_not_stop_a_report(tmp_path, number):
    folder = sweep_folder(tmp_path, ["seed=0,1"])
    job(folder, 0, ["seed=0"], {"seed": 0}, loss=2.0)
    odd = job(folder, 1, ["seed=1"], {"seed": 1}, loss=2.1)
    line = f'{{"step": 1, "loss": {number}, "eval_loss": {number}}}\n'
    (odd / "metrics.jsonl").write_text(f'{{"step": 0, "eval_loss": 3.0}}\n{line}')
    assert len(drawn(folder)["eval_loss"].svg) < 20_000
    steps = "".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in (1, "1" + "0" * 400))
    (odd / "metrics.jsonl").write_text(steps)
    report.write(folder, pictures=True)


def test_charts_take_any_text_as_a_setting(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=2,4"])
    for number, text in enumerate(["$\\frac{x$ <b>", "你好\n😀", "_hidden", ""] * 2):
        settings = {"adapter.r": 2 + 2 * (number // 4), "data.system": text}
        job(folder, number, [f"adapter.r={number}"], settings, loss=2.0 + number / 10)
    assert len(drawn(folder)["rank"].means) == 4
    report.write(folder, pictures=True)


def test_same_files_give_the_same_bytes_of_all_reports(twenty):
    first = {path: path.read_bytes() for path in report.write(twenty, pictures=True).paths}
    assert {path: path.read_bytes() for path in report.write(twenty, pictures=True).paths} == first


def test_png_files_are_written_and_linked(twenty):
    paths = report.write(twenty, pictures=False).paths
    assert [path.name for path in paths] == ["report.md", "report.html", "report.json"]
    assert ".png" not in (twenty / "report.md").read_text() and not list(twenty.glob("*.png"))
    paths = report.write(twenty, pictures=True).paths
    names = ["train_loss", "eval_loss", "rank", "size"]
    assert [path.name for path in paths[3:]] == [f"{name}.png" for name in names]
    for name in names:
        assert (twenty / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in (twenty / "report.md").read_text()


@pytest.mark.parametrize("width", [60, 200])
def test_terminal_table_drops_columns_and_keeps_numbers_whole(width, twenty):
    sweep = read(twenty)
    [board] = leaderboard.rank(sweep).boards
    lines = printed(sweep, width).splitlines()
    assert max(map(len, lines)) <= width
    begin = next(i for i, line in enumerate(lines) if line.lstrip().startswith("#"))
    shown = [line.split() for line in lines[begin + 3 : begin + 3 + 20]]
    assert [cells[1] for cells in shown[:12]] == names(board.ranked)
    assert [cells[-1] for cells in shown] == ["finished"] * 12 + ["failed"] * 8
    assert all(f"{job.figures.eval_loss:.4f}" in cells for job, cells in zip(board.ranked, shown, strict=False))
    assert ("parameters" in lines[begin]) == (width >= 100)
