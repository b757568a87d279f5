"use strict";

/* A ranking by keys, by pressing answers, by dragging them. The selects of the page hold the truth
   and are all there is without JavaScript. `find`, `say` and `later` are in label.js. */

const selects = () => [...document.querySelectorAll("[data-answer]")];
const placeOf = (answer) => Number(selects().find((one) => one.dataset.answer === answer).value);
let placed = []; // answers in the order in which they got their places, to take the last one back
let tieNext = false;

function beginRanking() {
  placed = selects().filter((one) => one.value).sort((a, b) => a.value - b.value).map((one) => one.dataset.answer);
  tieNext = false;
  drawRanking();
}

function setPlace(answer, place) {
  const select = selects().find((one) => one.dataset.answer === answer);
  select.value = place ? String(place) : "";
  placed = placed.filter((other) => other !== answer);
  if (place) placed.push(answer);
  drawRanking();
  later();
  say(place ? `Answer ${answer}: place ${place}` : `Answer ${answer}: no place`);
}

// The best place that is free, or the place of the answer before.
function placeNext(answer) {
  const last = placed.filter((other) => other !== answer).at(-1);
  const taken = new Set(selects().filter((one) => one.dataset.answer !== answer).map((one) => Number(one.value)));
  let free = 1;
  while (taken.has(free)) free++;
  const place = tieNext && last ? placeOf(last) : free;
  tieNext = false;
  setPlace(answer, place);
}

function tie() {
  tieNext = !tieNext;
  drawRanking();
  say(tieNext ? "The next answer ties with the last one." : "No tie.");
}

function takeBack(answer = placed.at(-1)) {
  if (answer) setPlace(answer, 0);
}

// An answer typed when each has its place begins a new ranking.
function typeAnswer(answer) {
  if (selects().every((one) => one.value)) {
    for (const select of selects()) select.value = "";
    placed = [];
  }
  placeNext(answer);
}

/* What is drawn: the answers without a place, the places, two buttons. */

function drawRanking(focused = document.activeElement?.dataset?.rank) {
  const box = find(".ranking");
  if (!box) return;
  const count = Number(box.dataset.places);
  const list = box.querySelector(".places") ?? box.appendChild(document.createElement("ol"));
  list.className = "places";
  list.replaceChildren(...Array.from({ length: count + 1 }, (_, place) => drawPlace(place, count)), drawButtons());
  if (focused) list.querySelector(`[data-rank="${focused}"]`)?.focus({ preventScroll: true });
}

function drawPlace(place, count) {
  const item = document.createElement("li");
  const answers = selects().filter((select) => Number(select.value) === place).map((select) => select.dataset.answer);
  item.dataset.place = place;
  item.hidden = place === 0 && answers.length === 0;
  if (place === 0) item.className = "tray";
  const rank = document.createElement("span");
  rank.className = "rank";
  rank.textContent = place === 0 ? "Answers" : place === 1 ? "1 best" : place === count ? `${place} worst` : String(place);
  item.append(rank, ...answers.map((answer) => drawAnswer(answer, place)));
  return item;
}

function drawButton(name, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.rank = name;
  button.textContent = text;
  return button;
}

function drawAnswer(answer, place) {
  const button = drawButton(answer, answer);
  button.draggable = true;
  button.dataset.chip = answer;
  button.setAttribute("aria-label", place ? `Answer ${answer}, place ${place}; take back` : `Answer ${answer}, no place; give it the next place`);
  return button;
}

function drawButtons() {
  const item = document.createElement("li");
  item.className = "tools";
  for (const [name, text, key] of [["tie", "Tie", "T"], ["back", "Take back", "⌫"]]) {
    const button = drawButton(name, `${text} `);
    const kbd = document.createElement("kbd");
    kbd.textContent = key;
    kbd.setAttribute("aria-hidden", "true");
    button.append(kbd);
    button.disabled = !placed.length;
    if (name === "tie") {
      button.setAttribute("aria-pressed", String(tieNext));
      button.title = "The next answer gets the place of the last one";
    }
    item.append(button);
  }
  return item;
}

/* What is pressed, typed and dragged. */

document.addEventListener("click", (event) => {
  const { rank, chip } = event.target.closest?.("[data-rank]")?.dataset ?? {};
  if (rank === "tie") tie();
  else if (rank === "back") takeBack();
  else if (chip && placeOf(chip)) takeBack(chip);
  else if (chip) placeNext(chip);
});

// Whether the key belongs to the ranking. 0 is the tenth answer.
function rankBy(event) {
  const box = find(".ranking");
  if (!box) return false;
  const answer = event.key === "0" ? "10" : event.key;
  const chip = event.target.dataset?.chip;
  const count = Number(box.dataset.places);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (chip && step) setPlace(chip, Math.min(count, Math.max(0, placeOf(chip) + step)));
  else if (answer.toLowerCase() === "t") tie();
  else if (answer === "Backspace") takeBack();
  else if (selects().some((one) => one.dataset.answer === answer)) typeAnswer(answer);
  else return false;
  return true;
}

document.addEventListener("dragstart", (event) => {
  const { chip } = event.target.dataset ?? {};
  if (!chip) return;
  event.dataTransfer.setData("text/plain", chip);
  event.dataTransfer.effectAllowed = "move";
  for (const zone of document.querySelectorAll(".places [data-place]")) zone.hidden = false;
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    const zone = event.target.closest?.(".places [data-place]");
    if (!zone) return;
    zone.classList.toggle("over", kind === "dragover");
    if (kind === "dragover") event.preventDefault();
    if (kind !== "drop") return;
    event.preventDefault();
    const answer = event.dataTransfer.getData("text/plain");
    if (selects().some((one) => one.dataset.answer === answer)) setPlace(answer, Number(zone.dataset.place));
  });
}
document.addEventListener("change", (event) => {
  if (event.target.dataset?.answer) drawRanking();
});
