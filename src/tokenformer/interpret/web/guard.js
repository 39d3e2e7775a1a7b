"use strict";
// First of all scripts: whatever goes wrong in the others is said in the page.

function showMessage(text) {
  const place = document.getElementById("message");
  place.replaceChildren();
  if (!text) return;
  const line = document.createElement("span");
  line.textContent = text;
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "Close";
  close.addEventListener("click", () => place.replaceChildren());
  place.append(line, close);
}

window.addEventListener("error", (event) => {
  showMessage(`This part of the page could not be drawn: ${event.message || "unknown error"}`);
});
window.addEventListener("unhandledrejection", (event) => {
  showMessage(`This did not work: ${(event.reason && event.reason.message) || event.reason}`);
});
