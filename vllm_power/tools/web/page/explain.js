// The explanation: what a token sees, how that grows layer by layer, what it saves. The server computes, this draws.

import { ask } from "./api.js";
import { byId, cards, element, say } from "./dom.js";
import { field, memory, strip, triangle } from "./draw.js";
import { count, percent, runs, times } from "./format.js";

const SHOWN_BLOCKS = 64; // of the block mask; more are too small to tell apart
const shown = { pattern: {}, tokens: 16_384, query: null, layers: 5, tail: 0, drawing: null, mask: null };
let asked = null;

/** Draw for the first time. `pattern`: the fields of the server's pattern, to be asked for again. `tail`: its dense tail. */
export async function explain(pattern, tokens, tail = 0) {
  shown.pattern = pattern;
  shown.tail = tail;
  if (tokens) shown.tokens = tokens;
  await update();
}

export function listen(onError) {
  const set = (field, value) => {
    if (!Number.isInteger(value) || value < (field === "query" || field === "tail" ? 0 : 1)) return;
    if (field === "tokens") shown.query = null; // from the end of the new length
    shown[field] = value;
    update().catch(onError);
  };
  const pair = (field, ofSlider = Number) => {
    byId(`${field}-slider`).addEventListener("input", (event) => set(field, ofSlider(event.target.value)));
    byId(field).addEventListener("input", (event) => set(field, Number(event.target.value)));
  };
  pair("tokens", (step) => 2 ** step);
  pair("query");
  pair("layers");
  byId("tail").addEventListener("input", (event) => set("tail", Number(event.target.value)));

  const canvas = byId("strip");
  canvas.addEventListener("keydown", (event) => {
    const last = shown.drawing.blocks - 1;
    const query = shown.drawing.query;
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    const ends = { Home: 0, End: last };
    const wanted = ends[event.key] ?? (event.key in steps ? query + steps[event.key] : null);
    if (wanted === null) return;
    event.preventDefault();
    set("query", Math.max(0, Math.min(last, wanted)));
  });
  canvas.addEventListener("pointerdown", (event) => {
    const place = event.offsetX / canvas.clientWidth;
    set("query", Math.max(0, Math.min(shown.drawing.blocks - 1, Math.floor(place * shown.drawing.blocks))));
  });
  new ResizeObserver(() => draw()).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

/** Ask for what is chosen, then show it. A newer choice takes the place of one that is still under way. */
async function update() {
  asked?.abort();
  asked = new AbortController();
  const { signal } = asked;
  const query = { ...shown.pattern, tokens: shown.tokens, layers: shown.layers, dense_tail: shown.tail };
  try {
    const drawing = await ask("pattern", {
      query: shown.query === null ? query : { ...query, query: shown.query },
      signal,
    });
    const most = SHOWN_BLOCKS * drawing.pattern.block_size;
    const mask =
      shown.tokens <= most ? drawing : shown.mask?.tokens === most && shown.mask.dense_from === null ? shown.mask : await ask("pattern", { query: { ...query, tokens: most, dense_tail: 0 }, signal });
    if (signal.aborted) return;
    Object.assign(shown, { drawing, mask });
    say("drawing-error", "");
    describe(drawing);
    draw();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status !== 422 && error.status !== 400) throw error;
    say("drawing-error", error.message);
  }
}

