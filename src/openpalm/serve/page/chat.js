// The chat page: a conversation with v1/chat/completions of the server that serves it.
// A model's text may be hostile: it is inserted as text nodes only, never as markup.

import { Refusal, chunks, request } from "./api.js";
import {
  onSettings, openSettings, recall, remember, secret, settings, showModels, showServer,
} from "./settings.js";
import { Tip } from "./tooltip.js";
import { Aligner, level } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
const box = $("box");

// --- stored state -----------------------------------------------------------------------------

let messages = recall("sessionStorage", "messages", []);
let cleared = null; // the conversation before New chat, until the next message
let answering = null; // the AbortController of the answer being received
let editing = null; // { index, draft } while an earlier message is edited
let models = [];
let sharing = false; // whether the server keeps conversations that users agree to share

function keepConversation() {
  const said = messages.filter((message) => message.content);
  // If the storage is too small for the token probabilities, store the text without them.
  if (!remember("sessionStorage", "messages", said)) {
    remember("sessionStorage", "messages", said.map((message) => ({ ...message, pieces: [] })));
  }
}

// --- the server ------------------------------------------------------------------------------

async function loadModels() {
  const { data } = await (await request("v1/models", secret)).json();
  models = data.map((model) => model.id);
  showModels(models);
  sharing = data.some((model) => model.takes_conversations);
  showServer(data.find((model) => model.id === settings.model)?.sampling, sharing);
  $("model-name").textContent = settings.model;
}

function withSystemPrompt(conversation) {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  return [...system, ...conversation.map(({ role, content }) => ({ role, content }))];
}

function completionRequest(conversation) {
  const { model, temperature, top_p, top_k, max_tokens, seed, store } = settings;
  const options = { temperature, top_p, top_k, max_tokens, seed, store: (sharing && store) || null };
  return {
    model,
    messages: withSystemPrompt(conversation),
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 5,
    // Settings that are not set are left out: the server uses its defaults.
    ...Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null)),
  };
}

// Receives the answer to `conversation` into `message`.
async function receive(message, conversation, signal) {
  const began = performance.now();
  if (!models.length) await loadModels();
  const body = completionRequest(conversation);
  const response = await request("v1/chat/completions", { ...secret, body, signal });
  const aligner = new Aligner(message);
  let first, last, used, finished;
  for await (const { choices: [choice] = [], usage } of chunks(response)) {
    used = usage?.completion_tokens ?? used;
    finished = choice?.finish_reason ?? finished;
    aligner.push(choice?.delta?.content ?? "", choice?.logprobs?.content ?? []);
    if (choice?.delta?.content) {
      last = performance.now() - began;
      first ??= last;
      paintSoon();
    }
    message.stats = { tokens: used ?? aligner.tokens, first, last };
  }
  if (!finished) throw new Refusal("The connection ended before the answer was complete.");
  if (finished === "length") message.note = "Cut at the limit of tokens.";
}

// --- the log ---------------------------------------------------------------------------------

let views = []; // one for each message, in order

function makeView(message) {
  const root = $("message").content.firstElementChild.cloneNode(true);
  const text = root.querySelector(".text");
  const tail = text.appendChild(new Text());
  root.className = message.role;
  root.querySelector("h2").textContent = message.role === "user" ? "You" : "Answer";
  $("messages").append(root);
  return { message, root, text, tail, at: 0, drawn: 0, actions: "" };
}

// Draws the new text. Without probabilities the answer is one growing text node; with them each
// piece is a span, and `tail` holds the text that has no token yet.
function paint(view) {
  const { message, text, tail } = view;
  const pieces = settings.show_tokens ? message.pieces ?? [] : [];
  const spans = new DocumentFragment();
  for (; view.drawn < pieces.length; view.drawn++) {
    const { start, end, chance } = pieces[view.drawn];
    const span = document.createElement("span");
    span.className = `token p${level(chance)}`;
    span.dataset.piece = view.drawn;
    span.tabIndex = view.drawn ? -1 : 0;
    span.textContent = message.content.slice(start, end);
    spans.append(message.content.slice(view.at, start), span);
    view.at = end;
  }
  if (spans.firstChild) text.insertBefore(spans, tail);
  const rest = message.content.slice(view.at);
  if (rest.startsWith(tail.data)) tail.appendData(rest.slice(tail.length));
  else tail.data = rest;
  const note = view.root.querySelector(".note");
  note.hidden = !message.note;
  note.textContent = message.note ?? "";
}

function repaint(view) {
  view.text.replaceChildren(view.tail);
  view.tail.data = "";
  view.at = view.drawn = 0;
  paint(view);
}

let frame = 0;

// Draws at most once per frame, however fast tokens arrive.
function paintSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (!answering) return;
    paint(views.at(-1));
    stick();
    speak(messages.at(-1));
  });
}

