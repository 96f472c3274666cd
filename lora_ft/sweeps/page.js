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
