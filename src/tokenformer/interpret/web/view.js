"use strict";
// What the pages of a text and of an image have in common: what is looked at, layers, segments, parameter tokens.

/** All that the page shows of a text or an image; `view` is what is looked at, `payload` what Python found. */
const view = {
  payload: null,
  position: 0, // of the text, the prediction behind which is shown
  list: "", // "" for the tokens that matter most, or the name of a layer
  address: null, // of the parameter token in the card
  part: null, // kind of layer in the chart of shares
  off: null, // the token switched off in a report
  given: false, // whether the changes made by the command line are shown
  drawNext: null, // draws what comes next, or the classes
  drawTokens: null, // draws the table of parameter tokens
  drawMap: () => {}, // draws where in an image the token of the card is used
  after: null, // {predictions, loss, perplexity, text}: what a change does at `position`
};
const places = {};

function describeModel(payload) {
  const { name, parameters, layers } = payload.model;
  const segments = [...new Set(layers.flatMap((layer) => layer.segments.map((segment) => segment.name)))];
  const facts = [`model ${readable(name)}`, `${parameters.toLocaleString("en")} parameters`, `segments: ${segments.map(readable).join(", ")}`];
  if (known(payload.loss)) facts.push(`loss ${number(payload.loss)} nats, perplexity ${number(Math.exp(payload.loss), 1)}`);
  const head = document.getElementById("head");
  head.querySelectorAll(".fact").forEach((fact) => fact.remove());
  head.append(...facts.map((fact) => el("span", { class: "fact" }, fact)));
}

// Changes

function nameChange(text) {
  return text.split(" ").map((word) => (word.includes("/") ? shortName(word) : word)).join(" ");
}

/** What a change does to the target and to the loss, in words. */
function describeChange(before, after, target) {
  const find = (list) => list.find((one) => one.id === target);
  const [old, now] = [find(before), find(after.predictions)];
  const shown = old || now;
  const change = shown
    ? `“${visible(shown.piece)}” ${old ? percent(old.probability) : "not among the ten likeliest"} → ${now ? percent(now.probability) : "not among the ten likeliest"}`
    : "";
  const loss = known(after.loss) && known(view.payload.loss) ? `loss of the text ${number(view.payload.loss)} → ${number(after.loss)} nats` : "";
  const worth = known(after.perplexity) ? `, perplexity ${number(Math.exp(view.payload.loss), 1)} → ${number(after.perplexity, 1)}` : "";
  const line = [change, `${loss}${worth}`].filter(Boolean).join("; ");
  announce(`${after.text}: ${line}`);
  return el("p", { id: "effect" }, line);
}

/** The changes that are made, each with a button to take it back. */
function drawChanges() {
  const chip = (text, undo) => el("li", {}, text, el("button", { type: "button", "aria-label": `Take back: ${text}`, click: undo }, "×"));
  let chips = [];
  if (view.payload.live) chips = changes.map((change) => chip(nameChange(change), () => dropChange(change)));
  else if (view.off) chips = [chip(`${shortName(view.off)} off`, () => switchOff(null))];
  else if (view.payload.changes) {
    const text = view.payload.changes.changes.map(nameChange).join(", ");
    const toggle = () => { view.given = !view.given; view.drawNext(); };
    chips = [el("li", {}, text, el("button", { type: "button", "aria-pressed": view.given, click: toggle }, view.given ? "shown" : "show"))];
  }
  places.changes.replaceChildren(chips.length ? el("ul", { class: "chips", "aria-label": "Changes to the model" }, chips) : "");
}

/** In a report: show the predictions without a token, or with all again. */
function switchOff(address) {
  view.off = address;
  view.given = false;
  view.drawNext();
  drawCard();
  if (!address) announce("All parameter tokens take part again.");
}

// Layers

/** How much each layer moves the target's logit; `where` says which one. */
function drawLayers(where) {
  const { payload } = view;
  const cells = payload.layers.map((layer) => ({ layer: layer.name, value: layer.raises - layer.lowers, told: `raise it by ${number(layer.raises)}, lower it by ${number(-layer.lowers)}`, ...place(layer.name) })).filter((cell) => cell.block !== null);
  const chart = reuse(places, "depthChart");
  places.depth.replaceChildren(where, chart);
  if (!cells.length) return;
  drawDepth(chart, cells, "moves the logit", (layer) => { view.list = layer; view.drawTokens(); });
  places.depth.append(asTable("Effect of each layer", ["layer", "tokens that raise it", "tokens that lower it"], payload.layers.map((layer) => [shortName(layer.name), signed(layer.raises), signed(layer.lowers)])));
}

