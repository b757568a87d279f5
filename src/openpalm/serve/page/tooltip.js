// The tooltip of a token, for mouse, touch and keyboard.

const percent = (chance) =>
  chance < 1e-4 ? "< 0.01 %" : `${(chance * 100).toFixed(chance < 0.1 ? 2 : 1)} %`;

// White space must be visible, and control characters must not reorder the tooltip's text.
const visible = (text) =>
  text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥")
    .replace(/\p{C}/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`) || "(nothing)";

function element(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

function row([text, chance, chosen]) {
  const fill = element("span", "fill");
  fill.style.width = `${chance * 100}%`;
  const cells = [
    element("bdi", "", visible(text)),
    element("span", "bar", fill),
    element("span", "", percent(chance)),
  ];
  return element("div", chosen ? "row chosen" : "row", ...cells);
}

// Shows tooltips over `log`. `find(node)` returns the view { message, tail, at } that contains a
// node. In a view without spans `tail` is the whole text.
export class Tip {
  #tip;
  #log;
  #find;
  #described = null; // the span that the tooltip describes, if any
  #resting = 0;
  #leaving = 0;

  constructor(tip, log, find) {
    this.#tip = tip;
    this.#log = log;
    this.#find = find;
    log.addEventListener("pointermove", (event) => this.#moved(event));
    log.addEventListener("pointerleave", () => this.#leave());
    tip.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    tip.addEventListener("pointerleave", () => this.#leave());
    log.addEventListener("focusin", ({ target }) => {
      if (target.matches(".token")) this.#showSpan(target);
    });
    log.addEventListener("focusout", () => this.hide());
    log.addEventListener("keydown", walk);
    log.addEventListener("scroll", () => this.hide());
  }

  hide() {
    clearTimeout(this.#resting);
    this.#close();
  }

  #close() {
    clearTimeout(this.#leaving);
    this.#tip.hidden = true;
    this.#described?.removeAttribute("aria-describedby");
    this.#described = null;
  }

  // After a delay: the pointer may be moving to the tooltip.
  #leave() {
    clearTimeout(this.#resting);
    clearTimeout(this.#leaving);
    this.#leaving = setTimeout(() => this.#close(), 200);
  }

  #moved(event) {
    const span = event.target.closest(".token");
    if (span) {
      clearTimeout(this.#leaving);
      if (span !== this.#described) this.#showSpan(span);
      return;
    }
    this.#leave();
    // Over text without tint the mouse must rest first, so that tooltips do not flicker while reading.
    if (event.pointerType !== "mouse" || event.buttons) return;
    this.#resting = setTimeout(() => this.#showAt(event.clientX, event.clientY), 500);
  }

  #showSpan(span) {
    const piece = this.#find(span).message.pieces[span.dataset.piece];
    this.#show(this.#find(span), piece, span.getClientRects()[0]);
    this.#described = span;
    span.setAttribute("aria-describedby", this.#tip.id);
  }

  // Without spans: asks the browser for the character at this position.
  #showAt(x, y) {
    const caret = document.caretPositionFromPoint?.(x, y);
    const view = caret && this.#find(caret.offsetNode);
    if (view?.tail !== caret?.offsetNode) return;
    const pieces = view?.message.pieces ?? [];
    const next = pieces.findIndex((piece) => piece.end >= view.at + caret.offset);
    if (next < 0) return;
    // The caret is at the nearer side of a character, so the token may be the next one.
    for (const piece of pieces.slice(next, next + 2)) {
      const range = new Range();
      range.setStart(view.tail, piece.start - view.at);
      range.setEnd(view.tail, piece.end - view.at);
      const under = (r) => x >= r.left && x <= r.right && y >= r.top && y <= r.bottom;
      const rect = [...range.getClientRects()].find(under);
      if (rect) return this.#show(view, piece, rect);
    }
  }

  #show({ message }, piece, rect) {
    this.hide();
    const text = visible(message.content.slice(piece.start, piece.end));
    const several = piece.tokens > 1 ? ` in ${piece.tokens} tokens` : "";
    const head = element("p", "", element("bdi", "", text), ` ${percent(piece.chance)}${several}`);
    this.#tip.replaceChildren(head, ...piece.top.map(row));
    this.#tip.hidden = false;
    this.#place(rect);
  }

  // Above the token if there is room, else below; always inside the window.
  #place(rect) {
    const { offsetWidth, offsetHeight, style } = this.#tip;
    const left = Math.min(rect.left, document.documentElement.clientWidth - offsetWidth - 8);
    const above = rect.top - offsetHeight - 6;
    style.left = `${Math.max(8, left)}px`;
    style.top = `${above > 8 ? above : rect.bottom + 6}px`;
  }
}

// Each completion is one Tab stop; the arrow keys move between its tokens.
function walk(event) {
  const here = event.target.closest(".token");
  if (!here) return;
  const all = [...here.parentNode.querySelectorAll(".token")];
  const i = all.indexOf(here);
  const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: all.length - 1 }[event.key];
  if (!all[to]) return;
  event.preventDefault();
  here.tabIndex = -1;
  all[to].tabIndex = 0;
  all[to].focus();
}
