// Small helpers on the document. Text only ever becomes text (textContent), never markup.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; strings among these become text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Fill a <dl> with cards: a title, a value and perhaps a line below it. */
export function cards(list, entries) {
  list.replaceChildren(
    ...entries.map(([title, value, more]) =>
      element("div", {}, element("dt", {}, title), element("dd", {}, element("strong", {}, value), ...(more ? [element("span", {}, more)] : []))),
    ),
  );
}

export function say(id, text) {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text;
  if (place.classList.contains("error")) place.hidden = !text;
}
