// The page of `mst ui`: which part is shown, by what follows # in the address.

import { post, said } from "./asking.js";
import { showList } from "./list.js";
import { showMachine } from "./machine.js";
import { settings, tell, words } from "./parts.js";
import { showRun } from "./run.js";
import { showStart, showWork } from "./start.js";

const main = document.getElementById("main");
const ROUTES = [
  [/^$/, showList],
  [/^run\/([0-9a-f]{24})$/, showRun],
  [/^start$/, showStart],
  [/^work\/([A-Za-z0-9-]+)$/, showWork],
  [/^machine$/, showMachine],
];
let leaving = new AbortController();

function route(first) {
  const path = location.hash.replace(/^#\/?/, "");
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  tell("");
  tell("", "gone");
  document.title = words.title;
  for (const each of document.querySelectorAll("nav a")) {
    const here = each.hash.replace(/^#\/?/, "") === path;
    if (here) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
  const [pattern, show] = ROUTES.find(([each]) => each.test(path)) ?? ROUTES[0];
  show(main, signal, pattern.exec(path)?.[1]).catch((error) => {
    if (!signal.aborted) tell(said(error));
  });
  // Who uses a keyboard or a screen reader goes on where the new part begins.
  if (!first) main.focus();
}

document.getElementById("leave").addEventListener("click", async () => {
  await post("/api/leave").catch(() => {});
  location.assign(`/enter${location.search}`);
});
document.getElementById("other").addEventListener("click", (event) => {
  // The same part in the other language.
  event.preventDefault();
  location.assign(`${event.currentTarget.getAttribute("href")}${location.hash}`);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.getElementById("to-start").hidden = !settings.actions;
addEventListener("hashchange", () => route(false));
route(true);
