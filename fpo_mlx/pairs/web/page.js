"use strict";
// Shows what the server says is next and sends what was clicked; it decides nothing itself.
const token = document.body.dataset.token;
const byId = (id) => document.getElementById(id);
const keys = { 1: "first", ArrowLeft: "first", 2: "second", ArrowRight: "second", t: "tie",
  b: "both_bad", " ": "skip" };
let current = null;
let busy = false;
let side = 0;
let edited = null;
const note = byId("editor-note").textContent;
const ANEW = "The server was started anew, and this page is the old one's. Your votes are saved. " +
  "Open the address that `fpo-mlx pairs rate` printed.";
const TOO_LATE = "This comparison was decided meanwhile. Copy your text, then cancel.";

// Whether the server took it.
async function ask(path, body) {
  if (busy) return false;
  busy = true;
  try {
    const reply = await fetch(path, { method: "POST", body: JSON.stringify(body || {}),
      headers: { "Content-Type": "application/json", "X-Token": token } });
    show(reply.status === 401 ? { message: ANEW } : await said(reply));
    return reply.ok;
  } catch {
    byId("message").textContent =
      "The server does not answer. Your votes are saved. Start `fpo-mlx pairs rate` again.";
    return false;
  } finally {
    busy = false;
  }
}

// A refusal is plain text.
async function said(reply) {
  const json = (reply.headers.get("Content-Type") || "").startsWith("application/json");
  return json ? reply.json() : { message: `The server refused this: ${await reply.text()}` };
}

function show(state) {
  byId("message").textContent = state.message || "";
  if (state.total === undefined) return;
  let line = `${state.voted} of ${state.total}`;
  if (state.seconds_each !== null) {
    line += `, ${state.seconds_each.toFixed(0)} s each, ${minutes(state.seconds_left)} left`;
  }
  if (state.twice) line += `; agreed with yourself ${state.same} of ${state.twice} times`;
  byId("progress").textContent = line;
  byId("bar").max = state.total;
  byId("bar").value = state.voted;
  byId("undo").disabled = byId("undo-last").disabled = !state.can_undo;
  byId("main").hidden = state.done;
  byId("done").hidden = !state.done;
  if (state.done) {
    current = null;
    byId("summary").textContent = line + ". You can close this page and stop the server.";
    return;
  }
  current = state.name;
  byId("prompt").scrollTop = 0;
  byId("prompt").textContent = state.prompt.map((turn) =>
    state.prompt.length > 1 ? `[${turn.role}]\n${turn.text}` : turn.text).join("\n\n");
  state.answers.forEach((text, at) => {
    byId(`answer-${at}`).textContent = text;
    byId(`answer-${at}`).scrollTop = 0;
  });
}

function minutes(seconds) {
  return seconds < 90 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`;
}

async function vote(choice, edited) {
  return current !== null && ask("/vote", { name: current, choice, edited });
}

function edit(at) {
  if (current === null || busy) return;
  side = at;
  edited = current;
  byId("editor-note").textContent = note;
  byId("editor-title").textContent = `Edit answer ${at + 1}`;
  byId("edited").value = byId(`answer-${at}`).textContent;
  byId("editor").showModal();
  byId("edited").focus();
}

// The editor stays open, and the text in it, until the text is saved.
async function save() {
  if (current !== edited) byId("editor-note").textContent = TOO_LATE;
  else if (await vote("both_bad", { side, text: byId("edited").value })) byId("editor").close();
  else byId("editor-note").textContent = byId("message").textContent;
}

document.addEventListener("keydown", (event) => {
  if (byId("editor").open) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || byId("help").open) return;
  if (event.key === " " && event.target.tagName === "BUTTON") return;
  if (event.key in keys) vote(keys[event.key]);
  else if (event.key === "Backspace") ask("/undo");
  else if (event.key === "e") edit(0);
  else if (event.key === "E") edit(1);
  else if (event.key === "?") byId("help").showModal();
  else return;
  event.preventDefault();
});

// A button that was clicked does not keep the space bar, which skips.
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && event.detail > 0) button.blur();
}, true); // before the button's own: a dialog gives the focus back to who had it
// The second click of a double click would decide what nobody has read yet.
document.querySelectorAll("[data-choice]").forEach((button) =>
  button.addEventListener("click", (event) => event.detail < 2 && vote(button.dataset.choice)));
document.querySelectorAll("[data-edit]").forEach((button) =>
  button.addEventListener("click", () => edit(Number(button.dataset.edit))));
byId("undo").addEventListener("click", () => ask("/undo"));
byId("undo-last").addEventListener("click", () => ask("/undo"));
byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("close-help").addEventListener("click", () => byId("help").close());
byId("save").addEventListener("click", save);
byId("cancel").addEventListener("click", () => byId("editor").close());
ask("/next");
