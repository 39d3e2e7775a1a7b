"use strict";
// An image: what the classifier takes it for, in which layers that is decided, by which parameter tokens, and where.

const MEASURES = { weights: "weight", contributions: "contribution" };
const chosen = { measure: "weights" };

function startVision(payload) {
  view.payload = payload;
  view.drawNext = drawClasses;
  view.drawTokens = drawImageTokens;
  view.drawMap = drawImage;
  view.given = Boolean(payload.changes);
  view.address = payload.attribution.length ? payload.attribution[0].address : null;
  for (const name of ["image", "predictions", "depth", "shares", "tokens", "card", "changes"]) places[name] = el("div");
  places.card.className = "card panel";
  places.card.setAttribute("role", "region");
  places.card.setAttribute("aria-label", "Parameter token");
  places.sharesPanel = panel("How much each segment gives", {}, places.shares);
  describeModel(payload);
  document.getElementById("main").append(
    el("div", { class: "column" },
      el("div", { class: "pair pictured" }, panel(readable(payload.image.name), {}, places.image), panel("What it is taken for", {}, places.changes, places.predictions)),
      panel("Parameter tokens", {}, places.tokens),
      panel("Where it is decided", {}, places.depth),
      places.sharesPanel),
    places.card,
    panel("What these pictures do not show", { class: "wide notes" }, el("ul", {}, payload.notes.map((note) => el("li", {}, readable(note))))),
  );
  drawCharts();
  drawImageTokens();
  drawCard();
  onTheme(() => { drawCharts(); drawImage(); });

  function drawCharts() {
    drawClasses();
    drawLayers(el("p", { class: "soft" }, "towards ", piece(payload.target.piece), ": how much the tokens of a layer move its logit, up or down"));
    drawSegments((layer) => payload.shares[layer.name], "mean over the positions of the image");
  }
}

/** The image, and where in it the token of the card is used. */
function drawImage() {
  const { payload, address } = view;
  const { image, grid } = payload;
  const small = Math.max(image.width, image.height) <= 64 ? "small" : "";
  const plain = el("figure", {}, picture(image.uri, { alt: `The image as the model sees it, ${image.width} by ${image.height} pixels` }),
    el("figcaption", { class: "soft" }, `as the model sees it: ${image.width} × ${image.height} pixels, ${grid.rows} × ${grid.columns} patches`));
  const map = address && payload.maps[address];
  if (!map) {
    places.image.replaceChildren(el("div", { class: `image ${small}` }, plain, el("p", { class: "soft" }, "Choose a parameter token to see where in the image it is used.")));
    return;
  }
  const title = MEASURES[chosen.measure];
  const values = map[chosen.measure];
  const apart = map[chosen.measure === "weights" ? "class" : "class_contribution"];
  const choice = select("Map of", [["weights", "its weight"], ["contributions", `what it adds to “${visible(payload.target.piece)}”, to first order`]], chosen.measure, (name) => { chosen.measure = name; drawImage(); places.image.querySelector("select").focus(); });
  const chart = reuse(places, "mapChart");
  places.image.replaceChildren(
    el("div", { class: "row" }, choice, el("span", { class: "soft" }, shortName(address))),
    el("div", { class: `image ${small}` }, plain, el("div", {}, chart, grid.class_token ? el("p", { class: "soft" }, `at the class token: ${number(apart)}`) : null)),
    asTable(`Map of ${title}`, ["row", ...Array.from({ length: grid.columns }, (_, i) => String(i))], Array.from({ length: grid.rows }, (_, row) => [String(row), ...values.slice(row * grid.columns, (row + 1) * grid.columns).map((value) => number(value))])),
  );
  drawMap(chart, image.uri, grid, values, title);
}

/** What the report knows of the classes after the change that is shown, if any. */
function classesAfter() {
  const { payload } = view;
  if (view.off) return { ...payload.ablations[view.off], text: `${shortName(view.off)} off` };
  if (view.given) return { ...payload.changes, text: payload.changes.changes.map(nameChange).join(", ") };
  return null;
}

function drawClasses() {
  const { payload } = view;
  const after = classesAfter();
  const chart = reuse(places, "nextChart");
  places.predictions.replaceChildren(chart);
  const rows = drawPredictions(chart, payload.predictions, after && after.predictions, payload.target.id);
  if (!payload.predictions.some((one) => one.id === payload.target.id)) {
    places.predictions.append(el("p", {}, "Target ", piece(payload.target.piece), `: ${percent(payload.target.probability)}`));
  }
  if (after) places.predictions.append(describeChange(payload.predictions, after, payload.target.id));
  const head = after ? ["class", "before", "after"] : ["class", "probability"];
  places.predictions.append(asTable("Likeliest classes", head, rows.map((row) => [piece(row.piece), percent(row.before), ...(after ? [percent(row.after)] : [])])));
  drawChanges();
}

function drawImageTokens() {
  const { payload, list } = view;
  const effects = new Map(payload.attribution.map((entry) => [entry.address, entry]));
  const blank = (address) => ({ address, weight: peak(payload.maps[address]), direct: null, gradient: null, measured: null });
  const rows = list === "" ? payload.attribution.slice(0, 40) : payload.strongest[list].map((address) => effects.get(address) || blank(address));
  const options = [["", `what moves “${visible(payload.target.piece)}” most`], ...payload.model.layers.map((layer) => [layer.name, `strongest in ${shortName(layer.name)}`])];
  tokenTable(rows, "its weight where that is largest", select("Show", options, list, (name) => { view.list = name; drawImageTokens(); }), null);
}

/** The weight of largest magnitude. */
function peak(map) {
  return [...map.weights, map.class].filter(known).reduce((most, value) => (Math.abs(value) > Math.abs(most) ? value : most), 0);
}

/** Of the card: images in which the weight is highest, with the patch marked. */
function pictures(card) {
  const { payload } = view;
  if (!payload.source) {
    return [el("h3", {}, "Images of highest weight"), el("p", { class: "soft" }, "These need images: tokenformer explain MODEL --image FILE --images SOURCE")];
  }
  const { rows, columns } = payload.grid;
  const items = card.images.map((one) => {
    const shown = payload.images[one.image];
    const [row, column] = [Math.floor(one.patch / columns), one.patch % columns];
    const where = one.patch === null ? "at the class token" : `at row ${row}, column ${column}`;
    const frame = el("span", { class: "frame" }, picture(shown.uri, { alt: `${readable(shown.label ?? "")} ${readable(shown.name)}, weight ${number(one.weight, 2)} ${where}` }));
    if (one.patch !== null) {
      const mark = el("span", { class: "patch" });
      for (const [side, value] of [["left", column / columns], ["width", 1 / columns], ["top", row / rows], ["height", 1 / rows]]) mark.style.setProperty(side, `${100 * value}%`);
      frame.append(mark);
    }
    return el("li", {}, el("figure", {}, frame, el("figcaption", { title: readable(shown.name) }, el("b", {}, readable(shown.label ?? "")), ` ${number(one.weight, 2)}${one.patch === null ? ", class token" : ""}`)));
  });
  const small = Math.max(payload.image.width, payload.image.height) <= 64 ? "small" : "";
  return [el("h3", {}, "Images of highest weight"), items.length ? el("ul", { class: `pictures ${small}` }, items) : el("p", { class: "soft" }, "No image activates this token.")];
}