// Shows the current state; keeps every element that is still valid.
function refresh() {
  let same = 0;
  while (same < views.length && views[same].message === messages[same]) same++;
  for (const view of views.splice(same)) view.root.remove();
  views.push(...messages.slice(same).map(makeView));
  views.slice(same).forEach(paint);
  views.forEach((view, i) => {
    view.root.classList.toggle("streaming", Boolean(answering) && i === views.length - 1);
    view.root.classList.toggle("edited", editing !== null && i >= editing.index);
    showActions(view, i);
  });
  $("welcome").hidden = messages.length > 0;
  $("undo").hidden = !cleared;
  $("save").disabled = !messages.length;
  $("editing").hidden = editing === null;
  $("stop").hidden = !answering;
  $("send").hidden = Boolean(answering);
  log.ariaBusy = String(Boolean(answering));
  showSend();
  showStats();
  stick();
}

function showActions(view, i) {
  const user = view.message.role === "user";
  const last = i === views.length - 1;
  const acts = {};
  if (user && i === lastUser() && !answering) acts.Edit = startEditing;
  if (!user && !(answering && last)) acts.Copy = () => copy(view);
  if (!user && !answering && last) acts.Regenerate = again;
  const names = Object.keys(acts).join();
  if (names === view.actions) return; // keeps the buttons and the focus on them
  view.actions = names;
  const buttons = Object.entries(acts).map(([name, act]) => button(name, act));
  view.root.querySelector(".actions").replaceChildren(...buttons);
}

function button(name, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = name;
  made.addEventListener("click", act);
  return made;
}

const lastUser = () => messages.findLastIndex((message) => message.role === "user");
const showSend = () => ($("send").disabled = !box.value.trim());

function showStats() {
  const stats = answering ? null : messages.at(-1)?.stats;
  const { tokens, first, last } = stats ?? {};
  const parts = [];
  if (tokens) parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  // The first token includes the time for the prompt, so it does not count.
  const speed = ((tokens - 1) * 1000) / (last - first);
  if (tokens > 1 && last > first) parts.push(`${speed.toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${(first / 1000).toFixed(2)} s`);
  $("stats").textContent = parts.join(" · ");
  $("legend").hidden = !settings.show_tokens;
}

function notice(text = "", ...buttons) {
  const area = $("notice");
  area.hidden = !text;
  area.querySelector("p").textContent = text;
  area.querySelector(".actions").replaceChildren(...buttons);
  if (text) say(text);
  stick();
}

function explain(error) {
  const buttons = [button("Retry", retry)];
  if (error.status === 401) buttons.unshift(button("Enter API key", () => openSettings("key")));
  if (!(error instanceof Refusal)) console.error(error); // a bug in this page, or an unknown server
  notice(error.message, ...buttons);
}

// --- scrolling and speech --------------------------------------------------------------------

let pinned = true; // the view follows the end of the log

function stick() {
  if (pinned) log.scrollTop = log.scrollHeight;
}

function toEnd() {
  pinned = true;
  $("newest").hidden = true;
  stick();
}

log.addEventListener("scroll", () => {
  pinned = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  $("newest").hidden = pinned;
});
new ResizeObserver(stick).observe(log);
$("newest").addEventListener("click", () => {
  toEnd();
  toBox();
});

// For screen readers. Lines are removed later, or a reader would find them again below the page.
function say(text) {
  const line = document.createElement("p");
  line.textContent = text;
  $("speech").append(line);
  setTimeout(() => line.remove(), 15_000);
}

let spoken = 0;

// Announces an answer in whole sentences, several at a time.
function speak(message, whole = false) {
  const rest = message.content.slice(spoken);
  if (!whole && rest.length < 200) return;
  const end = whole ? rest.length : (rest.match(/^[^]*[.!?…:;\n](?=\s|$)/)?.[0].length ?? 0);
  if (rest.slice(0, end).trim()) say(rest.slice(0, end));
  spoken += end;
}

// --- the conversation ------------------------------------------------------------------------

// Requests an answer to the messages. Restores `previous` if none arrives.
async function ask(previous = null) {
  const conversation = messages;
  const message = { role: "assistant", content: "", pieces: [] };
  const abort = new AbortController();
  let problem = null;
  conversation.push(message);
  answering = abort;
  cleared = null;
  spoken = 0;
  notice();
  refresh();
  toEnd();
  try {
    await receive(message, conversation.slice(0, -1), abort.signal);
    if (!message.content) message.note = "The answer is empty.";
  } catch (error) {
    problem = error;
  }
  if (answering === abort) answering = null;
  const stopped = abort.signal.aborted;
  if (problem) message.note = stopped ? "Stopped." : "Incomplete.";
  if (problem && !message.content) conversation.splice(-1, 1, ...(previous ? [previous] : []));
  if (conversation !== messages) return; // New chat was pressed meanwhile
  settle(message, problem, stopped);
}

