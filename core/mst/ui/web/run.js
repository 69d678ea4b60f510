// One run: its curves as they grow, and what is known of it.

import { get, post, said } from "./asking.js";
import { Chart } from "./charts.js";
import {
  called, facts, figure, folded, gib, heading, make, minutes, number, settings, state, table, tell,
  time, words,
} from "./parts.js";

const RESUMED = ["interrupted", "killed", "failed"];

function charts() {
  return [
    new Chart(words.loss, [
      { name: "loss", label: words.loss }, { name: "eval_loss", label: words.eval_loss },
    ]),
    new Chart(words.learning_rate, [{ name: "learning_rate", label: words.learning_rate }]),
    new Chart(words.tokens_per_second,
      [{ name: "tokens_per_second", label: words.tokens_per_second }]),
    new Chart(words.memory, [{ name: "memory_bytes", label: words.memory_peak }], gib),
  ];
}

// A button that asks once more before it does anything.
function asking(label, sure, work) {
  const button = make("button", { type: "button" }, label);
  let armed = false;
  button.addEventListener("click", async () => {
    if (!armed) {
      armed = true;
      button.textContent = sure;
      setTimeout(() => {
        armed = false;
        button.textContent = label;
      }, 5000);
      return;
    }
    button.disabled = true;
    try {
      await work();
      tell("");
    } catch (error) {
      tell(said(error));
    }
    button.disabled = false;
  });
  return button;
}

// A text whose commands name the run, so that they can be copied.
function typed(text, run) {
  return text.replaceAll("RUN", () => run.argument);
}

// What a person may want of a run that is done; the page itself shows and starts runs alone.
function next(run) {
  const commands = [[words.to_chat, "chat"], [words.to_serve, "serve"]];
  return [facts(commands.map(([name, command]) =>
    [name, make("code", {}, `mst ${command} ${run.argument}`)]))];
}

function evaluation(run) {
  const parts = [];
  const own = run.evaluation ?? [];
  if (own.length) {
    parts.push(table(words.before_after, [words.figure, words.before, words.after],
      own.map((each) => [called(each.name), figure(each.name, each.before),
        figure(each.name, each.after)])));
  }
  for (const report of run.reports ?? []) {
    const caption = `${report.file}, ${time(report.created)}, ${number(report.rows)} ${words.rows}`;
    parts.push(table(caption, [words.figure, report.compared_with ?? words.before, report.judged],
      report.figures.map((each) => [called(each.name), figure(each.name, each.before),
        figure(each.name, each.value)])));
  }
  return parts.length ? parts : [make("p", {}, typed(words.no_evaluation, run))];
}

function plan(run) {
  const made = run.plan;
  if (!made) return [make("p", {}, words.no_plan)];
  const expected = made.seconds === null ? null
    : `${minutes(made.seconds)} (${minutes(made.seconds / made.uncertainty)} – ${
      minutes(made.seconds * made.uncertainty)})`;
  return [
    facts([
      [words.device, made.devices.join(", ")],
      [words.method, `${made.tuner}, ${made.compute_dtype}`],
      [words.rows, `${number(made.train_rows)} + ${number(made.val_rows)} ${words.held_out}`],
      [words.steps, `${number(made.total_steps)} × ${number(made.global_batch)} ${words.rows}`],
      [words.time_expected, expected],
      [words.memory_expected, `${gib(made.peak_bytes)} / ${gib(made.available_bytes)}`],
    ]),
    ...made.warnings.map((each) => make("p", { class: "warning" }, `⚠ ${each}`)),
    table(words.reasons, [words.choice, words.value, words.why],
      made.reasons.map((each) => [each.choice, each.value, each.why])),
    folded(words.memory_parts, table(words.memory_parts, [words.part, words.memory],
      Object.entries(made.memory).map(([name, bytes]) =>
        [words[`part_${name}`] ?? name, gib(bytes)]))),
  ];
}

function exported(run) {
  if (!run.exports.length) return [make("p", {}, typed(words.no_exports, run))];
  return run.exports.flatMap((each) => {
    const passed = each.status === "passed";
    // One bound holds for the perplexity of all tokens, and of answers alone.
    const bounds = { ...each.bounds, trained_ratio: each.bounds?.perplexity_ratio };
    const rows = Object.entries(each.model ?? {}).map(([name, value]) =>
      [called(name), ...[value, each.rounding?.[name], bounds[name]].map((one) => figure(name, one))]);
    return [
      make("h3", {}, `${each.format} `, make("span", { class: `state ${passed ? "done" : "failed"}` },
        passed ? `✓ ${words.gate_passed}` : `✗ ${words.gate_failed}`)),
      make("p", {}, `${each.scheme}; ${words.judged_from} ${each.judged_from}`),
      ...each.faults.map((fault) => make("p", { class: "warning" }, `⚠ ${fault}`)),
      rows.length ? table(`${each.format}: ${words.gate}`,
        [words.figure, words.exported, words.rounding, words.bound], rows) : null,
      ...Object.entries(each.not_checked).map(([what, why]) =>
        make("p", {}, `${words.not_checked}: ${what} (${why})`)),
    ];
  });
}

