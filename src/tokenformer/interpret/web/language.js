"use strict";
// A text: what follows each of its tokens, in which layers that is decided, and by which parameter tokens.

/** All that the page shows of a text; `view` is what is looked at, `payload` what Python found. */
const view = {
  payload: null,
  position: 0, // of the text, the prediction behind which is shown
  list: "", // "" for the tokens that matter most, or the name of a layer
  address: null, // of the parameter token in the card
  part: null, // kind of layer in the chart of shares
  off: null, // the token switched off in a report
  given: false, // whether the changes made by the command line are shown
  after: null, // {predictions, loss, perplexity, text}: what a change does at `position`
};
const places = {};

function startLanguage(payload) {
  const main = document.getElementById("main");
  for (const name of ["text", "predictions", "depth", "shares", "tokens", "card", "notes", "changes"]) places[name] = el("div");
  places.card.className = "card panel";
  places.card.setAttribute("role", "region");
  places.card.setAttribute("aria-label", "Parameter token");
  places.sharesPanel = panel("How much each segment gives", {}, places.shares);
  const charts = el("div", { class: "pair" }, panel("What comes next", {}, places.changes, places.predictions), panel("Where the prediction is made", {}, places.depth));
  places.found = el("div", { class: "column" }, charts, panel("Parameter tokens", {}, places.tokens), places.sharesPanel);
  main.append(
    panel("Text", { class: "wide" }, payload.live ? textForm() : null, places.text),
    places.found,
    places.card,
  );
  if (payload.live) main.append(browser());
  main.append(panel("What these pictures do not show", { class: "wide notes" }, places.notes));
  setPayload(payload);
  onTheme(() => view.payload && drawCharts());
}

/** Show another payload: the first, or what the server found for another text. */
function setPayload(payload) {
  view.payload = payload;
  view.position = payload.position ?? 0;
  view.list = "";
  view.off = null;
  view.after = null;
  view.given = Boolean(payload.changes);
  describeModel(payload);
  places.notes.replaceChildren(el("ul", {}, (payload.notes || []).map((note) => el("li", {}, readable(note)))));
  if (!payload.text) {
    places.text.replaceChildren(el("p", { class: "soft" }, "Enter a text and press Explain: the parameter tokens that it uses appear below."));
    places.found.hidden = true;
    drawCard();
    return;
  }
  places.found.hidden = false;
  view.address = payload.attribution.length ? payload.attribution[0].address : null;
  drawAll();
}

function describeModel(payload) {
  const { name, parameters, layers } = payload.model;
  const segments = [...new Set(layers.flatMap((layer) => layer.segments.map((segment) => segment.name)))];
  const facts = [`model ${readable(name)}`, `${parameters.toLocaleString("en")} parameters`, `segments: ${segments.map(readable).join(", ")}`];
  if (known(payload.loss)) facts.push(`loss ${number(payload.loss)} nats, perplexity ${number(Math.exp(payload.loss), 1)}`);
  const head = document.getElementById("head");
  head.querySelectorAll(".fact").forEach((fact) => fact.remove());
  head.append(...facts.map((fact) => el("span", { class: "fact" }, fact)));
}

function drawAll() {
  drawText();
  drawCharts();
  drawTokens();
  drawCard();
}

function drawCharts() {
  if (!view.payload.text) return;
  drawNext();
  drawLayers();
  drawSegments();
}

// The text

