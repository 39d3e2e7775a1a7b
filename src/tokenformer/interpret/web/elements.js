"use strict";
// Elements, and how text and numbers are shown. Text of models and corpora only ever becomes text nodes and attributes
// that hold no address: nothing here parses HTML.

/** An element; `fields` are attributes, or listeners if they are functions; children are nodes or texts, null is left out. */
function el(tag, fields = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (name === "class") made.className = value;
    else if (name.startsWith("aria-") && typeof value === "boolean") made.setAttribute(name, String(value));
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return made;
}

/** A picture that is part of the payload; one from anywhere else is not shown. */
function picture(uri, fields) {
  return /^data:image\/(png|jpeg);base64,/.test(uri) ? el("img", { ...fields, src: uri }) : el("span", { class: "soft" }, fields.alt);
}

/** A section with a heading that names it. */
function panel(title, fields = {}, ...children) {
  const heading = el("h2", {}, title);
  heading.id = `heading-${panel.count++}`;
  return el("section", { ...fields, class: `panel ${fields.class || ""}`, "aria-labelledby": heading.id }, heading, ...children);
}
panel.count = 0;

const SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };

/** A piece of text on one line: space, line break and tab as signs, and code points that would hide or turn text by number. */
function visible(text) {
  return Array.from(String(text), (sign) => {
    if (sign in SIGNS) return SIGNS[sign];
    return hidden(sign) ? `⟨U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩` : sign;
  }).join("");
}

/** Running text: as it is, but for what would hide or turn other text. */
function readable(text) {
  return Array.from(String(text), (sign) => (hidden(sign) && !"\n\t".includes(sign) ? visible(sign) : sign)).join("");
}

function hidden(sign) {
  return /[\p{Cc}\p{Cf}\u2028\u2029]/u.test(sign) && sign !== "\u200d";
}

/** A piece as label of plotly, which reads labels as a kind of HTML. */
function label(text) {
  return plain(shortened(visible(text)));
}

function plain(text) {
  return readable(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** A piece as one word of running text; the whole of a long one when pointed at. */
function piece(text) {
  const shown = visible(text);
  const short = shortened(shown);
  return el("span", { class: "piece", title: short === shown ? null : shown }, short);
}

function shortened(text, most = 16) {
  const signs = Array.from(text);
  return signs.length > most ? `${signs.slice(0, most - 1).join("")}…` : text;
}

function known(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function number(value, digits = 3) {
  if (!known(value)) return "–";
  if (value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 10 ** -(digits + 1))) return value.toExponential(1).replace("-", "−").replace("e−", "e−");
  return value.toFixed(digits).replace("-", "−");
}

function signed(value, digits = 3) {
  return known(value) && value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

function percent(value) {
  if (!known(value)) return "–";
  return value > 0 && value < 0.0005 ? "<0.1 %" : `${(100 * value).toFixed(1)} %`;
}

/** What a screen reader is told once. */
function announce(text) {
  document.getElementById("status").textContent = text;
}

/** A table of plain texts or nodes. */
function table(caption, head, rows, left = [0]) {
  const kind = (i) => (left.includes(i) ? { class: "left" } : {});
  return el(
    "table",
    {},
    el("caption", { class: "unseen" }, caption),
    el("thead", {}, el("tr", {}, head.map((text, i) => el("th", { scope: "col", ...kind(i) }, text)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", kind(i), cell))))),
  );
}

/** The figures of a chart, for who cannot see it. */
function asTable(caption, head, rows) {
  return el("details", { class: "data" }, el("summary", {}, "As a table"), el("div", { class: "scroll" }, table(caption, head, rows)));
}

/** One tab stop for several elements; arrow keys move between them. `moves` maps a key to (index, items) => index. */
function rove(items, chosen, moves, onMove) {
  items.forEach((item, i) => {
    item.tabIndex = i === chosen ? 0 : -1;
    item.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const next = Math.min(Math.max(move(i, items), 0), items.length - 1);
      items.forEach((other, j) => { other.tabIndex = j === next ? 0 : -1; });
      items[next].focus();
      if (onMove && next !== i) onMove(next);
    });
  });
}

const ROWS = { ArrowUp: (i) => i - 1, ArrowDown: (i) => i + 1, Home: () => 0, End: (_, all) => all.length - 1 };
const WORDS = {
  ArrowLeft: (i) => i - 1,
  ArrowRight: (i) => i + 1,
  ArrowUp: (i, all) => lineAbove(i, all, -1),
  ArrowDown: (i, all) => lineAbove(i, all, 1),
  Home: () => 0,
  End: (_, all) => all.length - 1,
};

/** The item of the line above (-1) or below (1) that is nearest. */
function lineAbove(i, all, step) {
  const here = all[i].getClientRects()[0];
  if (!here) return i + step;
  let line = null;
  let best = i;
  for (let j = i + step; j >= 0 && j < all.length; j += step) {
    const rect = all[j].getClientRects()[0];
    if (!rect || Math.abs(rect.top - here.top) < 4) continue;
    line = line === null ? rect.top : line;
    if (Math.abs(rect.top - line) > 4) break;
    const previous = all[best].getClientRects()[0];
    if (best === i || Math.abs(rect.left - here.left) < Math.abs(previous.left - here.left)) best = j;
  }
  return best;
}

/** "model.layers.3.ffn/base/17" as its parts, with the layer's description in the payload. */
function parts(address) {
  const [layer, segment, index] = address.split("/");
  return { layer, segment, index: index === undefined ? null : Number(index), ...place(layer) };
}

/** Block and part of a layer by its name: { block: 3, part: "ffn" }. */
function place(layer) {
  const words = layer.split(".");
  const at = words.findIndex((word) => /^\d+$/.test(word));
  return { block: at < 0 ? null : Number(words[at]), part: at < 0 ? layer : words.slice(at + 1).filter((word) => word !== "attention").join(".") };
}

function shortName(address) {
  const { block, part, segment, index } = parts(address);
  const where = block === null ? part : `block ${block} ${part}`;
  return segment === undefined ? where : `${where} / ${segment}${index === null ? "" : ` ${index}`}`;
}