function describe(drawing) {
  const { pattern, tokens, blocks, query, visible, dense_from: dense, density, live } = drawing;
  const read = dense !== null && query >= dense ? query + 1 : visible.length;
  const size = pattern.block_size;
  controls(drawing);
  byId("tail").max = tokens;
  byId("dense-row").hidden = dense === null;
  const first = query * size;
  const last = Math.min(first + size, tokens) - 1;
  say(
    "sees-text",
    `A text of ${count(tokens)} tokens is ${count(blocks)} blocks of ${count(size)}. The tokens of block ${count(query)} ` +
      `(${count(first)} to ${count(last)}) see ${count(visible.length)} of the ${count(query + 1)} blocks up to their own: ${runs(visible)}.` +
      (read > visible.length ? ` Those among the last ${count(shown.tail)} of the text see all of them.` : ""),
  );
  const canvas = byId("strip");
  canvas.setAttribute("aria-valuemax", blocks - 1);
  canvas.setAttribute("aria-valuenow", query);
  canvas.setAttribute("aria-valuetext", `block ${count(query)} of ${count(blocks)}, sees ${count(visible.length)} blocks`);
  say("strip-end", `token ${count(tokens - 1)}`);
  say(
    "triangle-text",
    (blocks > SHOWN_BLOCKS ? `The first ${SHOWN_BLOCKS} blocks, because more are too small to tell apart. ` : "") +
      "Each row is a block that looks back, each column a block that it may see. Ordinary attention would fill the triangle.",
  );
  fields(drawing);
  const share = read / (query + 1);
  const peak = Math.max(...live);
  cards(byId("savings"), [
    ["Blocks this block reads", `${count(read)} of ${count(query + 1)}`, percent(share)],
    ["Attention work, whole text", percent(density), `ordinary attention: ${times(1 / density)} as much`],
    ["Memory at its peak", percent(peak / blocks), `${count(peak)} of ${count(blocks)} blocks of KV cache`],
    ["Memory at the end", percent(live.at(-1) / blocks), `${count(live.at(-1))} of ${count(blocks)} blocks`],
  ]);
  say(
    "memory-text",
    `KV memory of a request while its ${count(blocks)} blocks are computed, from left to right. ` +
      (dense === null
        ? "The pattern is fixed, so it is known which blocks no later token can see; they go back to the pool."
        : "The last tokens see every block, so none goes back to the pool before the end of the text."),
  );
}

function controls({ tokens, blocks, query, layers }) {
  const value = (id, number, most) => {
    const input = byId(id);
    if (most !== undefined) input.max = most;
    if (input !== document.activeElement || input.type === "range") input.value = number;
  };
  value("tokens", tokens);
  value("tokens-slider", Math.round(Math.log2(tokens)));
  byId("tokens-slider").setAttribute("aria-valuetext", `${count(tokens)} tokens`);
  for (const id of ["query", "query-slider"]) value(id, query, blocks - 1);
  value("layers", layers);
  value("tail", shown.tail);
  value("layers-slider", layers);
}

/** The receptive field after 1, 2, … layers, until the number chosen or until everything is reached. */
function fields({ hops, layers, query, reached, layers_to_cover }) {
  const last = Math.min(layers, layers_to_cover ?? layers);
  const rows = byId("fields");
  while (rows.children.length > last) rows.lastChild.remove();
  while (rows.children.length < last) {
    rows.append(element("li", {}, element("span"), element("canvas", { "aria-hidden": "true" }), element("span")));
  }
  [...rows.children].forEach((row, index) => {
    const there = hops.filter((hop) => hop !== null && hop <= index + 1).length;
    row.firstChild.textContent = `${index + 1} layer${index ? "s" : ""}`;
    row.lastChild.textContent = `${count(there)} block${there === 1 ? "" : "s"}${there === query + 1 ? ", all" : ""}`;
  });
  const after = (number) => `After ${number} layer${number === 1 ? "" : "s"}`;
  const blocks = `${reached > query ? "all" : `${count(reached)} of the`} ${count(query + 1)} blocks`;
  const cover =
    layers_to_cover === null
      ? " However many layers there are, some blocks never reach it."
      : reached > query ? "" : ` ${after(layers_to_cover)} all of them have.`;
  say("reaches-text", `What a block saw in one layer, it passes on in the next. ${after(layers)} ${blocks} have reached block ${count(query)}.${cover}`);
}

function draw() {
  if (!shown.drawing) return;
  strip(byId("strip"), shown.drawing);
  triangle(byId("triangle"), shown.mask, shown.drawing.query);
  [...byId("fields").querySelectorAll("canvas")].forEach((canvas, index) => field(canvas, shown.drawing, index + 1));
  memory(byId("memory"), shown.drawing);
}
