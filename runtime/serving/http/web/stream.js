// Requests to the server, and the events of a streamed answer.

const LOST = "The connection to the server was lost.";

/** A refusal or failure that the server reported. `status` is 0 if there was no response. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Sends a request and returns the response; throws a ServerError for any that is not a success. */
export async function request(path, { key, body, signal } = {}) {
  const headers = {};
  if (key) headers["Authorization"] = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
      credentials: "omit", cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (!response.ok) throw new ServerError(await refusal(response), response.status);
  return response;
}

async function refusal(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // Not in the form of OpenAI's errors: the status has to do.
  }
  const wait = response.headers.get("Retry-After");
  return wait ? `${message} Try again in ${wait} s.` : message;
}

/** Yields the events of a response as objects, up to "[DONE]"; throws a ServerError for an event that is an error. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError(LOST);
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message ?? "The server failed.", 500);
        yield event;
      }
    }
  } catch (error) {
    // The browser's own words for a lost connection say nothing to a reader.
    throw error instanceof ServerError || error.name === "AbortError" ? error : new ServerError(LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
}