function drawText() {
  const { pieces, loss } = view.payload.text;
  const options = pieces.map((text, i) => {
    const share = known(loss[i]) ? Math.min(loss[i] / 10, 1) * 0.6 : 0;
    const told = known(loss[i]) ? `, loss ${number(loss[i], 2)} nats` : "";
    const option = el(
      "span",
      {
        role: "option", "aria-selected": i === view.position, "aria-label": `${i}: ${visible(text)}${told}`, style: null,
        class: i === view.payload.position ? "focus" : "", title: `${i}: “${visible(text)}”${told}`,
        click: () => { choosePosition(i); explainHere(); },
        keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); explainHere(); } },
      },
      wordNodes(text),
    );
    option.style.setProperty("--share", share.toFixed(3));
    return option;
  });
  rove(options, view.position, WORDS, choosePosition);
  const box = el("div", { class: "text", role: "listbox", "aria-label": "Tokens of the text; arrow keys choose one", "aria-orientation": "horizontal" }, options);
  const samples = [0, 2, 5, 10].map((nats) => {
    const sample = el("span", { class: "scale" });
    sample.style.setProperty("--share", ((nats / 10) * 0.6).toFixed(3));
    return el("span", {}, sample, nats === 10 ? "10 or more" : String(nats));
  });
  const legend = el(
    "div",
    { class: "row between soft" },
    el("span", { class: "row" }, "Loss of each token, in nats:", samples),
    el("span", {}, "The prediction shown is the one behind the framed token; ", el("b", {}, "underlined"), ": explained in full."),
  );
  places.text.replaceChildren(box, legend);
  places.options = options;
}

/** Line breaks and tabs as a sign and as what they do; the rest as it is. */
function wordNodes(text) {
  return text.split(/([\n\t])/).map((part) => {
    if (part === "\n") return [el("span", { class: "mark", "aria-hidden": "true" }, "⏎"), "\n"];
    return readable(part);
  });
}

function choosePosition(i) {
  view.position = i;
  places.options.forEach((option, j) => {
    option.setAttribute("aria-selected", String(i === j));
    option.tabIndex = i === j ? 0 : -1;
  });
  view.after = null;
  if (view.payload.live && changes.length) {
    clearTimeout(choosePosition.timer); // not for each token that an arrow key passes
    choosePosition.timer = setTimeout(measureChanges, 250);
  }
  drawCharts();
  drawTokens();
}

/** With a server: explain the prediction behind the chosen position in full. */
function explainHere() {
  if (view.payload.live && view.position !== view.payload.position) askExplain(view.payload.source, view.position);
}

// What comes next

/** What the report knows of the chosen position after the change that is shown, if any. */
function afterChange() {
  const { payload, position } = view;
  if (view.after) return view.after;
  if (view.off) {
    const found = payload.ablations[view.off];
    return { predictions: found.positions[position].predictions, loss: found.loss, text: `${shortName(view.off)} off` };
  }
  if (view.given && position === payload.position) {
    return { predictions: payload.changes.predictions, loss: payload.changes.loss, text: payload.changes.changes.map(nameChange).join(", ") };
  }
  return null;
}

function nameChange(text) {
  return text.split(" ").map((word) => (word.includes("/") ? shortName(word) : word)).join(" ");
}

function drawNext() {
  const { payload, position } = view;
  const before = payload.positions[position].predictions;
  const after = afterChange();
  const target = position === payload.position ? payload.target.id : before[0].id;
  const chart = reuse(places, "nextChart");
  const behind = el("p", { class: "soft" }, "behind token ", String(position), " “", piece(payload.text.pieces[position]), "”");
  places.predictions.replaceChildren(behind, chart);
  const rows = drawPredictions(chart, before, after && after.predictions, target);
  if (position === payload.position && !before.some((one) => one.id === payload.target.id)) {
    places.predictions.append(el("p", {}, "Target ", piece(payload.target.piece), `: ${percent(payload.target.probability)}`));
  }
  if (after) places.predictions.append(describeChange(before, after, target));
  const head = after ? ["token", "before", "after"] : ["token", "probability"];
  places.predictions.append(asTable("Likeliest next tokens", head, rows.map((row) => [piece(row.piece), percent(row.before), ...(after ? [percent(row.after)] : [])])));
  drawChanges();
}

function describeChange(before, after, target) {
  const find = (list) => list.find((one) => one.id === target);
  const [old, now] = [find(before), find(after.predictions)];
  const shown = old || now;
  const change = shown
    ? `“${visible(shown.piece)}” ${old ? percent(old.probability) : "not among the ten likeliest"} → ${now ? percent(now.probability) : "not among the ten likeliest"}; `
    : "";
  const loss = known(after.loss) && known(view.payload.loss) ? `loss of the text ${number(view.payload.loss)} → ${number(after.loss)} nats` : "";
  const worth = known(after.perplexity) ? `, perplexity ${number(Math.exp(view.payload.loss), 1)} → ${number(after.perplexity, 1)}` : "";
  const line = `${change}${loss}${worth}`;
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
    const toggle = () => { view.given = !view.given; drawNext(); };
    chips = [el("li", {}, text, el("button", { type: "button", "aria-pressed": view.given, click: toggle }, view.given ? "shown" : "show"))];
  }
  places.changes.replaceChildren(chips.length ? el("ul", { class: "chips", "aria-label": "Changes to the model" }, chips) : "");
}

