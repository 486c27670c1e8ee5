// Enlarges samples, and draws every chart from the JSON beside it. Colors of text and grid come from the style sheet.
"use strict";
const options = { responsive: true, displayModeBar: false };
// Dragging zooms with a mouse (a double click resets); on a touch screen it has to scroll the page.
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
for (const place of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  place.replaceChildren();
  Plotly.newPlot(place, figure.data, { ...figure.layout, dragmode }, options);
}
for (const button of document.querySelectorAll("[data-scale]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const log = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(log));
    Plotly.relayout(button.dataset.scale, {
      "yaxis.type": log ? "log" : "linear",
      "yaxis.dtick": log ? 1 : null,
      "yaxis.autorange": true,
    });
  });
}
// One sample at a time, in a dialog of the browser's own: it keeps the focus inside, and Escape closes it.
const viewer = document.getElementById("viewer");
const cards = [...document.querySelectorAll(".zoom")];
let shown = 0;
function enlarge(place) {
  shown = (place + cards.length) % cards.length;
  const card = cards[shown];
  viewer.querySelector(".frame").replaceChildren(card.firstElementChild.cloneNode(true));
  viewer.querySelector(".text").replaceChildren(...card.parentElement.querySelector(".text").cloneNode(true).children);
  if (!viewer.open) viewer.showModal();
}
cards.forEach((card, place) => card.addEventListener("click", () => enlarge(place)));
if (viewer) {
  for (const button of viewer.querySelectorAll("[data-step]"))
    button.addEventListener("click", () => enlarge(shown + Number(button.dataset.step)));
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") enlarge(shown - 1);
    if (event.key === "ArrowRight") enlarge(shown + 1);
  });
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("close", () => cards[shown].focus());
}
// Paper cannot be unfolded, and charts that were drawn for a wide screen would run off it.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const place of document.querySelectorAll("[data-figure]")) Plotly.relayout(place, { width: place.closest(".wide") ? 640 : 310 });
});
addEventListener("afterprint", () => {
  for (const place of document.querySelectorAll("[data-figure]")) Plotly.relayout(place, { width: null, autosize: true });
});
