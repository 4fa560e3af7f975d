/** The server's HTTP API: JSON in, JSON out, and every refusal in words. */

const KEY = "livestyle-token";

/** The server said no: `message` and `hint` are for the user. `status` 0: it did not answer at all. */
export class Refusal extends Error {
  constructor(status, message, hint = "", retryAfter = 0) {
    super(message);
    Object.assign(this, { name: "Refusal", status, hint, retryAfter });
  }
}

/** Take `?token=` or `#token=` out of the address and keep it for this tab; it is not left for others to read. */
export function takeToken() {
  const url = new URL(location.href);
  const inHash = new URLSearchParams(url.hash.slice(1));
  const found = url.searchParams.get("token") ?? inHash.get("token");
  if (found === null) return;
  setToken(found);
  url.searchParams.delete("token");
  inHash.delete("token");
  url.hash = inHash.toString();
  history.replaceState(null, "", url);
}

export const token = () => sessionStorage.getItem(KEY) ?? "";
export const setToken = (value) => sessionStorage.setItem(KEY, value);
export const bearer = () => (token() ? { Authorization: `Bearer ${token()}` } : {});

/** A path with the token in its query, for what cannot send a header: pictures, downloads, WebSockets. */
export function withToken(path) {
  if (!token()) return path;
  return `${path}${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(token())}`;
}

/** What a refused response says; reads our {"error", "hint"} and FastAPI's {"detail"}. */
export async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const detail = Array.isArray(body.detail) ? body.detail[0]?.msg : body.detail;
  const words = body.error ?? detail ?? `the server answered ${response.status} ${response.statusText}`.trim();
  return new Refusal(response.status, words, body.hint ?? "", Number(response.headers.get("Retry-After")) || 0);
}

async function request(method, path, body) {
  const headers = bearer();
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refusal(0, "the server does not answer", "Is `livestyle serve` still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Call the API; returns the parsed JSON, or null where there is none. Raises `Refusal`. */
export async function call(method, path, body) {
  const response = await request(method, `/api/v1${path}`, body);
  return response.headers.get("Content-Type")?.includes("json") ? response.json() : null;
}

/** The bytes behind a path, with the token as a header. Raises `Refusal`. */
export async function blob(path) {
  return (await request("GET", path)).blob();
}

export const streamPath = (name, rest = "") => `/streams/${encodeURIComponent(name)}${rest}`;
