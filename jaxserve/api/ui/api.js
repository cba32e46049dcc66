// The server, as the page talks to it: paths relative to the page, the key on each call, errors with the server's words.

const BASE = new URL(".", document.baseURI.split("#")[0]);
const KEY = "jaxserve.key";

export class ApiError extends Error {
  constructor(status, message, body = {}) {
    super(message);
    this.status = status;
    this.body = body; // {stage, done, total} beside the error while the server starts
  }
}

export const apiKey = {
  get value() {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  },
  get remembered() {
    return localStorage.getItem(KEY) !== null;
  },
  set(value, remember) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (value) (remember ? localStorage : sessionStorage).setItem(KEY, value);
  },
};

/** -> the Response. Throws ApiError for what is not 2xx, and with status 0 where there is no server. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey.value) headers.Authorization = `Bearer ${apiKey.value}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let parsed = {};
  try {
    parsed = JSON.parse(text);
  } catch {
    parsed = {};
  }
  throw new ApiError(response.status, parsed.error?.message ?? parsed.message ?? `${response.status} ${text.slice(0, 300)}`, parsed);
}

export async function getJson(path, options) {
  return (await call(path, options)).json();
}

/** The payloads of a stream of server-sent events, up to [DONE] (WHATWG HTML, section 9.2). */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let over = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      if (over) continue; // to the end, so that the connection can be used again
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, ""))
          .join("\n");
        if (data === "[DONE]") over = true;
        else if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** /health: {ready: true}, or {ready: false, status, stage, done, total, message}. Throws ApiError status 0. */
export async function health() {
  try {
    await call("health");
    return { ready: true };
  } catch (error) {
    if (!(error instanceof ApiError) || error.status === 0) throw error;
    return { ready: false, ...error.body };
  }
}
