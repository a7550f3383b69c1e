// Starts the page's parts, and asks for the API key where the server wants one.

import { NoKey, Unreachable, ask, useKey } from "./api.js";
import { byId, say } from "./dom.js";
import * as explanation from "./explain.js";
import * as figures from "./live.js";
import * as planner from "./planner.js";

async function start() {
  try {
    const info = await ask("info");
    wantKey(false);
    const { text, name = "power", ...sizes } = info.pattern ?? {};
    const pattern = { pattern: name, ...sizes };
    figures.live(info);
    await Promise.all([explanation.explain(pattern, info.max_model_len, info.options?.dense_tail), planner.plan(pattern)]);
  } catch (error) {
    fail(error);
  }
}

/** Ask for the key in place of all that needs it, or show that again. */
function wantKey(wanted) {
  byId("key-form").hidden = !wanted;
  document.querySelector("main").hidden = wanted;
  if (wanted) byId("key").focus();
}

function fail(error) {
  if (error.name === "AbortError") return;
  say("status", error.message || "This server wants its API key.");
  if (error instanceof NoKey) {
    wantKey(true);
  } else if (!(error instanceof Unreachable)) {
    throw error;
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key").value = "";
  start();
});
explanation.listen(fail);
figures.listen(fail);
planner.listen(fail);
start();
