"use strict";
// The card of one parameter token: what it holds, where it is used, and what happens without it.

function drawCard() {
  const { payload, address } = view;
  const card = address && payload.tokens && payload.tokens[address];
  view.drawMap();
  if (!card) {
    const hint = address ? `There is no card of ${shortName(address)} in this report.` : "Choose a parameter token in the table to see what it holds.";
    places.card.replaceChildren(el("h2", { tabindex: -1 }, "Parameter token"), el("p", { class: "soft" }, hint));
    if (address && !payload.live) places.card.append(...refusal(address));
    return;
  }
  const state = card.state ? el("span", { class: "state" }, card.state) : null;
  const close = el("button", { type: "button", click: closeCard, "aria-label": "Close the card" }, "Close");
  const parts = [
    el("div", { class: "row between" }, el("h2", { tabindex: -1 }, shortName(address)), el("span", { class: "row" }, state, close)),
    el("code", {}, address),
    payload.live ? liveSwitches(card) : reportSwitch(address),
    lists(card),
    statistics(card),
    payload.kind === "vision" ? pictures(card) : contexts(card),
  ];
  places.card.replaceChildren(...parts.flat().filter(Boolean));
}

function closeCard() {
  const line = (places.lines || []).find((one) => one.dataset.address === view.address);
  view.address = null;
  markLine();
  drawCard();
  if (line) line.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !places.card || !places.card.contains(document.activeElement)) return;
  event.preventDefault();
  closeCard();
});

/** The switch of a report, which knows the tokens that were measured. */
function reportSwitch(address) {
  if (!(address in view.payload.ablations)) return refusal(address);
  const off = view.off === address;
  const press = () => {
    switchOff(off ? null : address);
    places.card.querySelector("#switch").focus();
  };
  return [el("p", {}, el("button", { type: "button", id: "switch", "aria-pressed": off, click: press }, off ? "Switched off: switch on again" : "Switch off"))];
}

function refusal(address) {
  const { kind, model } = view.payload;
  const other = kind === "vision"
    ? ["Not measured in this report. Make another with ", el("code", {}, `--change 'off ${address}'`)]
    : ["Not measured in this report. To switch any token off: ", el("code", {}, `tokenformer explore ${readable(model.name)}`)];
  return [
    el("p", { class: "row" }, el("button", { type: "button", id: "switch", disabled: true, "aria-describedby": "why" }, "Switch off"),
      el("span", { id: "why", class: "soft" }, other)),
  ];
}

function lists(card) {
  const values = (title, pairs, digits) => el(
    "div",
    {},
    el("h3", {}, title),
    el("ol", { class: "values" }, pairs.slice(0, 8).map(([text, value]) => el("li", {}, piece(text), el("span", { class: "number" }, signed(value, digits))))),
  );
  const found = [];
  if (card.promotes) found.push(values("Promotes", card.promotes, 2), values("Suppresses", card.suppresses || [], 2));
  if (card.nearest) found.push(values("Nearest inputs", card.nearest, 2));
  const inner = view.payload.kind === "vision"
    ? "Its value is not compared with classes: it works between inner layers."
    : "Neither its key nor its value is compared with words: it works between inner layers.";
  if (!found.length) return el("p", { class: "soft" }, inner);
  return el("div", { class: `lists${found.length === 3 ? " three" : ""}` }, found);
}

function statistics(card) {
  if (!card.statistics) return null;
  const { mean, rms, max, active } = card.statistics;
  const figure = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  const { kind, source } = view.payload;
  return [
    el("h3", {}, kind === "vision" ? `Over ${source.images} images of ${readable(source.name)}` : "Over the corpus of the index"),
    el("dl", { class: "figures" }, figure("mean weight", number(mean)), figure("rms", number(rms)), figure("max", number(max)), figure("active at", percent(active))),
  ];
}

function contexts(card) {
  if (!card.contexts || !card.contexts.length) {
    const hint = card.statistics ? "No context activates this token." : "Contexts and statistics need an index: tokenformer explain MODEL --data DIR --index IDX";
    return [el("h3", {}, "Contexts of highest weight"), el("p", { class: "soft" }, hint)];
  }
  return [el("h3", {}, "Contexts of highest weight"), el("ul", { class: "contexts" }, card.contexts.map(contextLine))];
}

function contextLine(context) {
  const whole = el("div", { class: "whole", hidden: true }, readable(context.before), el("mark", {}, visibleIfBlank(context.token)), readable(context.after));
  const toggle = () => {
    whole.hidden = !whole.hidden;
    button.setAttribute("aria-expanded", String(!whole.hidden));
  };
  const line = el("span", { class: "line" }, el("span", { class: "before" }, el("span", {}, visibleBreaks(context.before))), el("mark", {}, visible(context.token)), el("span", { class: "after" }, visibleBreaks(context.after)));
  const button = el("button", { type: "button", "aria-expanded": "false", click: toggle, "aria-label": `Context, weight ${number(context.weight, 2)}: ${readable(context.token)}` }, el("span", { class: "number" }, number(context.weight, 2)), line);
  const explainIt = view.payload && view.payload.live
    ? el("button", { type: "button", click: () => useText(context.before + context.token) }, "Explain this text")
    : null;
  if (explainIt) whole.append(el("div", {}, explainIt));
  return el("li", {}, button, whole);
}

function visibleBreaks(text) {
  return readable(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

function visibleIfBlank(text) {
  return text.trim() ? readable(text) : visible(text);
}
