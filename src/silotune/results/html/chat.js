"use strict";
// Asks the models and shows what they say. All text goes through textContent: nothing is markup.
const byId = id => document.getElementById(id);
const talk = byId("talk"), message = byId("message");
let about = null, history = {};

function made(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function toEnd() {
  window.scrollTo(0, document.body.scrollHeight);
}

// The bubbles of one exchange; returns what each speaker's is made of, by name.
function exchange(text) {
  const parts = {}, pair = made("div", undefined, "pair");
  for (const name of about.names) {
    const box = made("div"), said = made("p", "", "said waits");
    box.append(made("h2", name), said);
    pair.append(box);
    parts[name] = {box, said};
  }
  talk.append(made("p", text, "asked"), pair);
  toEnd();
  return parts;
}

function take(line, parts) {
  if (line.error) {
    for (const {box} of Object.values(parts)) box.remove();
    talk.append(made("p", line.error, "wrong"));
  } else if (line.answers) {
    history = line.history;
    for (const [name, {box, said}] of Object.entries(parts)) {
      said.className = "said";
      said.textContent = line.answers[name] || "(no text)";
      if (line.cut.includes(name)) {
        box.append(made("p", `✂ cut at ${about.most} tokens (--max-new-tokens)`, "more"));
      }
    }
    for (const note of line.notes) talk.append(made("p", note, "soft"));
  } else {
    parts[line.name].said.textContent = line.so_far;
  }
  toEnd();
}

function busy(is) {
  byId("send").disabled = is;
  byId("reset").disabled = is;
  talk.setAttribute("aria-busy", String(is));
}

async function say(text) {
  busy(true);
  const parts = exchange(text);
  try {
    const answer = await fetch("say", {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({text, history}),
    });
    if (!answer.ok) throw new Error(`The page's server refused this (${answer.status}).`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", ended = false;
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map(JSON.parse)) {
        take(line, parts);
        ended = ended || Boolean(line.error || line.answers);
      }
    }
    if (!ended) throw new Error("The answer ended in the middle.");
  } catch (error) {
    const text = error instanceof TypeError ? "There is no answer: is silotune chat still running?" : error.message;
    take({error: text}, parts);
  }
  busy(false);
  message.focus();
}

byId("form").addEventListener("submit", event => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || byId("send").disabled || about === null) return;
  message.value = "";
  say(text);
});

message.addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});

byId("reset").addEventListener("click", () => {
  history = {};
  talk.replaceChildren();
  message.focus();
});

fetch("about").then(answer => answer.json()).then(found => {
  about = found;
  document.title = `silotune chat: ${about.title}`;
  byId("title").textContent = about.title;
  byId("run").textContent = about.run;
  byId("note").textContent = about.note;
  byId("note").hidden = !about.note;
  if (about.names.length < 2) message.placeholder = "Ask a question";
});
