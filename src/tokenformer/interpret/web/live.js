"use strict";
// With `tokenformer explore` behind the page: other texts, any token, any change.

const changes = [];
const asked = {}; // by path: only the answer to the last question is shown

/** Ask the server; an error becomes a message in the page, and null is given. Long work shows how long it takes. */
async function ask(path, body, what) {
  const turn = (asked[path] = (asked[path] || 0) + 1);
  const started = Date.now();
  const line = document.getElementById("working");
  const show = () => { if (turn === asked[path]) line.replaceChildren(el("progress", { "aria-label": what }), ` ${what}, ${Math.round((Date.now() - started) / 1000)} s`); };
  show();
  const clock = setInterval(show, 1000);
  announce(what);
  try {
    const answer = await fetch(path, body === null ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const found = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    if (turn !== asked[path]) return null;
    if (!answer.ok) {
      showMessage(found.error || `the server answered ${answer.status}`);
      return null;
    }
    showMessage("");
    return found;
  } catch {
    showMessage("The server does not answer. Is `tokenformer explore` still running in its terminal?");
    return null;
  } finally {
    clearInterval(clock);
    if (turn === asked[path]) line.replaceChildren();
  }
}

function textForm() {
  const box = el("textarea", { id: "given", rows: 2, spellcheck: "false", "aria-label": "Text to explain", placeholder: "Text to explain; Ctrl+Enter starts", keydown: (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); askExplain(box.value); }
  } });
  const go = el("button", { type: "submit", class: "main" }, "Explain");
  const form = el("form", { submit: (event) => { event.preventDefault(); askExplain(box.value); } }, el("div", { class: "ask" }, box, go), el("div", { id: "working", class: "soft" }));
  return form;
}

function useText(text) {
  document.getElementById("given").value = text;
  window.scrollTo({ top: 0 });
  askExplain(text);
}

async function askExplain(text, position = null) {
  const found = await ask("/api/explain", position === null ? { text } : { text, position }, "explaining the text");
  if (!found) return;
  found.source = text;
  found.live = true;
  const kept = view.address;
  Object.assign(found.tokens, Object.fromEntries(Object.entries(view.payload.tokens || {}).filter(([address]) => !(address in found.tokens))));
  setPayload(found);
  if (kept && position !== null) chooseToken(kept);
  if (changes.length) measureChanges();
  announce(`Explained: ${found.text.pieces.length} tokens.`);
  if (position !== null) places.options[view.position].focus();
}

async function askToken(address, byKey) {
  const card = await ask("/api/token", { address }, "reading the token");
  if (!card) return;
  view.payload.tokens = { ...(view.payload.tokens || {}), [card.address]: card };
  view.address = card.address;
  markLine();
  drawCard();
  if (byKey) places.card.querySelector("h2").focus();
}

// Changes

async function measureChanges() {
  if (!view.payload.text) return;
  if (!changes.length) {
    view.after = null;
    drawNext();
    return;
  }
  const position = view.position;
  const found = await ask("/api/change", { text: view.payload.source, position, changes }, "running the changed model");
  if (!found || position !== view.position) return;
  view.after = { predictions: found.after, loss: found.loss_after, perplexity: found.perplexity_after, text: changes.map(nameChange).join(", ") };
  drawNext();
}

/** Make a change in place of what was done to the same token before. */
function makeChange(change, address) {
  const same = changes.findIndex((other) => !other.startsWith("swap ") && !change.startsWith("swap ") && other.split(" ")[1] === address);
  if (same >= 0) changes.splice(same, 1);
  if (!changes.includes(change)) changes.push(change);
  if (!view.payload.text) showMessage("The change is kept: enter a text to see what it does.");
  changed();
}

function changed() {
  measureChanges();
  drawChanges();
  redrawCard();
}

function dropChange(change) {
  changes.splice(changes.indexOf(change), 1);
  changed();
}

function redrawCard() {
  const focused = document.activeElement && places.card.contains(document.activeElement) ? document.activeElement.id : "";
  drawCard();
  if (focused && document.getElementById(focused)) document.getElementById(focused).focus();
}

