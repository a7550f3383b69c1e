// The server's JSON. Addresses are relative to the page, so that it works behind a path prefix.

const KEY = "vllm-power api key";

export class NoKey extends Error {}
export class Unreachable extends Error {}
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The answer to GET v1/power/PATH?QUERY, or to a POST of `body`. Throws NoKey, Unreachable or Refused. */
export async function ask(path, { query = {}, body, signal } = {}) {
  const url = new URL(`v1/power/${path}`, document.baseURI);
  url.search = new URLSearchParams(query);
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(url, { method: body ? "POST" : "GET", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The server does not answer.");
  }
  if (answer.status === 401) {
    sessionStorage.removeItem(KEY);
    throw new NoKey(key ? "The server did not accept this key." : "");
  }
  const said = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(answer.status, reason(said) || `The server answered ${answer.status}.`);
  return said;
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The cause in an error of FastAPI (`detail`, text or a list), or of vLLM, which prints that list into its message. */
function reason(said) {
  const detail = said?.detail ?? printed(said?.error?.message);
  if (!Array.isArray(detail)) return detail;
  return detail
    .map(({ loc, msg }) => {
      const field = loc.slice(1).join(" ");
      return (field ? `${field}: ` : "") + msg.replace(/^Value error, /, "");
    })
    .join("; ");
}

/** FastAPI's list out of vLLM's message, as far as it is in there: {'loc': 'query.context', 'msg': "..."}. */
function printed(message) {
  const found = message?.matchAll(/'loc': '([^']*)', 'msg': (?:'([^']*)'|"([^"]*)")/g) ?? [];
  const problems = [...found].map(([, loc, plain, quoted]) => ({ loc: loc.split("."), msg: plain ?? quoted }));
  return problems.length ? problems : message;
}
