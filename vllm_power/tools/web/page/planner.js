// The planner: a form, and what the server estimates for it.

import { ask } from "./api.js";
import { byId, element, say } from "./dom.js";
import { count, prefixed, seconds, short, times } from "./format.js";

const SHAPE = {
  layers: "Layers",
  hidden_size: "Hidden size",
  heads: "Query heads",
  kv_heads: "KV heads",
  head_size: "Head size",
  intermediate_size: "Feed-forward size",
  vocab_size: "Vocabulary",
  experts: "Experts",
  experts_per_token: "Experts of a token",
  expert_size: "Size of an expert",
  window_layers: "Layers with a window",
  window_tokens: "Tokens of that window",
};
const SET_BY_MODE = ["dense_layers", "dense_tail", "decode"];
const MODES = { trained: "trained", training_free: "any checkpoint" };
const OF_MODES = {
  first_token: "Time to the first token",
  decode_step: "Time of a decode step",
  request_bytes: "KV memory of a request, decode",
  workload: "All requests",
};
let choices = null;
let tied = false;

/** Fill the form with what the server knows, and estimate once. `pattern`: the fields of the server's pattern. */
export async function plan(pattern) {
  choices = await ask("planner");
  choices.pattern = pattern;
  byId("model").replaceChildren(
    ...Object.keys(choices.models).map((name) => element("option", {}, name)),
    element("option", { value: "" }, "another one"),
  );
  byId("gpu").replaceChildren(...Object.keys(choices.gpus).map((name) => element("option", {}, name)));
  byId("shape").replaceChildren(
    ...Object.entries(SHAPE).map(([name, label]) =>
      element("div", {}, element("label", { for: `shape-${name}` }, label), element("input", { id: `shape-${name}`, name, type: "number", min: 0, required: "" })),
    ),
  );
  fill(choices.question);
  gpu();
  await estimate();
}

export function listen(onError) {
  const form = byId("plan-form");
  const again = (anew) => estimate(anew).catch(onError);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    again(false);
  });
  form.addEventListener("change", (event) => {
    if (event.target.id === "config") return;
    if (event.target.id === "model" && event.target.value) fill(choices.models[event.target.value]);
    if (event.target.name in SHAPE) byId("model").value = "";
    gpu();
    again(event.target.id === "mode");
  });
  byId("config-read").addEventListener("click", () => read().catch(onError));
}

function fill(values) {
  if (values.tied_embeddings !== undefined) tied = values.tied_embeddings;
  for (const [name, value] of Object.entries(values)) {
    const input = byId("plan-form").elements.namedItem(name);
    if (input) input.value = value;
  }
}

function gpu() {
  const chosen = choices.gpus[byId("gpu").value];
  say(
    "gpu-text",
    `${chosen.memory_gib} GiB; expected to reach ${short(chosen.tflops)} TFLOP/s and ${short(chosen.tb_per_s)} TB/s ` +
      `(${chosen.measured_tflops ? "measured" : "not measured"}; data sheet ${short(chosen.sheet_tflops)} and ${short(chosen.sheet_tb_per_s)}).`,
  );
}

/** Take the shape of a config.json that was pasted. */
async function read() {
  try {
    const shape = await ask("shape", { body: byId("config").value || "{}" });
    fill(shape);
    byId("model").value = "";
    say("config-text", `${count(shape.layers)} layers, ${count(shape.heads)} query heads and ${count(shape.kv_heads)} KV heads of ${count(shape.head_size)}.`);
    await estimate();
  } catch (error) {
    if (error.status === undefined) throw error;
    say("config-text", error.status === 422 ? "This is not the text of a config.json." : error.message);
  }
}

