"use strict";
// All charts, by plotly. Texts go through `label`.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

const QUIET = { displayModeBar: false, responsive: true, displaylogo: false };

function layout(more) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("edge"), fixedrange: true, automargin: true };
  const { xaxis, yaxis, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 4, r: 8, t: 4, b: 4 },
    dragmode: false,
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("edge"), font: { color: colour("ink") } },
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...rest,
  };
}

/** Draw into `place`, a div; without plotly a sentence stands there. `summary` is what a screen reader hears. */
function draw(place, traces, more, summary) {
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", summary);
  if (typeof Plotly === "undefined") {
    place.textContent = "The chart library could not be loaded: see the table.";
    return;
  }
  Plotly.react(place, traces, layout(more), QUIET);
}

/** The likeliest next tokens; with `after`, before and after a change. Returns the rows, for the table. */
function drawPredictions(place, before, after, target) {
  const rows = before.map((one) => ({ id: one.id, piece: one.piece, before: one.probability, after: null }));
  for (const one of after || []) {
    const row = rows.find((other) => other.id === one.id);
    if (row) row.after = one.probability;
    else rows.push({ id: one.id, piece: one.piece, before: null, after: one.probability });
  }
  if (after) rows.sort((a, b) => Math.max(b.before, b.after) - Math.max(a.before, a.after));
  rows.splice(after ? 8 : 10);
  const y = rows.map((_, i) => i);
  const bar = (name, values, fill) => ({
    type: "bar", orientation: "h", name, y, x: values, marker: { color: fill },
    text: values.map(percent), textposition: "outside", cliponaxis: false, textfont: { size: 11 }, hoverinfo: "skip",
  });
  const traces = after
    ? [bar("before", rows.map((row) => row.before), colour("before")), bar("after", rows.map((row) => row.after), colour("after"))]
    : [bar("probability", rows.map((row) => row.before), colour("accent"))];
  const most = Math.max(...rows.map((row) => Math.max(row.before, row.after)), 0.01);
  const texts = rows.map((row) => (row.id === target ? `<b>${label(row.piece)}</b>` : label(row.piece)));
  const first = rows.slice(0, 3).map((row) => `${visible(row.piece)} ${percent(row.before)}${after ? `, after ${percent(row.after)}` : ""}`);
  draw(place, traces, {
    height: 265, barmode: "group", bargap: 0.25, showlegend: Boolean(after),
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
    margin: { l: 4, r: 48, t: after ? 24 : 4, b: 4 },
    xaxis: { range: [0, most * 1.02], showticklabels: false, showgrid: false },
    yaxis: { tickvals: y, ticktext: texts, autorange: "reversed", showgrid: false, zeroline: false, ticks: "", ticksuffix: " ", tickfont: { family: "ui-monospace, DejaVu Sans Mono, monospace", size: 12 } },
  }, `Likeliest next tokens: ${first.join("; ")}`);
  return rows;
}

/** Blocks by kinds of layer. `cells`: [{layer, block, part, value, told}], `told` is shown when pointed at. */
function drawDepth(place, cells, title, onChoose) {
  const blocks = [...new Set(cells.map((cell) => cell.block))].sort((a, b) => a - b);
  const kinds = [...new Set(cells.map((cell) => cell.part))];
  const grid = kinds.map((part) => blocks.map((block) => cells.find((cell) => cell.block === block && cell.part === part) || null));
  const z = grid.map((row) => row.map((cell) => (cell ? cell.value : null)));
  const most = Math.max(...cells.map((cell) => cell.value || 0), 1e-9);
  const strongest = cells.reduce((best, cell) => (cell.value > best.value ? cell : best), cells[0]);
  const few = blocks.length <= 8;
  draw(place, [{
    type: "heatmap", z, x: blocks.map(String), y: kinds.map(label), zmin: 0, zmax: most, xgap: 2, ygap: 2,
    colorscale: [[0, colour("page")], [1, colour("heat")]],
    textfont: { color: colour("ink") }, text: z.map((row) => row.map((value) => (few ? number(value, 2) : ""))), texttemplate: few ? "%{text}" : undefined,
    customdata: grid.map((row) => row.map((cell) => (cell ? cell.told : "none"))),
    hovertemplate: "block %{x} %{y}<br>%{customdata}<extra></extra>",
    colorbar: { thickness: 10, len: 1, outlinewidth: 0, title: { text: title, side: "right", font: { size: 11 } }, tickfont: { size: 11 } },
  }], {
    height: 245, margin: { l: 4, r: 4, t: 4, b: 30 },
    xaxis: { title: { text: "block", standoff: 4 }, type: "category", showgrid: false, dtick: blocks.length > 24 ? 4 : blocks.length > 12 ? 2 : 1 },
    yaxis: { autorange: "reversed", showgrid: false, type: "category", ticks: "", ticksuffix: " " },
  }, `${title} of each layer. Strongest: block ${strongest.block} ${strongest.part}, ${number(strongest.value)}`);
  if (onChoose && place.on) {
    place.removeAllListeners("plotly_click");
    place.on("plotly_click", (event) => {
      const cell = grid[event.points[0].pointIndex[0]][event.points[0].pointIndex[1]];
      if (cell) onChoose(cell.layer);
    });
  }
}

