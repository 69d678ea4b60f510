// Starting a run, and what came of it.

import { get, post, repeat, said } from "./asking.js";
import { folded, heading, make, settings, state, tell, time, words } from "./parts.js";

// What most people set, in this order; all else is behind "more options".
const FIRST = ["num_train_epochs", "max_steps", "learning_rate", "lora_rank", "max_length", "tuner",
  "device"];

function field(option) {
  const id = `option-${option.name}`;
  const kept = option.default === null || Array.isArray(option.default) ? words.planner
    : String(option.default);
  const input = option.choices.length
    ? make("select", { id, name: option.name }, make("option", { value: "" }, `– (${kept})`),
      ...option.choices.map((each) => make("option", { value: each }, each)))
    : make("input", { id, name: option.name, placeholder: kept, autocomplete: "off" });
  const label = words[`option_${option.name}`] ?? option.name;
  const help = make("small", { id: `${id}-help` }, option.help);
  input.setAttribute("aria-describedby", help.id);
  return make("p", { class: "field" }, make("label", { for: id }, label), input, help);
}

function files(name, label, all, none) {
  if (!all.length) return make("p", {}, `${label}: ${none}`);
  const boxes = all.map((each) => make("label", { class: "check" },
    make("input", { type: "checkbox", name, value: each.id }), ` ${each.name}`));
  return make("fieldset", {}, make("legend", {}, label), make("div", { class: "boxes" }, ...boxes));
}

function asked(form) {
  const data = new FormData(form);
  const request = {
    name: data.get("run").trim(), place: Number(data.get("place") ?? 0),
    model: data.get("model") || null,
    dataset: data.getAll("dataset"), val_dataset: data.getAll("val_dataset"), options: {},
  };
  for (const each of form.querySelectorAll("input[id^=option-], select[id^=option-]")) {
    const value = each.value.trim();
    if (value) request.options[each.name] = value;
  }
  return request;
}

export async function showStart(main, signal) {
  if (!settings.actions) {
    main.replaceChildren(heading(1, words.newrun), make("p", {}, words.actions_off));
    return;
  }
  const found = await get("/api/choices", signal);
  const first = FIRST.flatMap((name) => found.options.filter((each) => each.name === name));
  const rest = found.options.filter((each) => !FIRST.includes(each.name));
  const stamp = new Date().toISOString().slice(0, 16).replace(/[-:T]/g, "");
  const form = make("form", { class: "start", autocomplete: "off" },
    make("p", { class: "field" }, make("label", { for: "run" }, words.run_name),
      make("input", { id: "run", name: "run", required: true, value: `run-${stamp}`,
        pattern: "[A-Za-z0-9_][A-Za-z0-9_.\\-]{0,79}" })),
    found.places.length > 1 ? make("p", { class: "field" },
      make("label", { for: "place" }, words.directory),
      make("select", { id: "place", name: "place" }, ...found.places.map((each, index) =>
        make("option", { value: index }, each)))) : null,
    make("p", { class: "field" }, make("label", { for: "model" }, words.model),
      make("select", { id: "model", name: "model" }, make("option", { value: "" }, words.embedded),
        ...found.models.map((each) => make("option", { value: each.id }, each.name)))),
    files("dataset", words.data, found.data, words.embedded_data),
    found.data.length ? folded(words.val_data,
      files("val_dataset", words.val_data, found.data, "")) : null,
    ...first.map(field),
    folded(words.more_options, ...rest.map(field)),
    make("p", {}, make("button", { id: "begin" }, words.begin)));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("#begin");
    button.disabled = true;
    try {
      const started = await post("/api/start", asked(form));
      tell("");
      location.hash = `#/work/${started.work}`;
    } catch (error) {
      tell(said(error));
    }
    button.disabled = false;
  });
  const works = make("ul", { class: "works" });
  main.replaceChildren(heading(1, words.newrun), make("p", {}, words.start_note), form,
    heading(2, words.started), works);
  const known = await get("/api/works", signal);
  works.replaceChildren(...known.works.map((each) => make("li", {},
    make("a", { href: `#/work/${each.name}` }, each.run_name), " ", state(each.state), ` ${
      time(each.started)}`)));
  if (!known.works.length) works.replaceWith(make("p", {}, words.none_started));
}

export async function showWork(main, signal, name) {
  const title = heading(1, words.run), status = make("p", { role: "status" });
  const link = make("p");
  const output = make("pre", { tabindex: "0", "aria-label": words.output });
  main.replaceChildren(title, status, link, heading(2, words.output), output);
  await repeat(2, async () => {
    const found = await get(`/api/works/${encodeURIComponent(name)}`, signal);
    title.textContent = found.run_name;
    const code = found.exit_code ? ` (${words.exit_code} ${found.exit_code})` : "";
    status.replaceChildren(state(found.state), code);
    if (!link.firstChild) {
      link.replaceChildren(make("a", { href: `#/run/${found.run}` }, words.to_run));
    }
    if (output.textContent !== found.output) output.textContent = found.output;
  }, signal);
}
