"use strict";
// A text: what follows each of its tokens, in which layers that is decided, and by which parameter tokens.

function startLanguage(payload) {
  const main = document.getElementById("main");
  for (const name of ["text", "predictions", "depth", "shares", "tokens", "card", "notes", "changes"]) places[name] = el("div");
  places.card.className = "card panel";
  places.card.setAttribute("role", "region");
  places.card.setAttribute("aria-label", "Parameter token");
  places.sharesPanel = panel("How much each segment gives", {}, places.shares);
  const charts = el("div", { class: "pair" }, panel("What comes next", {}, places.changes, places.predictions), panel("Where the prediction is made", {}, places.depth));
  view.drawNext = drawNext;
  view.drawTokens = drawTokens;
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

function drawAll() {
  drawText();
  drawCharts();
  drawTokens();
  drawCard();
}

function drawCharts() {
  if (!view.payload.text) return;
  const { payload, position } = view;
  drawNext();
  drawLayers(el("p", { class: "soft" }, "towards ", piece(payload.target.piece), " behind token ", String(payload.position), ": how much the tokens of a layer move its logit, up or down"));
  drawSegments((_, i) => payload.positions[position].layers[i].shares, `at token ${position}`);
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
  tokenTable(rows, "its weight at this token of the text", choice, hint);
}

