// The engine's figures, asked for again and again while the page is looked at.

import { NoKey, Unreachable, ask } from "./api.js";
import { byId, cards, element, say } from "./dom.js";
import { count, percent } from "./format.js";

const EVERY = 2_000; // milliseconds
let timer = null;
let paused = false;
let askForKey = null;
let model = "";
let last = null; // the tokens of the answer before, and when

/** Show what serves, and start asking for its figures where there is an engine. */
export function live(info) {
  versions(info.versions);
  if (!info.engine) {
    say("status", "No engine here: this server explains and plans.");
    say("live-text", "There is no engine here. A server started with vllm serve MODEL --attention-backend power shows its figures in this place.");
    return;
  }
  byId("live-pause").hidden = false;
  model = info.model;
  facts(info);
  say("status", `An engine serves ${model} here.`);
  refresh();
}

export function listen(onNoKey) {
  askForKey = onNoKey;
  byId("live-pause").addEventListener("click", () => {
    paused = !paused;
    byId("live-pause").setAttribute("aria-pressed", paused);
    refresh();
  });
  document.addEventListener("visibilitychange", refresh);
}

function refresh() {
  clearTimeout(timer);
  if (paused) say("live-text", "Paused.");
  else if (!document.hidden && !byId("live-pause").hidden) show();
}

async function show() {
  try {
    const said = await ask("live");
    cards(byId("live-figures"), figures(said));
    say("live-text", `Since the engine's start; asked again every ${EVERY / 1000} seconds.`);
    say("status", `An engine serves ${model} here.`);
  } catch (error) {
    if (error instanceof NoKey) return askForKey(error);
    say("live-text", error.message);
    if (error instanceof Unreachable) say("status", error.message);
  }
  clearTimeout(timer); // of an answer that was under way when this one was asked for
  if (!paused && !document.hidden) timer = setTimeout(show, EVERY);
}

function figures(said) {
  const { engines, tokens, blocks_read, blocks_skipped, sequences_running, executions, refusals } = said;
  const { kv_blocks_live, kv_blocks_capacity, kv_blocks_reclaimed } = said;
  const before = blocks_read + blocks_skipped;
  const refused = Object.values(refusals ?? {}).reduce((sum, number) => sum + number, 0);
  return [
    ["Sequences running", count(sequences_running), engines.of > 1 ? `${engines.heard} of ${engines.of} engines heard` : ""],
    ["Tokens computed", count(tokens), rate(tokens)],
    ["Blocks read", before ? percent(blocks_read / before) : "–", `${count(blocks_read)} of ${count(before)} in a layer`],
    ["KV blocks in use", count(kv_blocks_live), `of ${count(kv_blocks_capacity)}`],
    ["KV blocks given back early", count(kv_blocks_reclaimed), ""],
    ...Object.entries(executions ?? {})
      .filter(([, number]) => number)
      .map(([attention, number]) => [`Layers run, ${attention.replaceAll("_", " ")}`, count(number), ""]),
    ...(refused ? [["Steps refused", count(refused), Object.keys(refusals).join(", ").replaceAll("_", " ")]] : []),
  ];
}

/** Tokens a second since the figures before. */
function rate(tokens) {
  const now = performance.now();
  const since = last && tokens >= last.tokens ? (1e3 * (tokens - last.tokens)) / (now - last.now) : null;
  last = { tokens, now };
  return since === null ? "" : `${count(since)} a second`;
}

/** What does not change while the server runs. */
function facts({ model, pattern, executor, layers, page_size, reclamation, max_model_len, note }) {
  const entries = {
    Model: model,
    Pattern: pattern?.text,
    Executor: executor,
    Layers: layers && kinds(layers),
    "Longest sequence": max_model_len && `${count(max_model_len)} tokens`,
    Page: page_size && `${count(page_size)} tokens`,
    "Giving blocks back": reclamation,
    Note: note,
  };
  byId("info").replaceChildren(
    ...Object.entries(entries)
      .filter(([, value]) => value)
      .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
  );
}

/** How many layers run what: `layers` has the numbers of the layers of each kind, and their total. */
function kinds({ total, ...layers }) {
  const some = Object.entries(layers).filter(([, numbers]) => numbers.length);
  return `${some.map(([kind, numbers]) => `${numbers.length} ${kind.replaceAll("_", " ")}`).join(", ")}, of ${total}`;
}

function versions(known) {
  const there = Object.entries(known).filter(([, version]) => version);
  say("versions", there.map(([name, version]) => `${name} ${version}`).join(", "));
}
