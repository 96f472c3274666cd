"""report.html: complete in one file, escaped, with its own script allowed and no other; and seen by a real browser."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from sweep_folders import job, sweep_folder

from lora_ft.cli import entry
from lora_ft.sweeps import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EVIL = "<script>alert(1)</script>\"'&|"


def call(*words):
    with pytest.raises(SystemExit) as ended:
        entry.run("report", list(words))
    return int(ended.value.code or 0)


class Elements(HTMLParser):
    """All elements of a page with their attributes, and whether each was closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def page_of(folder):
    report.write(folder, pictures=False)
    text = (folder / "report.html").read_text("utf-8")
    return text, Elements(text)


@pytest.fixture
def mixed(tmp_path):
    """Finished, stopped, failed, interrupted and waiting jobs, of two ranks, two rates and two seeds."""
    folder = sweep_folder(tmp_path, ["adapter.r=2,8", "optim.lr=1e-4,1e-3", "seed=1,2"])
    cases = [(r, lr, seed) for r in (2, 8) for lr in (1e-4, 1e-3) for seed in (1, 2)]
    for number, (r, lr, seed) in enumerate(cases):
        words = [f"adapter.r={r}", f"optim.lr={lr:g}", f"seed={seed}"]
        settings = {"adapter.r": r, "optim.lr": lr, "seed": seed}
        loss = 2.5 - number / 100
        options = {
            3: {"failure": ("NonFiniteError", 8, EVIL)},
            4: {"steps": 90},
            6: {},
            7: {"loss": loss, "result": {"stopped_by": "halving at step 20: 3rd of 4, 2 go on"}},
        }.get(number, {"loss": loss, "steps": 200})
        job(folder, number, words, settings, adapter_bytes=1000 * r, **options)
    return folder


def test_the_page_is_whole_and_asks_for_nothing_outside_of_itself(mixed):
    text, page = page_of(mixed)
    assert page.open == []
    assert not re.search(
        r"https?://|//\w|@import|url\((?!#area-)", text.partition("<main>")[2].partition("<script>")[0]
    )
    assert all(not attributes.keys() & {"src", "srcset", "style"} for _, attributes in page.found)
    assert [a["href"] for _, a in page.found if "href" in a and not a["href"].startswith("#")] == []
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("use")} <= set(ids)


def test_the_policy_holds_the_hashes_of_the_style_and_the_script_and_allows_no_others(mixed):
    text, page = page_of(mixed)
    [policy] = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
    assert "unsafe" not in policy


def test_what_a_setting_a_path_a_word_or_a_message_holds_is_text(tmp_path):
    folder = sweep_folder(tmp_path, [f"data.system={EVIL}"], name="s<script>")
    for number in (0, 1):
        settings = {"data.system": f"{EVIL}{number}", "adapter.r": 2 + number}
        job(folder, f"<script>{number}", [f"data.system={EVIL}{number}"], settings, loss=2.0 + number)
    job(folder, "x", ["adapter.r=1"], {"data.path": EVIL}, failure=(EVIL, 4, EVIL))
    text, page = page_of(folder)
    assert len(page.of("script")) == 1
    assert "alert" not in text.partition("<script>")[2]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;|" in text


def test_each_job_has_a_row_with_its_command_and_the_charts_show_the_jobs_that_have_points(mixed):
    text, page = page_of(mixed)
    assert sum(a.get("class") == "cmd" for a in page.of("code")) == 8
    assert "lora-ft train adapter.r=8 optim.lr=0.001 seed=2" in text
    charts = re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)
    shown = [set(re.findall(r'data-job="(\d)"', chart)) for chart in charts]
    assert shown == [set("012457"), set("012457"), set("01257"), set("01257")]
    assert "nan" not in "".join(charts).lower()


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_sweep_of_no_or_one_job_has_a_page(tmp_path, jobs):
    folder = sweep_folder(tmp_path, ["adapter.r=1"])
    for number in range(jobs):
        job(folder, number, ["adapter.r=1"], {"adapter.r": 1}, loss=2.0)
    text, page = page_of(folder)
    assert page.open == []
    assert ("No job has begun." in text) is (jobs == 0)


def test_the_command_writes_the_report_and_says_where_and_what_a_folder_lacks_that_is_no_sweep(mixed, capsys):
    assert call(f"sweep={mixed}") == 0
    told = capsys.readouterr().out
    for name in ("report.md", "report.html", "report.json", "rank.png"):
        assert str(mixed / name) in told
        assert (mixed / name).is_file()
    assert "halving at step 20" in told
    assert call(f"sweep={mixed / '0'}") == 2
    assert "is not a sweep folder: it has no sweep.json" in capsys.readouterr().err
    assert call() == 2


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH: install one to see the page in a browser")
def test_a_browser_shows_the_page_without_an_error_and_its_script_sorts_and_marks(mixed, tmp_path):
    page_of(mixed)
    path = mixed / "report.html"
    text = path.read_text("utf-8")
    probe = """
    document.querySelectorAll("th button")[4].click();
    document.querySelector('svg.chart [data-job="1"] .reach').dispatchEvent(
      new PointerEvent("pointerover", {bubbles: true}));
    const out = {
      order: [...document.querySelectorAll("tbody")[0].rows].map(r => r.cells[4].textContent),
      hot: [...document.querySelectorAll(".hot")].map(e => e.tagName.toLowerCase()),
      wide: document.documentElement.scrollWidth > innerWidth,
      points: [...document.querySelectorAll("svg.chart")].map(s => s.querySelectorAll("path.dot, path.line").length),
    };
    console.error("FOUND " + JSON.stringify(out));
    """
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ")
    for width in (500, 1600):  # a headless window is never narrower than 500
        copy = mixed / f"probe-{width}.html"
        copy.write_text(text.replace("</body>", f"<script>{probe}</script></body>"), "utf-8")
        console = _console(copy, width, tmp_path)
        [found] = [line for line in console if "FOUND" in line]
        assert [line for line in console if line is not found] == []
        told = found.replace('\\"', '"')
        assert '"wide":false' in told
        assert {"tr", "li", "g"} <= set(re.findall(r'"(\w+)"', told.partition('"hot":')[2].partition("]")[0]))
        seeds = re.findall(r'"(\d?)"', told.partition('"order":')[2].partition("]")[0])
        assert seeds[0] == "" and seeds[1:] == sorted(seeds[1:]) and len(seeds) == 9
        counts = told.partition('"points":[')[2].partition("]")[0].split(",")
        assert len(counts) == 4 and all(int(count) >= 5 for count in counts)


def _console(path, width, tmp_path):
    """What a headless browser writes to the console of a page."""
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0",
         f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]