/** `anew`: whether the mode decides on what it sets, in place of the form. */
async function estimate(anew = false) {
  const form = byId("plan-form");
  if (!form.checkValidity()) return;
  const query = { ...choices.pattern, ...Object.fromEntries(new FormData(form)), tied_embeddings: tied };
  if (anew) for (const name of SET_BY_MODE) delete query[name];
  try {
    const answer = await ask("estimate", { query });
    fill(answer.served);
    show(answer, query);
    say("plan-error", "");
  } catch (error) {
    if (error.status === undefined) throw error;
    say("plan-error", error.message);
    byId("plan-result").hidden = true;
  }
}

function show({ prefill, decode, memory, workload, parameters, pattern, modes, served }, query) {
  const { context, output, concurrency } = query;
  const several = Number(concurrency) > 1;
  const row = (label, dense, power, ratio, format) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, label),
      ...[format(dense), format(power), times(ratio)].map((text) => element("td", {}, text)),
    );
  const bytes = (value) => prefixed(value, "B");
  const flops = (value) => prefixed(value, "FLOP");
  const { linear_flops: linear, attention_flops: attention } = prefill;
  const { dense, peak, decode: decoding } = memory.request_bytes;
  byId("plan-rows").replaceChildren(
    row("Attention work of the prompt", attention.dense, attention.power, attention.dense / attention.power, flops),
    row("All work of the prompt", linear + attention.dense, linear + attention.power, (linear + attention.dense) / (linear + attention.power), flops),
    row("Time to the first token", prefill.seconds.dense, prefill.seconds.power, prefill.ratio, seconds),
    row("KV bytes read by a step", decode.kv_bytes.dense, decode.kv_bytes.power, decode.kv_bytes.dense / decode.kv_bytes.power, bytes),
    row("Time of a decode step", decode.seconds.dense, decode.seconds.power, decode.ratio, seconds),
    row("KV memory of a request, peak", dense, peak, dense / peak, bytes),
    row("KV memory of a request, decode", dense, decoding, dense / decoding, bytes),
    row("Requests that fit", memory.fits.dense, memory.fits.power, memory.fits.dense ? memory.fits.power / memory.fits.dense : null, count),
    row(several ? `All ${count(concurrency)} requests` : "The request", workload.seconds.dense, workload.seconds.power, workload.ratio, seconds),
  );
  byId("mode-rows").replaceChildren(
    ...Object.entries(OF_MODES).map(([name, label]) =>
      element("tr", {}, element("th", { scope: "row" }, label), ...Object.keys(MODES).map((mode) => element("td", {}, times(modes[mode][name])))),
    ),
  );
  say("plan-served", `${MODES[served.mode]}: ${rule(served)}`);
  say("plan-caption", `${count(context)} tokens in, ${count(output)} out, ${count(concurrency)} at a time; ${pattern}`);
  const much = `${parameters < 1e8 ? `${short(parameters / 1e6)} million` : `${short(parameters / 1e9)} billion`} parameters take ${bytes(memory.weight_bytes)}, ${bytes(memory.kv_space_bytes)} are left for the KV cache.`;
  say("plan-text", `${verdict(memory.fits, workload, several)} ${much}`);
  byId("plan-result").hidden = false;
}

/** What is dense under `served`, as text. */
function rule({ dense_layers, dense_tail, decode }) {
  const rows = [Number(dense_tail) ? `the last ${count(dense_tail)} tokens of the prompt` : "", decode === "dense" ? "generated tokens" : ""].filter(Boolean);
  const all = rows.length ? `${rows.join(" and ")} see every earlier token` : "every token sees the pattern";
  return `${all}; ${count(dense_layers)} layer${Number(dense_layers) === 1 ? " stays" : "s stay"} dense.`;
}

function verdict({ dense, power }, { ratio }, several) {
  if (!power) return "Not one request of this length fits: take more or larger GPUs, or fewer bits.";
  const these = several ? "these requests" : "this request";
  if (!dense) return `With ordinary attention not one request of this length fits; with the pattern ${count(power)} do.`;
  return ratio > 1.05
    ? `Expect ${these} to be done ${times(ratio)} as fast as with ordinary attention.`
    : `Expect no difference for ${these}: attention is a small part of the work here.`;
}
