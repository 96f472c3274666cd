"""Look and behaviour of the report page: one style sheet and one script, both inline and named by hash in its policy.

Six hues that the colour-blind tell apart (after Okabe and Ito, 2008), each with a marker of its own, times four dashes;
darker ones on white, lighter ones on dark. Without the script the page is complete; it adds sorting, copying, hovering.
"""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fff; --panel: #f7f8fa; --ink: #1c2128; --soft: #5c6570; --line: #e3e6ea; --accent: #2f5fd0; --wash: #eef3fe;
  --bad: #b3261e;
  --c0: #0067a5; --c1: #d35400; --c2: #00866a; --c3: #a83f8f; --c4: #b07d00; --c5: #3b9edb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --panel: #1b1f26; --ink: #e6e9ee; --soft: #9aa4b1; --line: #2c323b; --accent: #8fb0ff;
    --wash: #1e2a44; --bad: #ff9d94;
    --c0: #5aa9f2; --c1: #ff8d4d; --c2: #35c79c; --c3: #e58fcb; --c4: #ecc04a; --c5: #a5dcff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1416px; margin: 0 auto; padding: 40px 32px 72px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 56px 0 6px; letter-spacing: -.005em; }
h3 { font-size: 15px; margin: 0 0 8px; }
p { margin: 0; max-width: 100ch; }
.note, .path { color: var(--soft); font-size: 13.5px; }
code { font: .92em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.command { display: block; margin-top: 12px; padding: 10px 14px; background: var(--panel); border-radius: 8px; }
.command, .cmd { user-select: all; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); gap: 16px;
  margin: 32px 0 0; padding: 0; }
.tiles div { background: var(--panel); border-radius: 10px; padding: 16px 20px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 2px 0 0; font-size: 24px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); }
.tiles .best dd { color: var(--accent); }
.tiles .best small { color: var(--soft); }

.scroll { overflow-x: auto; margin-top: 14px; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
th { font-weight: 500; color: var(--soft); background: var(--panel); vertical-align: bottom; }
th small { display: block; font-size: 12px; opacity: .85; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, .copy:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px;
  border-radius: 3px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
th[aria-sort] { color: var(--accent); }
.n { text-align: right; }
td.wrap { white-space: pre-wrap; min-width: 15em; max-width: 34em; }
td.status { max-width: 16em; overflow: hidden; text-overflow: ellipsis; }
td.value { max-width: 22em; white-space: normal; min-width: 3em; }
tr.base td { color: var(--soft); }
tr.first td { background: var(--wash); font-weight: 600; }
tr.out td { color: var(--soft); }
tr.out td.failed { color: var(--bad); }
tr.hot td { background: var(--wash); }
td .cmd { display: inline-block; max-width: 13em; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom;
  color: var(--soft); font-weight: 400; }
.copy { display: none; font: inherit; font-weight: 400; font-size: 12.5px; margin-right: 8px; padding: 1px 9px;
  color: var(--accent); background: none; border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
.copy:hover { border-color: var(--accent); }
.live .copy { display: inline-block; }

.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 4px 16px;
  margin: 14px 0 0; padding: 0; list-style: none;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.legend li { display: flex; align-items: baseline; padding: 1px 6px 1px 2px; border-radius: 5px; }
.swatch { flex: none; width: 30px; height: 14px; vertical-align: -2px; margin-right: 7px; overflow: visible; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, max(380px, 40%)), 1fr));
  gap: 44px 48px; margin-top: 28px; }
figure { margin: 0; min-width: 0; max-width: 780px; }
figure .legend { margin-top: 4px; font-size: 12.5px; color: var(--soft); }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .x { text-anchor: middle; } .chart .y { text-anchor: end; }
.grid { stroke: var(--line); } .axis, .tick { stroke: var(--soft); opacity: .6; }
.line, .raw, .mean, .reach, .grid, .axis, .tick, .ring { fill: none; }
.line { stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke: var(--c); stroke-width: 1; opacity: .16; }
.reach { stroke: transparent; stroke-width: 12; pointer-events: stroke; }
.dot { fill: var(--c); stroke: var(--c); stroke-width: 1.2; }
.mean { stroke: var(--soft); stroke-width: 1.5; }
.m1 { stroke-dasharray: 7 4; } .m2 { stroke-dasharray: 2 4; } .m3 { stroke-dasharray: 9 4 2 4; }
.ring { stroke: var(--accent); stroke-width: 1.6; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.d1 .line { stroke-dasharray: 7 4; } .d2 .line { stroke-dasharray: 1.5 4; } .d3 .line { stroke-dasharray: 9 4 2 4; }
.d1 .dot, .d3 .dot { fill: var(--paper); }
.hovering g.run { opacity: .18; } .hovering g.hot { opacity: 1; }
.hot .line { stroke-width: 3; } .hot .raw { opacity: .4; }
.legend .hot { background: var(--wash); }
footer { margin-top: 64px; color: var(--soft); font-size: 13px; }

@media (max-width: 560px) {
  main { padding: 24px 16px 48px; } h1 { font-size: 23px; } h2 { margin-top: 44px; }
  .chart text { font-size: 14.5px; } th, td { padding: 8px 10px; }
}
@media (min-width: 1000px) { .chart text { font-size: 11px; } }
@media (min-width: 1300px) { .chart text { font-size: 9.5px; } }
@media print { main { padding: 0; max-width: none; } .copy { display: none !important; } }
"""

JS = """
"use strict";
document.documentElement.classList.add("live");
const marked = job => document.querySelectorAll(`[data-job="${job}"]`);
let hot = null;
function show(job) {
  if (job === hot) return;
  if (hot !== null) marked(hot).forEach(e => e.classList.remove("hot"));
  hot = job;
  if (hot !== null) marked(hot).forEach(e => e.classList.add("hot"));
  document.documentElement.classList.toggle("hovering", hot !== null);
}
const jobAt = target => target.closest?.("[data-job]")?.dataset.job ?? null;
document.addEventListener("pointerover", event => show(jobAt(event.target)));
document.addEventListener("focusin", event => show(jobAt(event.target)));
document.documentElement.addEventListener("pointerleave", () => show(null));

function sort(header) {
  const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
  const up = header.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => {
    const cell = row.cells[column];
    return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent.trim();
  };
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const both = typeof x === "number" && typeof y === "number";
    const order = both ? x - y : String(x).localeCompare(String(y), "en", {numeric: true});
    return up ? order : -order;
  };
  const rows = [...body.rows].filter(row => !row.classList.contains("base"));
  rows.sort(compare).forEach(row => body.append(row));
}

async function copy(button) {
  const text = button.nextElementSibling;
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    getSelection().selectAllChildren(text);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}
document.addEventListener("click", event => {
  const button = event.target.closest?.("button");
  if (!button) return;
  if (button.classList.contains("copy")) copy(button); else sort(button.closest("th"));
});
"""
