// The devices with their health, and the audit log.

import { get, post, repeat, said } from "./asking.js";
import { facts, gib, heading, make, number, table, tell, time, words } from "./parts.js";

function devices(found) {
  const rows = found.backends.flatMap((backend) => backend.devices.map((each) => [
    each.name, each.product,
    backend.usable ? `✓ ${words.usable}` : `✗ ${words.not_usable}`,
    `${gib(each.memory_free_bytes)} / ${gib(each.memory_total_bytes)}`,
    each.temperature_celsius === null ? "–" : `${number(each.temperature_celsius)} °C`,
    each.power_watts === null ? "–" : `${number(each.power_watts)} W`,
    each.throttled.join(", ") || "–",
  ]));
  const health = found.backends.flatMap((backend) => backend.health.map((each) =>
    make("p", { class: "warning" }, `⚠ ${backend.name}: ${each}`)));
  const missing = found.backends.filter((each) => !each.usable);
  return [
    facts([[words.system, found.platform], [words.memory_free,
      `${gib(found.host.memory_free_bytes)} / ${gib(found.host.memory_total_bytes)}`]]),
    table(words.device, [words.device, words.product, words.state, words.memory_free,
      words.temperature, words.power, words.throttled], rows),
    ...(health.length ? health : [make("p", {}, `✓ ${words.healthy}`)]),
    ...missing.map((each) => make("p", {}, `${each.name}: ${
      each.found ? words.not_usable : words.not_found}: ${each.reason}`)),
    ...found.plugins.map((each) => make("p", { class: "warning" },
      `⚠ ${each.name}: ${each.status}: ${each.reason}`)),
  ];
}

function verified(found) {
  if (found.whole === null) return make("p", {}, words.audit_none);
  if (found.whole) {
    return make("p", { class: "state done" }, `✓ ${words.audit_whole}: ${number(found.events)} ${
      words.events}, ${number(found.unsigned)} ${words.unsigned}`);
  }
  return make("div", {}, make("p", { class: "state failed" }, `✗ ${words.audit_changed}`),
    ...found.problems.map((each) => make("p", { class: "warning" }, `⚠ ${each}`)));
}

export async function showMachine(main, signal) {
  const here = make("section", {}, heading(2, words.devices), make("p", {}, words.loading));
  const log = make("section", {}, heading(2, words.audit));
  const result = make("div", { role: "status" });
  const check = make("button", { type: "button" }, words.audit_check);
  check.addEventListener("click", async () => {
    check.disabled = true;
    result.textContent = words.loading;
    try {
      result.replaceChildren(verified(await post("/api/audit/verify")));
    } catch (error) {
      result.textContent = "";
      tell(said(error));
    }
    check.disabled = false;
  });
  main.replaceChildren(heading(1, words.machine), here, log);
  const audit = await get("/api/audit", signal);
  log.append(facts([[words.directory, audit.directory], [words.files, number(audit.files)],
    [words.newest, time(audit.last_time)]]),
  audit.problem ? make("p", { class: "warning" }, `⚠ ${audit.problem}`) : "", check, result);
  let shown = "";
  await repeat(15, async () => {
    const found = await get("/api/machine", signal);
    const text = JSON.stringify(found);
    if (text === shown) return;
    shown = text;
    here.replaceChildren(heading(2, words.devices), ...devices(found));
  }, signal);
}