/** Which part of a layer's output comes from which segment, block by block. `rows`: [{x, shares: {segment: share}}]. */
function drawShares(place, rows, title = "share of the output") {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.shares)))];
  const fills = ["accent", "after", "before", "edge", "soft"];
  const traces = names.map((name, i) => ({
    type: "bar", name: label(name), x: rows.map((row) => String(row.x)), y: rows.map((row) => row.shares[name]),
    marker: { color: colour(fills[i % fills.length]), opacity: i < fills.length ? 1 : 0.6 },
    hovertemplate: `%{x}: %{y:.1%}<extra>${label(name)}</extra>`,
  }));
  draw(place, traces, {
    height: 170, barmode: "relative", bargap: 0.3, margin: { l: 4, r: 8, t: 24, b: 30 }, showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
    xaxis: { title: { text: "block", standoff: 4 }, type: "category", showgrid: false },
    yaxis: { tickformat: ".0%", title: { text: title, standoff: 6, font: { size: 11 } } },
  }, `${title} by segment: ${names.map((name) => `${name} ${percent(rows.reduce((sum, row) => sum + (row.shares[name] || 0), 0) / rows.length)} on average`).join(", ")}`);
}

/** Numbers over the patches of an image: orange above zero, blue below, nothing where it is zero. */
function drawMap(place, image, grid, values, title) {
  const { rows, columns } = grid;
  const z = Array.from({ length: rows }, (_, row) => values.slice(row * columns, (row + 1) * columns));
  const most = Math.max(...values.map(Math.abs), 1e-9);
  const best = values.reduce((found, value, i) => (Math.abs(value) > Math.abs(values[found]) ? i : found), 0);
  draw(place, [{
    type: "heatmap", z, zmin: -most, zmax: most, xgap: 1, ygap: 1,
    colorscale: [[0, "rgba(0, 80, 220, 0.85)"], [0.5, "rgba(128, 128, 128, 0)"], [1, "rgba(235, 95, 0, 0.85)"]],
    hovertemplate: "row %{y}, column %{x}: %{z:.4g}<extra></extra>",
    colorbar: { orientation: "h", y: 0, yanchor: "top", ypad: 4, thickness: 10, len: 1, outlinewidth: 0, title: { text: title, side: "bottom", font: { size: 11 } }, tickfont: { size: 11 } },
  }], {
    height: 290, margin: { l: 0, r: 0, t: 0, b: 50 },
    images: [{ source: image, xref: "x", yref: "y", x: -0.5, y: -0.5, sizex: columns, sizey: rows, sizing: "stretch", layer: "below" }],
    xaxis: { range: [-0.5, columns - 0.5], constrain: "domain", showgrid: false, zeroline: false, showticklabels: false, ticks: "" },
    yaxis: { range: [rows - 0.5, -0.5], scaleanchor: "x", constrain: "domain", showgrid: false, zeroline: false, showticklabels: false, ticks: "" },
  }, `${title} at each patch. Strongest: row ${Math.floor(best / columns)}, column ${best % columns}, ${number(values[best])}`);
}

/** Draw everything again in the other colours when the system changes them. */
function onTheme(redraw) {
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

/** Differences, one bar each, first on top: [{name, value}]. */
function drawDifferences(place, rows) {
  const y = rows.map((_, i) => i);
  const worst = Math.max(...rows.map((row) => Math.abs(row.value)), 1e-9);
  draw(place, [{
    type: "bar", orientation: "h", y, x: rows.map((row) => row.value), text: rows.map((row) => signed(row.value)), textposition: "outside",
    cliponaxis: false, textfont: { size: 11 }, hoverinfo: "skip", marker: { color: rows.map((row) => colour(row.value > 0 ? "after" : "accent")) },
  }], {
    height: Math.max(170, 17 * rows.length + 10), bargap: 0.25, showlegend: false, margin: { l: 4, r: 8, t: 4, b: 4 },
    xaxis: { range: [-1.7 * worst, 1.7 * worst], showticklabels: false, showgrid: false },
    yaxis: { tickvals: y, ticktext: rows.map((row) => plain(row.name)), autorange: "reversed", showgrid: false, zeroline: false, ticks: "", ticksuffix: " ", tickfont: { size: 11 } },
  }, `Differences: ${rows.map((row) => `${row.name} ${signed(row.value)}`).join("; ")}`);
}

/** How many old tokens have each of the values, shares from 0 to 1. */
function drawHistogram(place, values, counts) {
  const x = values.map((value) => String(Math.round(100 * value)));
  draw(place, [{ type: "bar", x, y: counts, marker: { color: colour("accent") }, hovertemplate: "%{x} %: %{y}<extra></extra>" }], {
    height: 245, bargap: 0.08, showlegend: false, margin: { l: 4, r: 8, t: 4, b: 30 },
    xaxis: { type: "category", title: { text: "% of its contexts kept", standoff: 4 }, showgrid: false, tickangle: 0, tickfont: { size: 10 } },
    yaxis: { title: { text: "old tokens", standoff: 4, font: { size: 11 } } },
  }, `Old tokens by contexts kept: ${counts.map((count, i) => `${x[i]} % ${count}`).join("; ")}`);
}
