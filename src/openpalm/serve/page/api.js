// Requests to the server that serves this page, and their errors.

// An error to show to the user. `status` is the HTTP status, 0 without a response.
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Returns the response, or throws a Refusal, or the AbortError of `signal`.
export async function request(path, { key, body, signal }) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response, key);
  return response;
}

async function refusal(response, key) {
  const { status } = response;
  const answer = await response.json().catch(() => null);
  const reason = answer?.error?.message || `The server answered with status ${status}.`;
  if (status === 401) {
    const wrong = key ? "does not accept this" : "asks for an";
    return new Refusal(`The server ${wrong} API key.`, status);
  }
  if (status !== 429 && status !== 503) return new Refusal(reason, status);
  const wait = Number(response.headers.get("Retry-After"));
  const when = wait > 0 ? `in ${wait} second${wait === 1 ? "" : "s"}` : "in a moment";
  return new Refusal(`The server is busy; try again ${when}. It says: ${reason}`, status);
}

// Yields the chunks of a streamed completion, up to [DONE] or the end. Each is on one line.
export async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The connection broke before the answer was complete.");
  }
}

// An error may arrive inside a stream, after the HTTP status.
function parse(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Refusal("The server sent something this page cannot read.");
  }
  if (chunk.error) throw new Refusal(chunk.error.message);
  return chunk;
}
