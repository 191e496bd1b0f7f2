// The chat: sends the conversation, shows the answer as it comes, and keeps the history in this page's memory only.

import { Answer, message } from "./answer.js";
import { Settings } from "./settings.js";
import { events, request } from "./stream.js";

const byId = (id) => document.getElementById(id);
const settings = new Settings();
const ENDINGS = { length: "ended at the token limit", content_filter: "ended by the server" };
let key = "";
let history = [];
let running = null;
let answers = 0;

function say(words) {
  byId("announcer").textContent = words;
}

function report(error) {
  // Before there is a key, the form that asks for it says all.
  byId("problem").textContent = error.status === 401 && !key ? "" : error.message;
  if (error.status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
}

async function loadModels() {
  byId("problem").textContent = "";
  byId("retry").hidden = true;
  try {
    const { data } = await (await request("v1/models", { key })).json();
    settings.offer(data);
    byId("key-form").hidden = true;
  } catch (error) {
    report(error);
    byId("retry").hidden = error.status === 401;
  }
}

function setRunning(controller) {
  running = controller;
  byId("send").disabled = controller !== null;
  byId("stop").disabled = controller === null;
}

/** Keeps the end of the answer in view, unless the reader has scrolled up. */
function following() {
  const page = document.scrollingElement;
  const below = page.scrollHeight - page.scrollTop - page.clientHeight;
  return below < 120 ? () => page.scrollTo(0, page.scrollHeight) : () => {};
}

async function stream(answer, body, signal) {
  const response = await request("v1/chat/completions", { key, body, signal });
  let ending = "";
  for await (const { choices, usage } of events(response)) {
    const choice = choices?.[0];
    const text = choice?.delta?.content ?? "";
    if (text || (choice?.layers !== undefined && choice.layers !== null)) {
      const follow = following();
      answer.add(text, choice.layers);
      follow();
    }
    if (choice?.finish_reason) ending = ENDINGS[choice.finish_reason] ?? "";
    if (usage) answer.count(usage.completion_tokens);
  }
  return ending;
}

async function ask(question, fields) {
  const controller = new AbortController();
  setRunning(controller);
  byId("problem").textContent = "";
  const own = history;
  own.push({ role: "user", content: question });
  const asked = message("You", question);
  asked.classList.add("question");
  const answer = new Answer(settings.label, settings.layers, ++answers);
  byId("conversation").append(asked, answer.item);
  document.scrollingElement.scrollTo(0, document.scrollingElement.scrollHeight);
  say("Waiting for the answer.");
  const body = { ...fields, messages: own, stream: true, stream_options: { include_usage: true } };
  let ending, failed = null;
  try {
    ending = await stream(answer, body, controller.signal);
  } catch (error) {
    failed = error;
    ending = controller.signal.aborted ? "stopped" : "broken off";
  }
  const summary = answer.end(ending);
  if (own !== history) return;
  if (failed && !answer.text) {
    // Nothing came: the message returns to its field, as if it had not been sent.
    own.pop();
    asked.remove();
    answer.item.remove();
    if (!byId("message").value) byId("message").value = question;
    say("");
  } else {
    own.push({ role: "assistant", content: answer.text });
    say(`${answer.text || "An empty answer."} ${summary}.`);
  }
  if (document.activeElement === byId("stop")) byId("message").focus();
  setRunning(null);
  if (failed && !controller.signal.aborted) report(failed);
}

function send() {
  const field = byId("message");
  const question = field.value;
  if (running || !question.trim()) return;
  const fields = settings.fields();
  if (!fields) return;
  field.value = "";
  field.focus();
  ask(question, fields);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  history = [];
  byId("conversation").replaceChildren();
  byId("problem").textContent = "";
  say("New conversation.");
  byId("message").focus();
});
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = byId("key").value;
  await loadModels();
  if (byId("key-form").hidden) byId("message").focus();
});
byId("retry").addEventListener("click", loadModels);

loadModels();
