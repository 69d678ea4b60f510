// Curves, drawn by uPlot. Each line has a pattern of its own and a name; what it shows is also said
// in words, at the point that the arrow keys or the mouse choose, and in a table.

import uPlot from "./uplot/uPlot.esm.js";
import { folded, make, number, table, words } from "./parts.js";

const PATTERNS = [
  { dash: [], points: false, sample: "———" },
  { dash: [8, 5], points: true, sample: "–◆–" },
  { dash: [2, 4], points: false, sample: "·····" },
];
const COLOURS = ["--first", "--second", "--third"];
// Points of a line beyond which it is asked for anew, thinned by the server.
const MOST_POINTS = 4000;
const TABLE_ROWS = 12;

// The width that an axis's labels take; a character of the axes' font has at most 8 pixels.
function room(_, labels) {
  return 20 + 8 * Math.max(3, ...(labels ?? []).map((each) => each.length));
}

// A canvas wants the colour itself, and not what makes it of the scheme.
function colour(name) {
  const probe = make("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// A chart of one or more figures over the steps.
//   lines: [{ name: of the figure, label: in words }]
//   show: writes a value
export class Chart {
  constructor(title, lines, show = number) {
    this.title = title;
    this.lines = lines;
    this.show = show;
    this.series = lines.map(() => [[], []]);
    this.place = null;
    const samples = lines.map((line, index) => make("span", { class: "sample" },
      make("span", { class: `line-${index}`, "aria-hidden": "true" }, PATTERNS[index].sample),
      ` ${line.label}`));
    this.box = make("div", { class: "chart", tabindex: "0", role: "img" });
    this.readout = make("output", { "aria-live": "off" });
    this.table = folded(words.as_table);
    this.table.addEventListener("toggle", () => this.fill());
    this.element = make("figure", {}, make("figcaption", {}, make("strong", {}, title), " ",
      ...samples), this.box, this.readout, this.table);
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("focus", () => this.choose(this.place ?? this.steps().length - 1));
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.box);
    this.shades = matchMedia("(prefers-color-scheme: dark)");
    this.shade = () => this.rebuild();
    this.shades.addEventListener("change", this.shade);
  }

  close() {
    this.sizes.disconnect();
    this.shades.removeEventListener("change", this.shade);
    this.plot?.destroy();
  }

  has() {
    return this.series.some(([steps]) => steps.length);
  }

  steps() {
    return this.plot ? this.plot.data[0] : [];
  }

  // Takes points of the server; returns false when the line has become too long.
  take(points, whole) {
    let fits = true;
    this.lines.forEach((line, index) => {
      const [steps, values] = points[line.name] ?? [[], []];
      if (whole) this.series[index] = [steps, values];
      else if (steps.length) {
        this.series[index] = [
          this.series[index][0].concat(steps), this.series[index][1].concat(values),
        ];
      }
      fits = fits && this.series[index][0].length <= MOST_POINTS;
    });
    this.element.hidden = !this.has();
    this.draw();
    return fits;
  }

  draw() {
    if (!this.has()) return;
    const data = uPlot.join(this.series);
    if (this.plot) this.plot.setData(data);
    else this.build(data);
    this.describe();
    if (this.table.open) this.fill();
  }

  build(data) {
    const width = this.box.clientWidth;
    if (!width) return;
    const text = colour("--text"), grid = colour("--grid");
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid } };
    this.plot = new uPlot({
      width, height: 220, legend: { show: false },
      scales: { x: { time: false } },
      axes: [
        { ...axis, values: (_, all) => all.map((each) => number(each)) },
        { ...axis, size: room, values: (_, all) => all.map((each) => this.show(each)) },
      ],
      series: [{}, ...this.lines.map((line, index) => ({
        label: line.label, stroke: colour(COLOURS[index]), width: 2, dash: PATTERNS[index].dash,
        points: PATTERNS[index].points
          ? { show: true, size: 8, fill: colour(COLOURS[index]) } : { show: this.short(index) },
        spanGaps: true,
      }))],
      hooks: { setCursor: [(plot) => this.read(plot.cursor.idx)] },
    }, data, this.box);
  }

  // Of a few points, or of one, a line alone shows little or nothing.
  short(index) {
    return this.series[index][0].length < 30;
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    this.draw();
  }

  resize() {
    if (!this.plot) this.draw();
    else if (this.plot.width !== this.box.clientWidth && this.box.clientWidth) {
      this.plot.setSize({ width: this.box.clientWidth, height: 220 });
    }
  }

  key(event) {
    const last = this.steps().length - 1;
    const from = this.place ?? last;
    const moves = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    this.readout.setAttribute("aria-live", "polite");
    this.choose(Math.min(last, Math.max(0, moves[event.key])));
  }

  choose(place) {
    if (!this.plot || place < 0) return;
    this.place = place;
    const step = this.plot.data[0][place];
    this.plot.setCursor({ left: this.plot.valToPos(step, "x"), top: 10 });
    this.read(place);
  }

  read(place) {
    if (place === null || place === undefined || !this.plot) return;
    this.place = place;
    const parts = this.lines.map((line, index) => {
      const value = this.plot.data[index + 1][place];
      return value === null || value === undefined ? "" : `${line.label} ${this.show(value)}`;
    });
    this.readout.value = `${words.step} ${number(this.plot.data[0][place])}: ${
      parts.filter(Boolean).join(", ")}`;
  }

  describe() {
    const parts = this.lines.map((line, index) => {
      const [steps, values] = this.series[index];
      if (!steps.length) return "";
      const lowest = values.reduce((least, each) => Math.min(least, each));
      const highest = values.reduce((most, each) => Math.max(most, each));
      return `${line.label}: ${words.newest} ${this.show(values.at(-1))} (${words.step} ${
        number(steps.at(-1))}), ${words.lowest} ${this.show(lowest)}, ${words.highest} ${
        this.show(highest)}`;
    });
    this.box.setAttribute("aria-label", `${this.title}. ${parts.filter(Boolean).join(". ")}`);
  }

  fill() {
    if (!this.table.open || !this.plot) return;
    const steps = this.plot.data[0], count = steps.length;
    const places = [...new Set(Array.from({ length: Math.min(count, TABLE_ROWS) }, (_, index) =>
      Math.round((index * (count - 1)) / Math.max(1, Math.min(count, TABLE_ROWS) - 1))))];
    const rows = places.map((place) => [number(steps[place]), ...this.lines.map((_, index) => {
      const value = this.plot.data[index + 1][place];
      return value === null || value === undefined ? "–" : this.show(value);
    })]);
    const columns = [words.step, ...this.lines.map((line) => line.label)];
    this.table.replaceChildren(this.table.firstChild, table(this.title, columns, rows));
  }
}
