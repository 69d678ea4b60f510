// Parts of the page, and how numbers, times and states are written. Texts are put in as text, never
// as HTML.

export const words = JSON.parse(document.body.dataset.words);
export const settings = JSON.parse(document.body.dataset.settings ?? "{}");
const language = document.documentElement.lang;

// A state is told by its word and its mark; the colour only repeats them.
const MARKS = {
  running: "▶", done: "✓", failed: "✗", interrupted: "‖", killed: "■", damaged: "!", gone: "?",
};

export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((each) => each !== null && each !== undefined));
  return made;
}

const sayings = new Map();

// Shows what went wrong; each kind of message stays until it is taken back.
export function tell(text, kind = "action") {
  if ((sayings.get(kind) ?? "") === text) return;
  sayings.set(kind, text);
  document.getElementById("told").textContent = [...sayings.values()].filter(Boolean).join(" ");
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const large = Math.abs(value) >= 1e4 || Number.isInteger(value);
  const small = value !== 0 && Math.abs(value) < 1e-3;
  const options = large ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits };
  return new Intl.NumberFormat(language, small ? { ...options, notation: "scientific" } : options)
    .format(value);
}

export function percent(value) {
  if (value === null || value === undefined) return "–";
  return new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: 1 })
    .format(value);
}

// A number and its unit, which no line parts.
function unit(text, name) {
  return `${text}\u00a0${name}`;
}

export function gib(bytes) {
  return bytes === null || bytes === undefined ? "–" : unit(number(bytes / 2 ** 30, 3), "GiB");
}

export function time(text) {
  const when = new Date(text ?? "");
  if (Number.isNaN(when.getTime())) return "–";
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(when);
}

export function minutes(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return unit(number(Math.round(seconds)), "s");
  const parts = seconds < 5400 ? [seconds / 60, "min"] : [seconds / 3600, "h"];
  return unit(number(parts[0], 2), parts[1]);
}

// A figure's name in words; one that isn't known keeps its own.
export function called(name) {
  return words[`figure_${name}`] ?? name;
}

// A figure with its unit.
export function figure(name, value) {
  if (settings.shares.includes(name)) return percent(value);
  if (name.endsWith("_bytes")) return gib(value);
  if (!name.endsWith("_seconds") || value === null || value === undefined) return number(value);
  return value < 90 ? unit(number(value), "s") : minutes(value);
}

export function state(name) {
  const text = words[`state_${name}`] ?? name;
  return make("span", { class: `state ${name}` },
    make("span", { "aria-hidden": "true" }, MARKS[name] ?? "·"), ` ${text}`);
}

export function heading(level, text) {
  return make(`h${level}`, {}, text);
}

// A text whose long names and paths may be broken behind _ and /, and at no other letter.
function breakable(text) {
  return String(text).split(/(?<=[_/])(?=\w)/).flatMap((each, index) =>
    (index ? [make("wbr"), each] : [each]));
}

// A table that scrolls by itself where it is too wide, and that the keyboard can scroll.
export function table(caption, columns, rows) {
  const head = make("tr", {}, ...columns.map((each) =>
    make("th", { scope: "col" }, ...breakable(each))));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, place) =>
    make(place ? "td" : "th", place ? {} : { scope: "row" }, ...breakable(cell ?? "–")))));
  return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {}, make("caption", {}, caption),
      make("thead", {}, head), make("tbody", {}, ...body)));
}

export function facts(pairs) {
  const kept = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make("dl", { class: "facts" }, ...kept.flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, value)]));
}

export function folded(summary, ...children) {
  return make("details", {}, make("summary", {}, summary), ...children);
}
