"use strict";

/* The page of an item: keys, drafts, the active time. Every part works without it.

   A control names its key in data-key; the item is replaced by htmx after each judgement.
   `token` is in base.js; rankings are in ranking.js. */

const DRAFT_AFTER_MS = 800;
const POLL_MS = 700;
const SETTLE_MS = 250; // a second Enter within this time was meant for the item before

const find = (selector) => document.querySelector(selector);
const form = () => find("#judgement");
const typing = (node) => node.matches?.("textarea, select, input:not([type=radio], [type=checkbox])");
const say = (text) => { find("#said").textContent = text; };
const note = (text) => { if (find("#saved")) find("#saved").textContent = text; }; // seen and said

/* The time that the page was in sight. */

let since = 0; // when it came into sight; 0 while hidden
let before = 0;
let shownAt = 0;

const activeMs = () => Math.round(before + (since ? performance.now() - since : 0));

function startClock() {
  before = Number(find("#item [name=elapsed_ms]")?.value) || 0;
  since = document.hidden ? 0 : performance.now();
  shownAt = performance.now();
}

function readClock() {
  const field = form()?.elements.elapsed_ms;
  if (field) field.value = activeMs();
}

document.addEventListener("submit", readClock, true);
document.addEventListener("visibilitychange", () => {
  before = activeMs();
  since = document.hidden ? 0 : performance.now();
  if (document.hidden) saveDraft();
});

/* Drafts: saved when something changed, also when the page is left. */

let saved = "";
let timer = 0;

function typed() {
  const fields = new FormData(form());
  fields.delete("elapsed_ms");
  fields.delete("csrfmiddlewaretoken");
  return new URLSearchParams(fields).toString();
}

async function saveDraft() {
  clearTimeout(timer);
  const url = find("#item")?.dataset.draft;
  const now = url && form() ? typed() : saved;
  if (now === saved) return;
  saved = now;
  const body = new URLSearchParams(`${now}&elapsed_ms=${activeMs()}`);
  const keepalive = body.toString().length < 60000; // the limit of browsers
  const sent = { method: "POST", headers: { "x-csrftoken": token() }, body, keepalive };
  const answer = await fetch(url, sent).catch(() => null);
  if (find("#item")?.dataset.draft !== url) return;
  if (answer?.status !== 204) saved = ""; // tried again after the next change
  note(answer?.status === 204 ? "Draft saved" : "Draft not saved");
}

function later() {
  note("");
  clearTimeout(timer);
  timer = setTimeout(saveDraft, DRAFT_AFTER_MS);
}

document.addEventListener("input", (event) => {
  if (form()?.contains(event.target)) later();
  const unchanged = form()?.elements.unchanged; // "good as it is" ends when the text is edited
  if (event.target.id === "text" && unchanged) unchanged.checked = false;
});

/* Keys. */

function press(event) {
  const { target, key } = event;
  if (event.defaultPrevented || event.altKey || event.metaKey) return;
  if (typing(target)) {
    if (key === "Escape") target.blur();
    if (key === "Enter" && event.ctrlKey) sendBy(event, target);
    return;
  }
  if (event.ctrlKey || event.repeat) return;
  if (key === "Enter") {
    if (!target.closest("a, summary, button:not([data-chip])")) submitBy(event, target);
    return;
  }
  if (key === "Escape") closePanels();
  const name = key.toLowerCase();
  if (scrollAnswers(event) || rankBy(event) || rateBy(event)) return event.preventDefault();
  const control = [...document.querySelectorAll("#item [data-key]")].find((node) =>
    node.dataset.key.toLowerCase().split(" ").includes(name));
  if (!control) return;
  event.preventDefault();
  use(control);
}

function use(control) {
  if (control.matches("textarea")) return control.focus();
  control.click();
  if (control.matches("input")) focus(control);
  if (!control.matches("summary")) return;
  const panel = control.parentElement;
  if (panel.open) focus(panel.querySelector("textarea") ?? control);
  else leavePanel();
}

// A control in sight is focused where it is: the text above it must not move away.
function focus(node) {
  const box = node.getBoundingClientRect();
  node.focus({ preventScroll: box.top >= 0 && box.bottom <= innerHeight });
}

// So that the next Enter submits, and does not open the panel again.
function leavePanel() {
  if (document.activeElement?.closest("details")) find("#item h1[tabindex]")?.focus({ preventScroll: true });
}

function submitBy(event, target) {
  event.preventDefault();
  if (performance.now() - shownAt < SETTLE_MS || find(".htmx-request")) return;
  const inFlag = target.closest?.("#flag");
  const button = inFlag ? inFlag.querySelector("button") : find("#item [data-key=Enter]");
  if (!button) return;
  if (!inFlag && !isJudged()) return note("Choose first");
  button.click();
}

function sendBy(event, target) {
  if (form()?.contains(target)) return submitBy(event, target);
  const sends = target.form?.querySelectorAll("[data-send]");
  if (!sends?.length) return note("Press Esc, then A or B");
  event.preventDefault();
  sends[0].click();
}

// The server checks everything; this only keeps an early Enter from asking it.
function isJudged() {
  const radios = new Set([...form().querySelectorAll(".bar input[type=radio]")].map((radio) => radio.name));
  return [...radios].every((name) => form().elements[name].value);
}

