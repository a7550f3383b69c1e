// What a person who checks accessibility would look at, as functions for tests/web/test_page_access.py.

/** Text whose contrast with what is behind it is below WCAG's AA: {element: contrast}. */
function lowContrast() {
  const parse = (text) => text.match(/[\d.]+/g).map(Number);
  const linear = (c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
  };
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
    if (!(own || node.matches("input, select, textarea")) || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const [bright, dark] = [light(parse(style.color)), light(behind(node))].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < (large ? 3 : 4.5)) found[`${node.tagName}#${node.id}.${node.className}`] = contrast;
  }
  return found;
}

/** What assistive technology would stumble over, in words. */
function problems() {
  const found = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const named = (node) => {
    const told = node.labels?.length || node.getAttribute("aria-label") || node.getAttribute("aria-labelledby");
    return told || (!node.matches("input, select, textarea") && node.textContent.trim());
  };
  for (const node of all("input, select, textarea, button, a, section, nav, [role]")) {
    if (!named(node) && !node.matches("[role=alert], [role=status]")) found.push(`no name: ${node.outerHTML.slice(0, 80)}`);
  }
  for (const node of all("canvas")) {
    if (!node.getAttribute("role") && node.getAttribute("aria-hidden") !== "true") found.push("a canvas without a role");
  }
  const ids = all("[id]").map((node) => node.id);
  for (const id of new Set(ids.filter((id, at) => ids.indexOf(id) !== at))) found.push(`twice: ${id}`);
  for (const attribute of ["aria-labelledby", "aria-describedby", "for"]) {
    for (const node of all(`[${attribute}]`)) {
      for (const id of node.getAttribute(attribute).split(" ")) if (!ids.includes(id)) found.push(`nothing is called ${id}`);
    }
  }
  let level = 0;
  for (const heading of all("h1, h2, h3")) {
    if (heading.tagName[1] > level + 1) found.push(`a level is left out before ${heading.textContent}`);
    level = Number(heading.tagName[1]);
  }
  for (const name of ["h1", "main"]) if (all(name).length !== 1) found.push(`not one ${name}`);
  for (const cell of all("th")) if (!cell.scope) found.push(`a heading cell without scope: ${cell.textContent}`);
  if (!document.documentElement.lang) found.push("no language");
  return found;
}

/** Elements that reach beyond the right edge of the screen. */
function tooWide() {
  return [...document.querySelectorAll("body *")]
    .filter((node) => node.checkVisibility() && node.getBoundingClientRect().right > innerWidth + 1)
    .map((node) => `${node.tagName}#${node.id}`);
}

/** The colours of a canvas at points of it (CSS pixels), as the style sheet writes them. */
function coloursAt(canvas, points) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const scale = canvas.width / canvas.clientWidth;
  return points.map(([x, y]) => {
    const at = 4 * (Math.floor(y * scale) * canvas.width + Math.floor(x * scale));
    return `#${[...data.slice(at, at + 3)].map((value) => value.toString(16).padStart(2, "0")).join("")}`;
  });
}

/** Colours of the style sheet by their names. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries([...arguments].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