function settle(message, problem, stopped) {
  speak(message, true);
  if (views.at(-1)?.message === message) paint(views.at(-1));
  // Stop is replaced by Send, so the focus moves to the text box.
  const lost = document.activeElement === $("stop");
  refresh();
  if (lost) toBox();
  keepConversation();
  if (problem && !stopped) explain(problem);
  else if (messages.at(-1) !== message) offerAnswer();
  else if (message.note) say(message.note);
}

function offerAnswer() {
  if (messages.at(-1)?.role !== "user") return;
  notice("This message has no answer yet.", button("Answer", retry));
}

function send() {
  const content = box.value;
  if (!content.trim() || answering) return;
  if (editing) messages = messages.slice(0, editing.index);
  messages.push({ role: "user", content });
  setBox(editing ? editing.draft : "");
  editing = null;
  keepConversation();
  toBox();
  ask();
}

function again() {
  if (answering || lastUser() < 0) return;
  if (editing) stopEditing();
  const previous = messages.at(-1).role === "assistant" ? messages.pop() : null;
  toBox();
  ask(previous);
}

function retry() {
  toBox();
  if (lastUser() >= 0) again();
  else start();
}

function startEditing() {
  const index = lastUser();
  if (answering || index < 0 || editing) return;
  editing = { index, draft: box.value };
  setBox(messages[index].content);
  refresh();
  box.focus();
}

function stopEditing() {
  setBox(editing.draft);
  editing = null;
  refresh();
  toBox();
}

function newChat() {
  if (editing) stopEditing();
  if (messages.length) cleared = messages.filter((message) => message.content);
  messages = [];
  answering?.abort();
  answering = null;
  notice();
  refresh();
  keepConversation();
  toBox();
}

function undo() {
  messages = cleared;
  cleared = null;
  refresh();
  toEnd();
  keepConversation();
  offerAnswer();
  toBox();
}

// The format of conversations that `openpalm sft` reads.
function saveFile() {
  const said = messages.filter((message) => message.content);
  const line = JSON.stringify({ messages: withSystemPrompt(said) });
  const file = new Blob([`${line}\n`], { type: "application/jsonl" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `chat-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function copy(view) {
  const pressed = view.root.querySelector(".actions button");
  const done = await toClipboard(view.message.content);
  pressed.textContent = done ? "Copied" : "Not allowed";
  say(pressed.textContent);
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // On plain http there is no clipboard API except on localhost; a selection can be copied.
    const focused = document.activeElement;
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

const tip = new Tip($("tip"), log, (node) => views.find((view) => view.text.contains(node)));

// --- the keyboard and the buttons ------------------------------------------------------------

function setBox(text) {
  box.value = text;
  boxChanged();
}

// Not on a touch screen: the focus would open a keyboard over the text.
function toBox() {
  if (!matchMedia("(pointer: coarse)").matches) box.focus();
}

function boxChanged() {
  if (!CSS.supports("field-sizing", "content")) {
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight + 2}px`;
  }
  remember("sessionStorage", "draft", box.value);
  showSend();
}

function boxKey(event) {
  if (event.isComposing) return; // Enter selects a word of the input method
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (answering) say("The answer is still coming in; Escape stops it.");
    else send();
  } else if (event.key === "ArrowUp" && !box.value && lastUser() >= 0) {
    event.preventDefault();
    startEditing();
  } else if (event.key === "PageUp" || event.key === "PageDown") {
    event.preventDefault();
    log.scrollBy(0, (event.key === "PageUp" ? -0.85 : 0.85) * log.clientHeight);
  }
}

function pageKey(event) {
  if ($("settings").open || event.isComposing) return;
  if (event.key === "Escape") {
    tip.hide();
    if (answering) answering.abort();
    else if (editing) stopEditing();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey) {
    // By key position: with Option, a Mac keyboard produces other letters.
    const act = { KeyR: again, KeyN: newChat }[event.code];
    if (!act) return;
    event.preventDefault();
    act();
  }
}

function settingChanged(name) {
  $("model-name").textContent = settings.model;
  if (name !== "show_tokens") return;
  views.forEach(repaint);
  showStats();
  stick();
}

// If the key changed, the last attempt probably failed because of the key.
function settingsClosed(keyChanged) {
  toBox();
  if (keyChanged && !$("notice").hidden && !answering) retry();
  else if (keyChanged) loadModels().catch(explain);
}

async function start() {
  notice();
  try {
    await loadModels();
    offerAnswer();
  } catch (error) {
    explain(error);
  }
}

box.addEventListener("keydown", boxKey);
box.addEventListener("input", boxChanged);
box.form.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
document.addEventListener("keydown", pageKey);
$("open-settings").addEventListener("click", () => openSettings());
$("stop").addEventListener("click", () => answering?.abort());
$("new").addEventListener("click", newChat);
$("undo").addEventListener("click", undo);
$("save").addEventListener("click", saveFile);
$("cancel-edit").addEventListener("click", stopEditing);
window.addEventListener("pagehide", keepConversation);

onSettings(settingChanged, settingsClosed);
setBox(recall("sessionStorage", "draft", ""));
refresh();
start();
