// Numbers and lists as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const count = (number) => whole.format(number);
export const short = (number) => three.format(number);

export function percent(share) {
  return `${share >= 0.9995 ? 100 : short(100 * share)}%`;
}

export function times(ratio) {
  return ratio === null ? "–" : `${ratio >= 100 ? count(ratio) : ratio.toFixed(ratio < 9.95 ? 2 : 1)}×`;
}

export function seconds(value) {
  if (value === null) return "does not fit";
  if (value < 0.9995) return `${short(1e3 * value)} ms`;
  if (value < 120) return `${short(value)} s`;
  return value < 7200 ? `${short(value / 60)} min` : `${short(value / 3600)} h`;
}

/** With a decimal prefix: 1.2e15 and "FLOP" make "1.2 PFLOP". */
export function prefixed(value, unit) {
  const step = value < 1e3 ? 0 : Math.min(6, Math.floor(Math.log10(value) / 3));
  return `${short(value / 1e3 ** step)} ${["", "k", "M", "G", "T", "P", "E"][step]}${unit}`;
}

const ENDS = 12; // parts of a long list that are shown at each of its ends

/** Ascending numbers with runs drawn together: 0, 31, 59–63. */
export function runs(numbers) {
  const parts = [];
  for (let i = 0; i < numbers.length; ) {
    let end = i;
    while (numbers[end + 1] === numbers[end] + 1) end++;
    const from = count(numbers[i]);
    if (end - i < 2) for (let j = i; j <= end; j++) parts.push(count(numbers[j]));
    else parts.push(`${from}–${count(numbers[end])}`);
    i = end + 1;
  }
  if (parts.length > 2 * ENDS) parts.splice(ENDS, parts.length - 2 * ENDS, "…");
  return parts.join(", ");
}