function closePanels() {
  leavePanel();
  for (const panel of document.querySelectorAll("#item details[open]")) panel.open = false;
}

// On wide screens long answers scroll by themselves: together, whatever has the focus. The page
// itself moves first where it hides a part of them.
function scrollAnswers({ key, target }) {
  const share = { PageDown: 0.9, PageUp: -0.9 }[key];
  const box = share && !target.closest?.(".answer") && find(".answers.long");
  if (!box || (share > 0 && box.getBoundingClientRect().bottom > find(".bar").getBoundingClientRect().top)) return false;
  const before = [...box.children].map((answer) => answer.scrollTop);
  for (const answer of box.children) answer.scrollBy({ top: share * answer.clientHeight });
  return [...box.children].some((answer, n) => answer.scrollTop !== before[n]);
}

/* Rating: digits rate the current axis and go on to the next. */

const axesOf = () => [...document.querySelectorAll("[data-axis]")];

function currentAxis() {
  const axes = axesOf();
  return axes.find((axis) => axis.classList.contains("current")) ?? axes[0];
}

function goTo(axis) {
  for (const other of axesOf()) other.classList.toggle("current", other === axis);
}

function rateBy(event) {
  const axis = currentAxis();
  if (!axis) return false;
  const axes = axesOf();
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) {
    const next = axes[axes.indexOf(axis) + step] ?? axis;
    goTo(next);
    (next.querySelector(":checked") ?? next.querySelector("input")).focus();
    return true;
  }
  const radio = /^[1-5]$/.test(event.key) && axis.querySelector(`[value="${event.key}"]`);
  if (!radio) return false;
  use(radio);
  goTo(axes.find((other) => !other.querySelector(":checked")) ?? axis);
  say(`${axis.querySelector("legend").textContent} ${event.key}`);
  return true;
}

document.addEventListener("focusin", (event) => {
  const axis = event.target.closest?.("[data-axis]");
  if (axis) goTo(axis);
});

/* The live chat: the answers grow while the rest of the page stays as it is. */

let polling = 0;

async function poll() {
  const item = find("#item[data-poll]");
  if (!item) return;
  try {
    const answer = await fetch(item.dataset.poll, { headers: { "HX-Request": "true" } });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const growing = fresh.querySelector("#growing");
    if (growing && item.isConnected) {
      find("#growing").replaceChildren(...growing.childNodes);
      if (!fresh.querySelector("#item[data-poll]")) {
        delete item.dataset.poll;
        say("Both models have answered.");
      }
    }
  } catch { /* the next time perhaps */ }
  waitToPoll();
}

function waitToPoll() {
  clearTimeout(polling);
  if (find("#item[data-poll]")) polling = setTimeout(poll, POLL_MS);
}

/* Answers of the server, and what keeps a judgement that could not be sent. */

function trouble(text) {
  const note = find("#trouble");
  note.textContent = text;
  note.hidden = !text;
}

document.addEventListener("htmx:configRequest", (event) => {
  readClock();
  const { parameters } = event.detail;
  if (parameters.elapsed_ms !== undefined) parameters.elapsed_ms = String(activeMs());
});
document.addEventListener("htmx:beforeRequest", (event) => {
  if (form()?.contains(event.target)) clearTimeout(timer);
  else saveDraft(); // an undo leaves the item that was begun
});
document.addEventListener("htmx:sendError", () =>
  trouble("The server cannot be reached. Your judgement is still here: submit it again in a moment."));
document.addEventListener("htmx:responseError", (event) => {
  const { status } = event.detail.xhr;
  trouble(status === 403
    ? "The server refused this (403): perhaps you signed out. Your judgement is still here: sign in in another tab, then submit it again."
    : `The server could not take this (${status}). Your judgement is still here: submit it again in a moment.`);
});
document.addEventListener("htmx:beforeSwap", (event) => {
  // An expired session answers with the page of the sign-in.
  if (event.detail.target.id !== "item" || event.detail.serverResponse.trimStart().startsWith('<section id="item"')) return;
  if (event.detail.xhr.status >= 400) return;
  event.detail.shouldSwap = false;
  trouble("You are signed out. Your judgement is still here: sign in in another tab, then submit it again.");
});

let open = {};
document.addEventListener("htmx:beforeSwap", () => {
  // Guidelines that opened because they are new do not stay open.
  open = { guidelines: find("#guidelines[open]:not(:has(.notice))"), keys: find("#keys[open]") };
});
document.addEventListener("htmx:afterSwap", (event) => {
  trouble("");
  for (const [id, was] of Object.entries(open)) if (was && find(`#${id}`)) find(`#${id}`).open = true;
  begin();
  const error = find("#error");
  const isSame = event.detail.requestConfig?.path.endsWith("/view"); // formatted, or as written
  say(error || isSame || find("#talk") ? "" : form() ? "Next item." : "Nothing is left to judge.");
  const field = find("#flag[open] textarea");
  (field ?? error ?? find("#item h1[tabindex]"))?.focus({ preventScroll: !error });
  if (!error) find("#growing")?.scrollIntoView({ block: "nearest" });
});

function begin() {
  startClock();
  saved = form() ? typed() : "";
  goTo(axesOf().find((axis) => !axis.querySelector(":checked")) ?? axesOf()[0]);
  beginRanking();
  waitToPoll();
}

document.addEventListener("keydown", press);
begin();
