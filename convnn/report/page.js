"use strict";
// What a report's page has beyond its text and pictures: sorting, values at points, light or dark. Without it nothing
// is missing: the tables are in their order, and the points' <title>s show where the pointer is.

// ------------------------------------------------------------------------------------------------- tables
const UNITS = { ms: 1e-3, s: 1, min: 60, h: 3600, B: 1, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
const NUMBER = /^[<>]?\s*([+-]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?:\s*([A-Za-z]+))?(?=$|[\s%×(±[;])/;

// Numbers come before text, and empty cells last in both directions.
function sortKey(cell) {
  const text = cell.textContent.trim().replace("−", "-");
  if (text === "" || text === "–") return { rank: 2 };
  const [, digits, unit] = NUMBER.exec(text) ?? [];
  if (digits === undefined) return { rank: 1, text };
  return { rank: 0, number: Number(digits.replaceAll(",", "")) * (UNITS[unit] ?? 1) };
}

function compare(a, b, sign) {
  if (a.rank !== b.rank) return a.rank - b.rank;
  if (a.rank === 0) return sign * (a.number - b.number);
  return a.rank === 1 ? sign * a.text.localeCompare(b.text, "en", { numeric: true }) : 0;
}

function sortBy(heading) {
  const body = heading.closest("table").tBodies[0];
  const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const rows = [...body.rows].map((row) => [sortKey(row.cells[heading.cellIndex]), row]);
  rows.sort(([a], [b]) => compare(a, b, order === "ascending" ? 1 : -1)); // stable: equal rows keep their order
  for (const [, row] of rows) body.append(row);
}

for (const heading of document.querySelectorAll("main > section:not(#answer) th")) {
  if (heading.closest("table").tBodies[0].rows.length < 2) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  button.addEventListener("click", () => sortBy(heading));
  heading.append(button);
}

// ------------------------------------------------------------------------------------------------- pictures
const REACH = 30; // pixels around the pointer in which a point is found
const SAME = 3; // pixels within which points are told together
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true"); // a reader of the screen has the points' labels
document.body.append(tip);

function middle(point) {
  const box = point.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
}

function hide() {
  tip.hidden = true;
  for (const point of document.querySelectorAll("circle.near")) point.classList.remove("near");
}

function show(point, points) {
  hide();
  const [x, y] = middle(point);
  const here = points.filter((other) => {
    const [left, top] = middle(other);
    return Math.hypot(left - x, top - y) <= SAME;
  });
  const more = here.length > 6 ? [`and ${here.length - 6} more here`] : [];
  tip.textContent = [...here.slice(0, 6).map((one) => one.getAttribute("aria-label")), ...more].join("\n");
  tip.hidden = false;
  point.classList.add("near");
  const { width, height } = tip.getBoundingClientRect();
  const room = document.documentElement.clientWidth - width - 4;
  tip.style.left = `${Math.max(4, Math.min(x - width / 2, room))}px`;
  tip.style.top = `${y - height - 12 < 4 ? y + 14 : y - height - 12}px`;
}

let dismissed = false; // by Escape, until another point has the focus

// What is scrolled away says nothing; a point that the keyboard brought into view goes on.
function follow() {
  const point = document.activeElement;
  if (point?.matches("circle") && !dismissed) show(point, [...point.parentNode.children]);
  else hide();
}

function nearest(points, x, y) {
  let [best, least] = [null, REACH];
  for (const point of points) {
    const [left, top] = middle(point);
    const distance = Math.hypot(left - x, top - y);
    if (distance < least) [best, least] = [point, distance];
  }
  return best;
}

// One point of a picture is reached by Tab, the others by the arrows.
function step(points, event) {
  const at = points.indexOf(event.target);
  const last = points.length - 1;
  const places = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
  if (event.key === "Escape") {
    dismissed = true;
    hide();
  }
  if (at < 0 || !(event.key in places)) return;
  event.preventDefault();
  const next = points[Math.max(0, Math.min(places[event.key], last))];
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

for (const layer of document.querySelectorAll(".plot svg")) {
  const points = [...layer.querySelectorAll("circle")];
  for (const point of points) {
    point.setAttribute("aria-label", point.textContent);
    point.setAttribute("role", "img");
    point.setAttribute("tabindex", point === points[0] ? 0 : -1);
    point.replaceChildren(); // the browser's own tip would stand beside ours
  }
  const pointAt = (event) => {
    const point = nearest(points, event.clientX, event.clientY);
    if (point) show(point, points);
    else hide();
  };
  layer.addEventListener("pointermove", pointAt);
  layer.addEventListener("pointerdown", pointAt);
  layer.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  layer.addEventListener("focusin", (event) => {
    dismissed = false;
    if (points.includes(event.target)) show(event.target, points); // browsers stop at the picture itself too
  });
  layer.addEventListener("focusout", hide);
  layer.addEventListener("keydown", (event) => step(points, event));
}
document.addEventListener("pointerdown", (event) => event.target.closest(".plot") || hide());
document.addEventListener("scroll", follow, { capture: true, passive: true });

// ------------------------------------------------------------------------------------------------- light or dark
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const memory = {
  get() {
    try {
      return localStorage.getItem("convnn-theme");
    } catch {
      return null; // a browser may keep nothing for files
    }
  },
  set(theme) {
    try {
      localStorage.setItem("convnn-theme", theme);
    } catch {
      // it then holds for this page alone
    }
  },
};
const toggle = document.createElement("button");
toggle.id = "theme";
toggle.type = "button";

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
}

function nameToggle() {
  toggle.textContent = isDark() ? "Light" : "Dark";
  toggle.setAttribute("aria-label", `${toggle.textContent} colours`);
}

if (["light", "dark"].includes(memory.get())) root.dataset.theme = memory.get();
toggle.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  memory.set(root.dataset.theme);
  nameToggle();
});
system.addEventListener("change", nameToggle);
nameToggle();
document.querySelector("header").append(toggle);
