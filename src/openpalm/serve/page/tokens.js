// Finds the text of each token of a completion, and its probability.

const bytesOf = (token) =>
  token.bytes ? Uint8Array.from(token.bytes) : new TextEncoder().encode(token.token);

// A token that is half a character is shown as the server writes it.
function label(token) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytesOf(token));
  } catch {
    return token.token;
  }
}

// Appends to `message.content` and `message.pieces`. A token may end inside a character, and the
// server may hold text back, so tokens are matched with text when both are complete.
export class Aligner {
  tokens = 0;
  #message;
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #group = []; // tokens whose bytes are not yet a whole character
  #waiting = []; // decoded groups; their text has not arrived yet
  #at = 0; // where in the text the next group begins

  constructor(message) {
    this.#message = message;
  }

  push(text, tokens) {
    this.#message.content += text;
    for (const token of tokens) {
      this.tokens += 1;
      this.#group.push(token);
      const decoded = this.#decoder.decode(bytesOf(token), { stream: true });
      if (!decoded) continue;
      this.#waiting.push({ text: decoded, tokens: this.#group });
      this.#group = [];
    }
    this.#match();
  }

  #match() {
    const { content, pieces } = this.#message;
    while (this.#waiting.length && content.length >= this.#at + this.#waiting[0].text.length) {
      const { text, tokens } = this.#waiting.shift();
      // Search a few characters ahead: some tokens have no text.
      const skipped = content.slice(this.#at, this.#at + text.length + 8).indexOf(text);
      if (skipped < 0) continue;
      const start = this.#at + skipped;
      this.#at = start + text.length;
      pieces.push(piece(start, this.#at, tokens));
    }
  }
}

// `top` lists the alternatives: [text, probability, whether it was chosen].
function piece(start, end, tokens) {
  const chance = Math.exp(tokens.reduce((sum, token) => sum + token.logprob, 0));
  const top = (tokens[0].top_logprobs ?? []).map((other) => [
    label(other), Math.exp(other.logprob), other.token === tokens[0].token,
  ]);
  return { start, end, chance, top, tokens: tokens.length };
}

const LEVELS = [0.8, 0.5, 0.2, 0.05];

// 0, as expected, to 4, a surprise.
export const level = (chance) => LEVELS.filter((bound) => chance < bound).length;