function about(run) {
  const seal = run.seal === null ? words.no_seal
    : `${run.seal.layer}: ${number(run.seal.ways)} ${words.ways_tried}, ${
      run.seal.open.length ? `${words.ways_open} ${run.seal.open.join(", ")}` : words.none_open}`;
  return [
    facts([
      [words.directory, run.path], [words.model, run.model], [words.created, time(run.created)],
      [words.finished, run.finished ? time(run.finished) : null], [words.seal, seal],
      ["mst", run.mst_version],
      ...Object.entries(run.versions ?? {}),
    ]),
    table(words.data, [words.file, words.rows, "SHA-256"],
      (run.data ?? []).map((each) => [each.path, number(each.rows), each.sha256.slice(0, 16)])),
    table(words.results, [words.figure, words.value],
      Object.entries(run.results ?? {}).map(([name, value]) => [called(name), figure(name, value)])),
    make("p", {}, words.in_terminal, " ", make("code", {}, run.shown_by)),
  ];
}

async function samples(run, target, signal) {
  const found = await get(`/api/runs/${run.id}/samples`, signal);
  if (!found.files.length) target.append(make("p", {}, typed(words.no_samples, run)));
  for (const file of found.files) {
    const rows = file.rows.map((each, index) => [number(index + 1), each.reference,
      each.compared_prediction, each.prediction]);
    target.append(table(file.file,
      ["", words.reference, words.before, words.after], rows));
  }
}

export async function showRun(main, signal, id) {
  const drawn = charts();
  signal.addEventListener("abort", () => drawn.forEach((each) => each.close()));
  const title = heading(1, words.run);
  const status = make("p", { class: "status" });
  const actions = make("p", { class: "actions" });
  const problem = make("p", { class: "warning" });
  const damaged = make("p", { class: "warning", hidden: true });
  const rest = make("div");
  main.replaceChildren(title, status, problem, actions,
    make("section", { "aria-label": words.curves }, make("p", { class: "means" }, words.loss_means),
      make("div", { class: "charts" }, ...drawn.map((each) => each.element)), damaged), rest);
  drawn.forEach((each) => { each.element.hidden = true; });

  async function details() {
    const run = await get(`/api/runs/${id}`, signal);
    const open = new Set([...rest.querySelectorAll("details[open] > summary")]
      .map((each) => each.textContent));
    const sections = [
      ...(run.state === "done" ? [[words.next, next(run)]] : []),
      [words.evaluation, evaluation(run)], [words.exports, exported(run)], [words.plan, plan(run)],
      [words.about, about(run)],
    ];
    const made = sections.map(([name, parts]) =>
      make("section", {}, heading(2, name), ...parts));
    if (settings.samples) {
      const answers = make("section", {}, heading(2, words.samples), make("p", {}, words.samples_note));
      made.splice(sections.findIndex(([name]) => name === words.exports), 0, answers);
      await samples(run, answers, signal);
    }
    for (const each of run.problems) made.unshift(make("p", { class: "warning" }, `⚠ ${each}`));
    if (signal.aborted) return;
    rest.replaceChildren(...made);
    for (const each of rest.querySelectorAll("summary")) {
      each.parentElement.open = open.has(each.textContent);
    }
  }

  let before = null;
  function show(run) {
    title.textContent = run.name;
    document.title = `${run.name} – ${words.title}`;
    const total = run.steps === null ? "" : `, ${words.step} ${number(run.steps)}`;
    status.replaceChildren(state(run.state), total);
    problem.textContent = run.problem ? `⚠ ${run.problem}` : "";
    if (run.state === before) return;
    before = run.state;
    actions.replaceChildren(...buttons(run));
    details().catch((error) => tell(said(error)));
  }

  function buttons(run) {
    if (!settings.actions) return [];
    if (run.state === "running") {
      return [asking(words.stop, words.stop_sure, () => post(`/api/runs/${id}/stop`))];
    }
    if (!RESUMED.includes(run.state)) return [];
    return [asking(words.resume, words.resume_sure, async () => {
      const found = await post(`/api/runs/${id}/resume`);
      location.hash = `#/work/${found.work}`;
    })];
  }

  function take(told) {
    if (told.run) show(told.run);
    if (!told.points) return true;
    damaged.hidden = !told.damaged;
    damaged.textContent = `⚠ ${number(told.damaged)} ${words.damaged_lines}`;
    return drawn.map((each) => each.take(told.points, told.whole)).every(Boolean);
  }

  follow(`/api/runs/${id}/live`, take, signal, () => {
    status.replaceChildren(state("gone"));
    actions.replaceChildren();
    before = null;
    tell(words.run_gone, "gone");
  });
}

// Takes what the server sends, and asks anew where the connection breaks, or a line is too long.
function follow(path, take, signal, gone) {
  let source;
  // One that has just been started is not there yet, and one that is gone may come back.
  function missing(error) {
    if (signal.aborted) return;
    if (error.status === 404) gone();
    else tell(said(error), "server");
    setTimeout(() => signal.aborted || again(), 3000);
  }
  async function again() {
    try {
      await get(path.replace("/live", ""), signal);
      tell("", "gone");
      open();
    } catch (error) {
      missing(error);
    }
  }
  function open() {
    // A browser has six connections to a server, and pages that nobody looks at would take them.
    if (document.hidden) return;
    source?.close();
    source = new EventSource(path);
    source.onmessage = (event) => {
      if (event.data === "[DONE]") {
        source.close();
        return setTimeout(() => signal.aborted || again(), 3000);
      }
      const told = JSON.parse(event.data);
      tell("", "server");
      if (told.gone) {
        source.close();
        return missing({ status: 404 });
      }
      if (!take(told)) {
        source.close();
        open();
      }
    };
    source.onerror = () => {
      if (signal.aborted) return;
      // The browser tries again by itself, unless it was refused.
      if (source.readyState === EventSource.CLOSED) {
        again();
      } else tell(words.unreachable, "server");
    };
  }
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) source?.close();
    else open();
  }, { signal });
  signal.addEventListener("abort", () => source?.close());
  open();
}