/** In a report: show the predictions without a token, or with all again. */
function switchOff(address) {
  view.off = address;
  view.given = false;
  drawNext();
  drawCard();
  if (!address) announce("All parameter tokens take part again.");
}

// Layers

function drawLayers() {
  const { payload } = view;
  const cells = payload.layers.map((layer) => ({ layer: layer.name, value: layer.raises - layer.lowers, told: `raise it by ${number(layer.raises)}, lower it by ${number(-layer.lowers)}`, ...place(layer.name) })).filter((cell) => cell.block !== null);
  const chart = reuse(places, "depthChart");
  const where = el("p", { class: "soft" }, "towards ", piece(payload.target.piece), " behind token ", String(payload.position), ": how much the tokens of a layer move its logit, up or down");
  places.depth.replaceChildren(where, chart);
  if (!cells.length) return;
  drawDepth(chart, cells, "moves the logit", (layer) => { view.list = layer; drawTokens(); });
  places.depth.append(asTable("Effect of each layer", ["layer", "tokens that raise it", "tokens that lower it"], payload.layers.map((layer) => [shortName(layer.name), signed(layer.raises), signed(layer.lowers)])));
}

function drawSegments() {
  const { payload, position } = view;
  const several = payload.model.layers.some((layer) => layer.segments.length > 1);
  places.sharesPanel.hidden = !several;
  if (!several) return;
  const layers = payload.model.layers.map((layer, i) => ({ ...place(layer.name), shares: payload.positions[position].layers[i].shares }));
  const kinds = [...new Set(layers.map((layer) => layer.part))];
  view.part = kinds.includes(view.part) ? view.part : kinds[kinds.length - 1];
  const rows = layers.filter((layer) => layer.part === view.part).map((layer) => ({ x: layer.block, shares: layer.shares }));
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.shares)))];
  const choice = select("Kind of layer", kinds.map((kind) => [kind, kind]), view.part, (kind) => { view.part = kind; drawSegments(); });
  const chart = reuse(places, "sharesChart");
  places.shares.replaceChildren(el("div", { class: "row" }, choice, el("span", { class: "soft" }, `at token ${position}`)), chart);
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

function drawTokens() {
  const { payload, position, list } = view;
  const layers = payload.model.layers;
  const here = payload.positions[position].layers;
  const effects = new Map(payload.attribution.map((entry) => [entry.address, entry]));
  const atFocus = position === payload.position;
  let rows;
  if (list === "") rows = payload.attribution.slice(0, 40).map((entry) => ({ ...entry, weight: atFocus ? entry.weight : null }));
  else {
    const found = here[layers.findIndex((layer) => layer.name === list)].tokens;
    rows = found.map((token) => ({ gradient: null, measured: null, ...(atFocus ? effects.get(token.address) : {}), ...token }));
  }
  const options = [["", `what moves “${visible(payload.target.piece)}” most, behind token ${payload.position}`], ...layers.map((layer) => [layer.name, `strongest in ${shortName(layer.name)}, at token ${position}`])];
  const choice = select("Show", options, list, (chosen) => { view.list = chosen; drawTokens(); });
  const hint = !atFocus && list === ""
    ? el("p", { class: "soft" }, `Effects are known for the prediction behind token ${payload.position}. `, el("button", { type: "button", click: () => choosePosition(payload.position) }, "Go there"),
      payload.live ? el("button", { type: "button", click: explainHere }, `Explain token ${position}`) : null)
    : null;
  const titles = [
    ["weight", "its weight at this token of the text"], ["direct", "what it adds to the target's logit itself (output and ffn layers)"],
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
