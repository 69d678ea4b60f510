// The list of runs, a page of it at a time.

import { get, repeat } from "./asking.js";
import { heading, make, number, percent, settings, state, time, words } from "./parts.js";

const LIMIT = 50;
const SECONDS = 4;
const STATES = ["running", "done", "failed", "interrupted", "killed", "damaged"];
const CLASSES = ["", "", "number", ...Array(4).fill("number roomy"), "roomy", "roomy"];
const asked = { offset: 0, find: "", state: "" };

function cells(run, places) {
  const place = settings.places > 1 ? make("small", {}, ` ${places[run.place]}`) : null;
  return [
    make("th", { scope: "row" }, make("a", { href: `#/run/${run.id}` }, run.name), place),
    make("td", {}, state(run.state)),
    make("td", { class: "number" }, number(run.loss)),
    make("td", { class: "number roomy" }, number(run.eval_loss)),
    make("td", { class: "number roomy" }, percent(run.accuracy)),
    make("td", { class: "number roomy" }, number(run.steps)),
    make("td", { class: "number roomy" }, number(run.tokens_per_second)),
    make("td", { class: "roomy" }, run.model ?? "–"),
    make("td", { class: "roomy" }, time(run.created)),
  ];
}

export async function showList(main, signal) {
  const find = make("input", { id: "find", type: "search", value: asked.find, autocomplete: "off" });
  const kind = make("select", { id: "state" }, make("option", { value: "" }, words.all_states),
    ...STATES.map((each) => make("option", { value: each }, words[`state_${each}`])));
  kind.value = asked.state;
  const counted = make("p", { role: "status" });
  const columns = [
    words.run, words.state, words.loss, words.eval_loss, words.accuracy, words.steps,
    words.tokens_per_second, words.model, words.created,
  ];
  const body = make("tbody");
  const before = make("button", { type: "button" }, words.newer);
  const after = make("button", { type: "button" }, words.older);
  main.replaceChildren(
    heading(1, words.runs),
    make("form", { class: "filter", role: "search" },
      make("label", { for: "find" }, words.find), find,
      make("label", { for: "state" }, words.state), kind),
    counted,
    make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": words.runs },
      make("table", { class: "runs" }, make("caption", { class: "unseen" }, words.runs),
        make("thead", {}, make("tr", {}, ...columns.map((each, index) =>
          make("th", { scope: "col", class: CLASSES[index] }, each)))), body)),
    make("p", { class: "pages" }, before, " ", after),
  );

  let shown = "", turn = 0;
  async function load() {
    const query = new URLSearchParams({ ...asked, limit: LIMIT });
    const mine = (turn += 1);
    const found = await get(`/api/runs?${query}`, signal);
    const text = JSON.stringify(found);
    // An answer that comes late must not take the place of a newer question's.
    if (text === shown || mine !== turn || signal.aborted) return;
    shown = text;
    // Who is at a link with the keyboard stays there when the rows are made anew.
    const at = body.contains(document.activeElement) ? document.activeElement.hash : null;
    body.replaceChildren(...found.runs.map((run) => make("tr", {}, ...cells(run, found.places))));
    if (at) body.querySelector(`a[href="${at}"]`)?.focus({ preventScroll: true });
    const first = found.runs.length ? found.offset + 1 : 0;
    counted.textContent = found.all
      ? `${words.runs}: ${number(first)}–${number(found.offset + found.runs.length)} / ${
        number(found.matching)}`
      : `${words.no_runs} ${found.places.join(", ")}`;
    before.disabled = found.offset === 0;
    after.disabled = found.offset + found.runs.length >= found.matching;
  }

  function ask(change) {
    Object.assign(asked, change);
    load().catch(() => {});
  }
  find.addEventListener("input", () => ask({ find: find.value, offset: 0 }));
  kind.addEventListener("change", () => ask({ state: kind.value, offset: 0 }));
  before.addEventListener("click", () => ask({ offset: Math.max(0, asked.offset - LIMIT) }));
  after.addEventListener("click", () => ask({ offset: asked.offset + LIMIT }));
  main.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  await repeat(SECONDS, load, signal);
}
