"use strict";
// Last of all scripts: show the payload by its kind.

{
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const kinds = { language: startLanguage, lineage: startLineage, vision: startVision };
  const start = kinds[payload.kind];
  if (payload.format !== 1 || !start) throw new Error(`this page cannot show a payload of kind ${payload.kind}, format ${payload.format}`);
  start(payload);
}
