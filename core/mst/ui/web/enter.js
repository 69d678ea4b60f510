// The way in. What follows # in the link is a token that works once; it is exchanged for a session
// that scripts can't read, and taken out of the address and the browser's history.

const words = JSON.parse(document.body.dataset.words);
const told = document.getElementById("told");
const token = location.hash.slice(1);

async function enter() {
  told.textContent = words.entering;
  history.replaceState(null, "", location.pathname + location.search);
  try {
    const reply = await fetch("/api/session", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token }),
    });
    if (reply.ok) {
      location.replace(`/${location.search}`);
      return;
    }
    told.textContent = reply.status === 403 ? words.link_used : `${words.refused} ${reply.status}`;
  } catch {
    told.textContent = words.unreachable;
  }
}

if (token) enter();
// A link that is opened in a tab that stands here already changes nothing but what follows #.
addEventListener("hashchange", () => location.reload());
