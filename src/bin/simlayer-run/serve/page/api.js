// What the server is asked. Addresses are relative to the page's.

/** What went wrong, to be shown; `status` where the server answered. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function ask(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  let message = text.slice(0, 500) || response.statusText;
  try {
    message = JSON.parse(text).error?.message ?? message;
  } catch {
    // A proxy's page, perhaps.
  }
  throw new ApiError(message, response.status);
}

export const get = async (path, key) => (await ask(path, key)).json();

/**
 * The parts of an answer as they come: `{text, reasoning}`, and last `{finish, usage, timings, kv}` as far as the server
 * tells them.
 */
export async function* chat(messages, sampling, key, signal) {
  const body = { messages, ...sampling, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const end = {};
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      yield end;
      return;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server gave up.");
    for (const name of ["usage", "timings"]) if (chunk[name]) end[name] = chunk[name];
    const kv = chunk.kv ?? chunk.usage?.kv;
    if (kv) end.kv = kv;
    const choice = chunk.choices?.[0];
    if (choice?.finish_reason) end.finish = choice.finish_reason;
    const { content, reasoning_content: reasoning } = choice?.delta ?? {};
    if (content || reasoning) yield { text: content ?? "", reasoning: reasoning ?? "" };
  }
  throw new ApiError("The connection ended before the answer did.");
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
      if (line === "" && data.length > 0) {
        yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  }
}
