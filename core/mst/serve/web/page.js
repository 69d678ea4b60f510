// The page of `mst serve --web on`. What is said stays in this page's memory: nothing is stored,
// and nothing is asked of another place than the server that has sent the page. Texts are put in
// as text, never as HTML: a model may write any.
"use strict";

const part = (id) => document.getElementById(id);
const words = document.body.dataset;
let messages = [];
let key = "";
let running = null;

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

function tell(text) {
  part("told").textContent = text;
}

function shown(kind, text) {
  const made = document.createElement("p");
  made.className = kind;
  made.dir = "auto";
  made.textContent = text;
  part("talk").append(made);
  part("talk").scrollTop = part("talk").scrollHeight;
  return made;
}

async function refusal(reply) {
  if (reply.status === 401) {
    part("keys").hidden = false;
    part("key").focus();
  }
  try {
    return `${words.refused} ${(await reply.json()).error.message}`;
  } catch {
    return `${words.refused} ${reply.status}`;
  }
}

async function listModels() {
  try {
    const reply = await fetch("/v1/models", { headers: headers() });
    if (!reply.ok) return tell(await refusal(reply));
    const names = (await reply.json()).data.map((each) => each.id);
    part("model").replaceChildren(...names.map((name) => new Option(name, name)));
    part("keys").hidden = true;
    tell(names.length ? "" : words.nomodel);
    part("text").focus();
  } catch {
    tell(words.unreachable);
  }
}

// Yields what the server's events hold. Pieces of the network may end anywhere, also in a character.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error(words.broken);
    waiting += value;
    const whole = waiting.split("\n\n");
    waiting = whole.pop();
    for (const each of whole) {
      const data = each.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function asked(text) {
  const system = part("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  return JSON.stringify({
    model: part("model").value,
    messages: [...first, ...messages, { role: "user", content: text }],
    temperature: Number(part("temperature").value) || 0,
    stream: true,
  });
}

async function answered(reply, target) {
  let finish = null;
  for await (const event of events(reply)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    if (choice.delta.content) {
      const talk = part("talk");
      const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
      target.append(choice.delta.content);
      if (atEnd) talk.scrollTop = talk.scrollHeight;
    }
  }
  if (finish === "length") shown("note", words.length);
}

function busy(yes) {
  part("stop").hidden = !yes;
  part("send").hidden = yes;
}

async function send(text) {
  tell("");
  running = new AbortController();
  const here = messages;
  busy(true);
  shown("user", text);
  const target = shown("assistant", "");
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: asked(text), signal: running.signal,
    });
    if (!reply.ok) throw new Error(await refusal(reply));
    await answered(reply, target);
  } catch (error) {
    if (here !== messages) tell("");
    else if (error.name === "AbortError") shown("note", words.stopped);
    else tell(error instanceof TypeError ? words.unreachable : error.message);
  }
  running = null;
  busy(false);
  if (here !== messages) return;
  if (target.textContent) {
    messages.push({ role: "user", content: text });
    messages.push({ role: "assistant", content: target.textContent });
  } else {
    part("text").value ||= text;
  }
}

part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = part("text").value.trim();
  if (!text || running) return;
  part("text").value = "";
  send(text);
});
part("text").addEventListener("keydown", (event) => {
  // Enter also ends the composing of Chinese characters, and then sends nothing.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  part("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
part("stop").addEventListener("click", () => running?.abort());
part("reset").addEventListener("click", () => {
  running?.abort();
  messages = [];
  part("talk").replaceChildren();
  tell("");
  part("text").focus();
});
part("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  key = part("key").value.trim();
  part("key").value = "";
  listModels();
});
listModels();
