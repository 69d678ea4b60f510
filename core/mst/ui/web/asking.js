// Asking the server. Nothing else is ever asked, and nothing is stored.

import { tell, words } from "./parts.js";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

class Unreachable extends Error {}

// So that reasons, errors and helps come in the page's language, whichever the browser's is.
const SPOKEN = { "Accept-Language": document.documentElement.lang };

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable(error.message);
  }
}

async function answered(reply) {
  if (reply.status === 401) {
    // The session has ended; the entrance says how to get a link.
    location.assign(`/enter${location.search}`);
  }
  const body = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, body.error?.message ?? `${reply.status}`);
  return body;
}

export async function get(path, signal) {
  return answered(await reached(path, { signal, headers: SPOKEN }));
}

export async function post(path, body = {}) {
  return answered(
    await reached(path, {
      method: "POST",
      headers: { ...SPOKEN, "Content-Type": "application/json" },
      body: JSON.stringify(body),
    }),
  );
}

// What is to be told of an error: the server's own words, or that it can't be reached.
export function said(error) {
  if (error.name === "AbortError") return "";
  if (error instanceof Refused) return `${words.refused} ${error.message}`;
  if (error instanceof Unreachable) return words.unreachable;
  console.error(error);
  return `${words.bug} ${error.message}`;
}

// Does something again and again while the page is looked at, until `signal` ends it.
export async function repeat(seconds, work, signal) {
  for (;;) {
    if (!document.hidden) {
      try {
        await work();
        tell("", "server");
      } catch (error) {
        if (signal.aborted) return;
        tell(said(error), "server");
      }
    }
    await new Promise((next) => setTimeout(next, seconds * 1000));
    if (signal.aborted) return;
  }
}
