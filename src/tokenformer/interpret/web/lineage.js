"use strict";
// Two models of one lineage: who does the work now, what changed its meaning, what got better.

const lineage = { payload: null, part: null, measure: "share", address: null, charts: {}, lines: [] };

function startLineage(payload) {
  lineage.payload = payload;
  const { before, after, data } = payload;
  const fact = (name, model) => `${name}: ${readable(model.name)}, ${model.parameters.toLocaleString("en")} parameters, ${model.segments.map(readable).join(" + ")}, loss ${number(model.loss)}`;
  document.getElementById("head").append(
    ...[fact("before", before), fact("after", after), `${data.rows} rows of ${data.length} tokens of ${readable(data.name)}`].map((text) => el("span", { class: "fact" }, text)),
  );
  lineage.work = el("div");
  lineage.loss = el("div");
  lineage.kept = el("div");
  lineage.card = el("div", { class: "card panel", role: "region", "aria-label": "Contexts before and after" });
  document.getElementById("main").append(
    el("div", { class: "column" },
      el("div", { class: "pair" }, panel("Who does the work", {}, lineage.work), panel("Loss by type of token", {}, lineage.loss)),
      panel("Old tokens whose contexts changed most", {}, changedTable()),
      panel("How many contexts old tokens kept", {}, lineage.kept)),
    lineage.card,
    panel("What these pictures do not show", { class: "wide notes" }, el("ul", {}, payload.notes.map((note) => el("li", {}, readable(note))))),
  );
  lineage.address = payload.changed.length ? payload.changed[0].address : null;
  drawLineage();
  showContexts(false);
  onTheme(drawLineage);
}

function drawLineage() {
  drawWork();
  drawLosses();
  drawKept();
}

function drawWork() {
  const layers = lineage.payload.layers.map((layer) => ({ ...place(layer.name), segments: layer.segments }));
  const kinds = [...new Set(layers.map((layer) => layer.part))];
  lineage.part = kinds.includes(lineage.part) ? lineage.part : kinds[kinds.length - 1];
  const names = { share: "share of the output", use: "share of |weight| × length" };
  const rows = layers.filter((layer) => layer.part === lineage.part)
    .map((layer) => ({ x: layer.block, shares: Object.fromEntries(layer.segments.map((segment) => [segment.name, segment[lineage.measure]])) }));
  const set = (name) => (value) => { lineage[name] = value; drawWork(); };
  const segments = [...new Set(rows.flatMap((row) => Object.keys(row.shares)))];
  const chart = reuse(lineage.charts, "work");
  const focused = Array.from(lineage.work.querySelectorAll("select")).indexOf(document.activeElement);
  lineage.work.replaceChildren(
    el("div", { class: "row" }, select("Kind of layer", kinds.map((kind) => [kind, kind]), lineage.part, set("part")), select("Measure", Object.entries(names), lineage.measure, set("measure"))),
    chart,
    asTable(names[lineage.measure], ["block", ...segments.map(readable)], rows.map((row) => [String(row.x), ...segments.map((name) => percent(row.shares[name]))])),
  );
  if (focused >= 0) lineage.work.querySelectorAll("select")[focused].focus();
  drawShares(chart, rows, names[lineage.measure]);
}

function drawLosses() {
  const rows = lineage.payload.loss;
  const chart = reuse(lineage.charts, "loss");
  const cells = rows.map((row) => [readable(row.group === "all" ? row.type : `${row.type}`), row.tokens.toLocaleString("en"), number(row.before), number(row.after), signed(row.after - row.before)]);
  lineage.loss.replaceChildren(el("p", { class: "soft" }, "After minus before, in nats per token: below 0 is better."), chart, asTable("Loss by type of token", ["type", "tokens", "before", "after", "difference"], cells));
  drawDifferences(chart, rows.map((row) => ({ name: row.type, value: row.after - row.before })));
}

function drawKept() {
  const { overlaps } = lineage.payload;
  const [histogram, depth] = [reuse(lineage.charts, "histogram"), reuse(lineage.charts, "depth")];
  const said = `Of the ${overlaps.contexts} contexts of highest weight, an old token kept ${percent(overlaps.mean)} on average; two random choices would share ${percent(overlaps.chance)}.`;
  lineage.kept.replaceChildren(el("p", { class: "soft" }, said), el("div", { class: "pair" }, histogram, depth),
    asTable("Contexts kept, by layer", ["layer", "kept"], overlaps.layers.map((layer) => [shortName(layer.name), percent(layer.mean)])));
  drawHistogram(histogram, overlaps.values, overlaps.counts);
  const cells = overlaps.layers.map((layer) => ({ layer: layer.name, value: layer.mean, told: `${percent(layer.mean)} kept`, ...place(layer.name) })).filter((cell) => cell.block !== null);
  if (cells.length) drawDepth(depth, cells, "contexts kept", null);
}

function changedTable() {
  const rows = lineage.payload.changed;
  const top = (contexts) => (contexts.length ? [visibleBreaks(contexts[0].before.slice(-14)), el("mark", {}, visible(contexts[0].token)), visibleBreaks(contexts[0].after.slice(0, 10))] : "none");
  const choose = (address, byKey) => { lineage.address = address; showContexts(byKey); };
  lineage.lines = rows.map((row) => el(
    "tr",
    { "data-address": row.address, click: () => choose(row.address), keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(row.address, true); } } },
    el("td", {}, shortName(row.address)), el("td", {}, percent(row.overlap)), el("td", { class: "left" }, top(row.before)), el("td", { class: "left" }, top(row.after)),
  ));
  rove(lineage.lines, 0, ROWS);
  return el("div", { class: "scroll" }, el("table", { role: "grid", "aria-label": "Old tokens; arrow keys move, Enter shows the contexts" },
    el("thead", {}, el("tr", {}, ["parameter token", "kept", "strongest before", "strongest after"].map((text, i) => el("th", { scope: "col", class: i > 1 ? "left" : "" }, text)))),
    el("tbody", {}, lineage.lines)));
}

function showContexts(byKey) {
  lineage.lines.forEach((line) => line.setAttribute("aria-selected", String(line.dataset.address === lineage.address)));
  const row = lineage.payload.changed.find((one) => one.address === lineage.address);
  if (!row) {
    lineage.card.replaceChildren(el("h2", {}, "No old tokens"), el("p", { class: "soft" }, "The models share no token."));
    return;
  }
  const list = (title, contexts) => [el("h3", {}, title), el("ul", { class: "contexts" }, contexts.map((context) => contextLine(context)))];
  lineage.card.replaceChildren(...[
    el("h2", { tabindex: -1 }, shortName(row.address)), el("code", {}, row.address),
    el("p", { class: "soft" }, `${percent(row.overlap)} of its contexts are the same before and after`),
    list("Contexts before", row.before), list("Contexts after", row.after),
  ].flat());
  if (byKey) lineage.card.querySelector("h2").focus();
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !lineage.card || !lineage.card.contains(document.activeElement)) return;
  const line = lineage.lines.find((one) => one.dataset.address === lineage.address);
  if (line) line.focus();
});