/** The shares of segments, of a model that has several: `sharesOf(layer, number of the layer)`; `where` says of what. */
function drawSegments(sharesOf, where) {
  const { payload } = view;
  const several = payload.model.layers.some((layer) => layer.segments.length > 1);
  places.sharesPanel.hidden = !several;
  if (!several) return;
  const layers = payload.model.layers.map((layer, i) => ({ ...place(layer.name), shares: sharesOf(layer, i) }));
  const kinds = [...new Set(layers.map((layer) => layer.part))];
  view.part = kinds.includes(view.part) ? view.part : kinds[kinds.length - 1];
  const rows = layers.filter((layer) => layer.part === view.part).map((layer) => ({ x: layer.block, shares: layer.shares }));
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.shares)))];
  const choice = select("Kind of layer", kinds.map((kind) => [kind, kind]), view.part, (kind) => { view.part = kind; drawSegments(sharesOf, where); });
  const chart = reuse(places, "sharesChart");
  places.shares.replaceChildren(el("div", { class: "row" }, choice, el("span", { class: "soft" }, where)), chart);
  drawShares(chart, rows);
  places.shares.append(asTable("Share of each segment", ["block", ...names.map(readable)], rows.map((row) => [String(row.x), ...names.map((name) => percent(row.shares[name]))])));
}

/** The same div each time, so that plotly updates what it drew. */
function reuse(owner, name) {
  owner[name] = owner[name] || el("div", { class: "chart" });
  return owner[name];
}

function select(name, options, chosen, onChange) {
  const box = el("select", { change: (event) => onChange(event.target.value) }, options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
  return el("label", { class: "row" }, name, box);
}

// The table of parameter tokens

/** Rows [{address, weight, direct, gradient, measured}] under a choice of what is shown; `weight` says what weights are. */
function tokenTable(rows, weight, choice, hint) {
  const { payload } = view;
  const titles = [
    ["weight", weight], ["direct", "what it adds to the target's logit itself (output and ffn layers)"],
    ["gradient", "what it adds by way of all later layers, to first order"], ["measured", "logit with the token off, minus with it: the opposite sign of the others"],
  ];
  const lines = rows.map((row) => el(
    "tr",
    { "aria-selected": row.address === view.address, "data-address": row.address, click: () => chooseToken(row.address),
      keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); chooseToken(row.address, true); } } },
    el("td", {}, shortName(row.address)), el("td", {}, number(row.weight)), el("td", {}, signed(row.direct)), el("td", {}, signed(row.gradient)), el("td", {}, signed(row.measured)),
    el("td", { class: "left" }, summary(payload.tokens[row.address])),
  ));
  rove(lines, Math.max(rows.findIndex((row) => row.address === view.address), 0), ROWS);
  const grid = el(
    "table",
    { role: "grid", "aria-label": "Parameter tokens; arrow keys move, Enter opens one" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "parameter token"), titles.map(([name, title]) => el("th", { scope: "col", title }, name)), el("th", { scope: "col", class: "left" }, "holds"))),
    el("tbody", {}, lines),
  );
  places.lines = lines;
  places.tokens.replaceChildren(...[el("div", { class: "row" }, choice), hint, el("div", { class: "scroll" }, grid)].filter(Boolean));
}

/** What a token is about, in a few words: what it promotes or is near to. */
function summary(card) {
  const pairs = (card && (card.promotes || card.nearest)) || [];
  return pairs.slice(0, 3).map(([text], i) => [i ? "  " : "", piece(text)]);
}

function markLine() {
  for (const line of places.lines || []) line.setAttribute("aria-selected", String(line.dataset.address === view.address));
}

function chooseToken(address, byKey = false) {
  view.address = address;
  markLine();
  if (view.payload.live && !view.payload.tokens[address]) {
    askToken(address, byKey);
    return;
  }
  drawCard();
  if (byKey) places.card.querySelector("h2").focus();
}
