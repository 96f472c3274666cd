"""report.html: self-contained, escaped, with a policy that allows only its own script; checked in a browser."""

import base64
import hashlib
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from sweep_folders import job, metrics, sweep_folder

from lora_ft.cli import entry
from lora_ft.evaluation import charts
from lora_ft.sweeps import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EVIL = "<script>alert(1)</script>\"'&|"


def call(*overrides):
    with pytest.raises(SystemExit) as ended:
        entry.run("report", list(overrides))
    return int(ended.value.code or 0)


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.parts = tag, attributes, parent, []

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    @property
    def all(self):
        children = [part for part in self.parts if isinstance(part, Element)]
        return [one for child in children for one in (child, *child.all)]

    def of(self, tag, **attributes):
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [one for one in self.all if one.tag == tag and wanted.items() <= one.attributes.items()]


class Page(HTMLParser):
    """A page as a tree of elements; each must be closed."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.root = self.open = Element("", {}, None)
        self.feed(source)
        self.close()
        assert self.open is self.root
        self.of, self.all = self.root.of, self.root.all

    def handle_startendtag(self, tag, attributes):
        self.open.parts.append(Element(tag, dict(attributes), self.open))

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.open = self.open.parts[-1]

    def handle_endtag(self, tag):
        assert self.open.tag == tag
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.parts.append(data)

    def charts(self):
        return {chart.attributes["aria-label"]: chart for chart in self.of("svg", _class="chart")}


def page_of(folder):
    report.write(folder, pictures=False)
    return Page((folder / "report.html").read_text("utf-8"))


@pytest.fixture
def mixed(tmp_path):
    """Finished, stopped, failed, interrupted and waiting jobs, of two ranks, two rates and two seeds."""
    folder = sweep_folder(tmp_path, ["adapter.r=2,8", "optim.lr=1e-4,1e-3", "seed=1,2"])
    cases = [(r, lr, seed) for r in (2, 8) for lr in (1e-4, 1e-3) for seed in (1, 2)]
    for number, (r, lr, seed) in enumerate(cases):
        overrides = [f"adapter.r={r}", f"optim.lr={lr:g}", f"seed={seed}"]
        settings = {"adapter.r": r, "optim.lr": lr, "seed": seed}
        loss = 2.5 - number / 100
        options = {
            3: {"failure": ("NonFiniteError", 8, EVIL)},
            4: {"steps": 90},
            6: {},
            7: {"loss": loss, "result": {"stopped_by": "halving at step 20: eval loss 2.43 ranks 3 of 4, 2 continue"}},
        }.get(number, {"loss": loss, "steps": 200})
        job(folder, number, overrides, settings, adapter_bytes=1000 * r, **options)
    return folder


def test_page_refers_to_nothing_outside_of_itself(mixed):
    page = page_of(mixed)
    [main] = page.of("main")
    for one in main.all:
        assert not any(re.search(r"//|@import|url\((?!#)", value) for value in one.attributes.values() if value)
    assert all(not one.attributes.keys() & {"src", "srcset", "style"} for one in page.all)
    ids = [one.attributes["id"] for one in page.all if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    links = [one.attributes["href"] for one in page.all if "href" in one.attributes]
    links += [one.attributes["clip-path"][4:-1] for one in page.all if "clip-path" in one.attributes]
    assert len(links) > 50 and {link for link in links} <= {f"#{name}" for name in ids}


def test_policy_allows_only_the_hashes_of_the_own_style_and_script(mixed):
    page = page_of(mixed)
    [policy] = [one.attributes["content"] for one in page.of("meta", http_equiv="Content-Security-Policy")]
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in (("style", "style-src"), ("script", "script-src")):
        [inline] = page.of(tag)
        digest = base64.b64encode(hashlib.sha256(inline.text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
    assert "unsafe" not in policy


def test_settings_paths_overrides_and_messages_are_escaped(tmp_path):
    folder = sweep_folder(tmp_path, [f"data.system={EVIL}"], name="s<script>")
    for number in (0, 1):
        settings = {"data.system": f"{EVIL}{number}", "adapter.r": 2 + number}
        job(folder, f"<script>{number}", [f"data.system={EVIL}{number}"], settings, loss=2.0 + number)
    job(folder, "x", ["adapter.r=1"], {"data.path": EVIL}, failure=(EVIL, 4, EVIL))
    page = page_of(folder)
    assert len(page.of("script")) == 1
    assert "alert" not in page.of("script")[0].text
    assert {one.tag for one in page.of("main")[0].all}.isdisjoint({"script", "style", "img", "iframe"})
    assert [one.text for one in page.of("h1")] == ["Sweep s<script>"]
    assert EVIL in [one.text for one in page.of("td")]
    titles = [one.text for one in page.charts()["Train loss"].of("title")]
    assert any(f"data.system {EVIL}1" in title for title in titles)
    assert any(f"data.system={EVIL}0" in shlex.split(one.text)[-1] for one in page.of("code", _class="cmd"))


def test_each_job_has_a_row_with_its_command_and_charts_show_jobs_with_points(mixed):
    page = page_of(mixed)
    commands = [one.text for one in page.of("code", _class="cmd")]
    assert len(commands) == 8 and "lora-ft train adapter.r=8 optim.lr=0.001 seed=2" in commands
    shown = {
        name: {group.attributes["data-job"] for group in chart.of("g", _class="run")}
        for name, chart in page.charts().items()
    }
    ranked = set("01257")
    assert shown == {
        "Train loss": set("012457"),
        "Eval loss": set("012457"),
        "Eval loss against rank": ranked,
        "Eval loss against adapter size": ranked,
    }
    for chart in page.charts().values():
        for one in chart.all:
            numbers = re.findall(r"nan|inf", " ".join(one.attributes.get(name, "") for name in ("d", "x", "y")))
            assert numbers == []


def test_charts_use_the_colour_variables_of_the_style(mixed):
    page = page_of(mixed)
    [style] = page.of("style")
    light, dark = (dict(re.findall(r"(--\w+): (#\w+);", part)) for part in style.text.split("@media", 2)[:2])
    assert [light[f"--c{number}"] for number in range(6)] == [*charts.HUES]
    used = {value for chart in page.charts().values() for one in chart.all for name, value in one.attributes.items()
            if name in ("fill", "stroke") and value != "none"}  # fmt: skip
    names = {found[1] for value in used if (found := re.fullmatch(r"var\((--\w+)\)", value))}
    assert len(names) == len(used) and names <= dark.keys() & light.keys()


def test_curve_of_one_point_shows_its_point(tmp_path):
    folder = sweep_folder(tmp_path, ["adapter.r=1"])
    metrics(job(folder, 0, ["adapter.r=1"], {"adapter.r": 1}), 1, 3.0, 2.0)
    [group] = [one for one in page_of(folder).charts()["Train loss"].of("g", _class="run") if one.of("use")]
    assert len(group.of("use")) == 1


@pytest.mark.parametrize("jobs", [0, 1])
def test_sweep_of_no_or_one_job_has_a_page(tmp_path, jobs):
    folder = sweep_folder(tmp_path, ["adapter.r=1"])
    for number in range(jobs):
        job(folder, number, ["adapter.r=1"], {"adapter.r": 1}, loss=2.0)
    page = page_of(folder)
    assert ("No job has begun." in page.of("main")[0].text) is (jobs == 0)
    assert len(page.charts()) == 2 * jobs


def test_report_command_prints_the_paths_and_refuses_other_folders(mixed, capsys):
    assert call(f"sweep={mixed}") == 0
    output = capsys.readouterr().out
    for name in ("report.md", "report.html", "report.json", "rank.png"):
        assert str(mixed / name) in output
        assert (mixed / name).is_file()
    assert "halving at step 20" in output
    assert call(f"sweep={mixed / '0'}") == 2
    assert "is not a sweep folder: it has no sweep.json" in capsys.readouterr().err
    assert call() == 2


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH: install one to see the page in a browser")
def test_browser_runs_the_script_without_errors(mixed, tmp_path):
    page_of(mixed)
    path = mixed / "report.html"
    text = path.read_text("utf-8")
    probe = """
    document.querySelectorAll("th button")[4].click();
    document.querySelector('svg.chart [data-job="1"] path').dispatchEvent(
      new PointerEvent("pointerover", {bubbles: true}));
    const out = {
      order: [...document.querySelectorAll("tbody")[0].rows].map(r => r.cells[4].textContent),
      hot: [...document.querySelectorAll(".hot")].map(e => e.tagName.toLowerCase()),
      wide: document.documentElement.scrollWidth > innerWidth,
      points: [...document.querySelectorAll("svg.chart")].map(s => s.querySelectorAll("g.run").length),
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
        output = found.replace('\\"', '"')
        assert '"wide":false' in output
        assert {"tr", "li", "g"} <= set(re.findall(r'"(\w+)"', output.partition('"hot":')[2].partition("]")[0]))
        seeds = re.findall(r'"(\d?)"', output.partition('"order":')[2].partition("]")[0])
        assert seeds[0] == "" and seeds[1:] == sorted(seeds[1:]) and len(seeds) == 9
        counts = output.partition('"points":[')[2].partition("]")[0].split(",")
        assert len(counts) == 4 and all(int(count) >= 5 for count in counts)


def _console(path, width, tmp_path):
    """The lines that a headless browser writes to the console of a page."""
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0",
         f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]