function liveSwitches(card) {
  const { address } = card;
  const change = `off ${address}`;
  const off = changes.includes(change);
  const made = changes.find((other) => other.startsWith(`scale ${address} `));
  const start = made ? Number(made.split(" ")[2]) : 1;
  const shown = el("output", { class: "number" }, `× ${start}`);
  const factor = el("input", {
    type: "range", id: "factor", min: -2, max: 4, step: 0.25, value: start, "aria-label": "Factor of its value",
    input: () => { shown.textContent = `× ${factor.value}`; },
    change: () => {
      if (Number(factor.value) !== 1) makeChange(`scale ${address} ${factor.value}`, address);
      else if (made) dropChange(made);
    },
  });
  const other = el("input", { type: "text", id: "other", size: 12, placeholder: `${card.segment}/0`, "aria-label": "Other token of this layer, such as base/0" });
  const swap = (event) => {
    event.preventDefault();
    const name = other.value.trim();
    if (!name) { showMessage(`Name the token to swap with, such as ${card.segment}/0.`); return; }
    const whole = name.split("/").length > 2 ? name : `${card.layer}/${/^\d+$/.test(name) ? `${card.segment}/${name}` : name}`;
    makeChange(`swap ${address} ${whole}`, address);
  };
  return [
    el("p", { class: "row" }, el("button", { type: "button", id: "switch", "aria-pressed": off, click: () => (off ? dropChange(change) : makeChange(change, address)) }, off ? "Switched off: switch on again" : "Switch off"),
      el("label", { class: "row" }, "scale", factor), shown),
    el("form", { class: "row", submit: swap }, el("label", { class: "row" }, "swap its value with ", other), el("button", { type: "submit" }, "Swap")),
  ];
}

// All tokens of a segment

const browsing = { layer: "", segment: "", sort: "max", state: "", offset: 0, limit: 25, table: null };

function browser() {
  const data = JSON.parse(document.getElementById("payload").textContent);
  if (!data.index) {
    return panel("All parameter tokens", { class: "wide" }, el("p", { class: "soft" }, "This list needs an index of contexts: build one with ", el("code", {}, `tokenformer explain ${readable(data.model.name)} --data DIR --index IDX`), " and start explore with --index IDX."));
  }
  const layers = data.model.layers;
  browsing.layer = layers[layers.length - 1].name;
  browsing.table = el("div");
  const controls = el("div", { class: "row" });
  const fill = () => {
    const segments = layers.find((layer) => layer.name === browsing.layer).segments.map((segment) => segment.name);
    browsing.segment = segments.includes(browsing.segment) ? browsing.segment : segments[0];
    const change = (name) => (value) => { browsing[name] = value; browsing.offset = 0; fill(); browse(); };
    const focused = Array.from(controls.querySelectorAll("select")).indexOf(document.activeElement);
    controls.replaceChildren(
      select("Layer", layers.map((layer) => [layer.name, shortName(layer.name)]), browsing.layer, change("layer")),
      select("Segment", segments.map((name) => [name, readable(name)]), browsing.segment, change("segment")),
      select("Sort by", [["max", "highest weight"], ["mean", "mean weight"], ["active", "how often active"]], browsing.sort, change("sort")),
      select("Only", [["", "all"], ["dead", "dead"], ["always on", "always on"]], browsing.state, change("state")),
    );
    if (focused >= 0) controls.querySelectorAll("select")[focused].focus();
  };
  fill();
  const made = panel("All parameter tokens", { class: "wide" }, controls, browsing.table);
  browse();
  return made;
}

async function browse() {
  const { layer, segment, sort, state, offset, limit } = browsing;
  const query = new URLSearchParams({ layer, segment, sort, state, offset, limit });
  const answer = await fetch(`/api/tokens?${query}`).catch(() => null);
  const found = answer && (await answer.json().catch(() => null));
  if (!found || found.error) {
    browsing.table.replaceChildren(el("p", {}, found ? found.error : "The server does not answer."));
    return;
  }
  const turn = (step) => { browsing.offset += step; browse(); };
  const show = (address, byKey) => {
    chooseToken(address, byKey);
    places.card.scrollIntoView({ block: "nearest" });
  };
  const lines = found.tokens.map((token) => el(
    "tr",
    { "data-address": token.address, click: () => show(token.address), keydown: (event) => { if (event.key === "Enter") show(token.address, true); } },
    el("td", {}, shortName(token.address)), el("td", {}, number(token.max)), el("td", {}, number(token.mean)), el("td", {}, percent(token.active)), el("td", { class: "left" }, token.state || ""),
    el("td", { class: "left" }, token.top ? [visibleBreaks(token.top.before.slice(-40)), el("mark", {}, visible(token.top.token)), visibleBreaks(token.top.after.slice(0, 30))] : ""),
  ));
  rove(lines, 0, ROWS);
  const head = ["parameter token", "max", "mean", "active", "state", "strongest context"];
  browsing.table.replaceChildren(
    el("div", { class: "scroll whole" }, el("table", { role: "grid", "aria-label": "All parameter tokens of a segment; arrow keys move, Enter opens one" },
      el("thead", {}, el("tr", {}, head.map((text, i) => el("th", { scope: "col", class: i > 3 ? "left" : "" }, text)))), el("tbody", {}, lines))),
    el("div", { class: "row" },
      el("button", { type: "button", disabled: offset === 0, click: () => turn(-limit) }, "Previous"),
      el("span", { class: "soft" }, found.total ? `${offset + 1} to ${Math.min(offset + limit, found.total)} of ${found.total}` : "none"),
      el("button", { type: "button", disabled: offset + limit >= found.total, click: () => turn(limit) }, "Next")),
  );
}
