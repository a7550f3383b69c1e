// What is drawn on canvases, from what the server computed. Colours are those of the style sheet.

const LEAST = 2; // pixels of a block that is seen, however many there are

/** The canvas's context, scaled to the screen and cleared, its size in CSS pixels, and a look-up of colours. */
function prepare(canvas, height) {
  const width = canvas.clientWidth;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  return { context, width, colour: (name) => style.getPropertyValue(`--${name}`) };
}

/** Which colour a block has that query block `q` sees. */
function kind(pattern, q, k) {
  if (k < pattern.sink_blocks) return "start";
  return q - k < pattern.window_blocks ? "near" : "far";
}

/** The colour of blocks that query block `q` does not see under the pattern: its rows may see everything. */
function unseen(dense, q) {
  return dense !== null && q >= dense ? "dense-row" : "skipped";
}

/** The sequence as a row: the blocks that the query block sees, the others up to it, and what comes after. */
export function strip(canvas, { pattern, blocks, query, visible, dense_from: dense }) {
  const height = 56;
  const { context, width, colour } = prepare(canvas, height);
  const size = width / blocks;
  const gap = size > 6 ? 1 : 0;
  const top = 14;
  const block = (k, fill, least = 0) => {
    context.fillStyle = fill;
    context.fillRect(Math.min(k * size, width - least), top, Math.max(size - gap, least), height - top);
  };
  if (gap) {
    for (let k = 0; k < blocks; k++) block(k, colour(k <= query ? unseen(dense, query) : "later"));
  } else {
    context.fillStyle = colour("later");
    context.fillRect(0, top, width, height - top);
    context.fillStyle = colour(unseen(dense, query));
    context.fillRect(0, top, (query + 1) * size, height - top);
  }
  for (const k of visible) block(k, colour(kind(pattern, query, k)), LEAST);
  const middle = (query + 0.5) * size;
  context.fillStyle = colour("ink");
  context.beginPath();
  context.moveTo(middle, top - 2);
  context.lineTo(Math.max(0, middle - 6), 2);
  context.lineTo(Math.min(width, middle + 6), 2);
  context.fill();
}

/** The block mask: a row for each query block, the chosen one marked. */
export function triangle(canvas, { pattern, rows, dense_from: dense }, chosen) {
  const largest = Math.min(canvas.clientWidth, 560);
  const size = Math.max(1, Math.floor(largest / rows.length));
  const { context, colour } = prepare(canvas, size * rows.length);
  const gap = size > 4 ? 1 : 0;
  rows.forEach((seen, q) => {
    context.fillStyle = colour(unseen(dense, q));
    for (let k = 0; k <= q; k++) context.fillRect(k * size, q * size, size - gap, size - gap);
    for (const k of seen) {
      context.fillStyle = colour(kind(pattern, q, k));
      context.fillRect(k * size, q * size, size - gap, size - gap);
    }
  });
  if (chosen < rows.length) {
    context.strokeStyle = colour("ink");
    context.lineWidth = 2;
    context.strokeRect(1, chosen * size - 1, (chosen + 1) * size - 1, size + 1);
  }
}

/** One layer's receptive field: the blocks that have reached the query block after so many layers. */
export function field(canvas, { blocks, hops }, layers) {
  const { context, width, colour } = prepare(canvas, 14);
  const size = width / blocks;
  const gap = size > 6 ? 1 : 0;
  context.fillStyle = colour("later");
  context.fillRect(0, 0, width, 14);
  context.fillStyle = colour("skipped");
  context.fillRect(0, 0, hops.length * size, 14);
  hops.forEach((hop, k) => {
    if (hop === null || hop > layers) return;
    context.fillStyle = colour(hop === layers ? "far" : "near");
    context.fillRect(k * size, 0, Math.max(size - gap, 1), 14);
  });
}

/** Blocks held while the request runs: all of them with ordinary attention, the live ones with the pattern. */
export function memory(canvas, { blocks, live }) {
  const height = 180;
  const { context, width, colour } = prepare(canvas, height);
  const x = (q) => (blocks > 1 ? (q / (blocks - 1)) * width : 0);
  const y = (held) => height - 2 - (held / blocks) * (height - 6);
  const line = (heights, name, fill) => {
    context.beginPath();
    context.moveTo(0, y(heights(0)));
    for (let q = 0; q < blocks; q++) context.lineTo(x(q), y(heights(q)));
    context.strokeStyle = colour(name);
    context.lineWidth = 2;
    context.stroke();
    if (!fill) return;
    context.lineTo(width, height);
    context.lineTo(0, height);
    context.globalAlpha = 0.2;
    context.fillStyle = colour(name);
    context.fill();
    context.globalAlpha = 1;
  };
  context.strokeStyle = colour("border");
  context.fillStyle = colour("soft");
  context.font = "14px system-ui, sans-serif";
  for (const [share, name] of [[0.5, "half of its blocks"], [1, "all of its blocks"]]) {
    context.beginPath();
    context.moveTo(0, y(share * blocks));
    context.lineTo(width, y(share * blocks));
    context.stroke();
    context.fillText(name, 4, y(share * blocks) + 16);
  }
  context.setLineDash([6, 4]);
  line((q) => q + 1, "dense", false);
  context.setLineDash([]);
  line((q) => live[q], "near", true);
}
