// Draws every chart from the JSON beside it. Colors of text and grid come from the style sheet.
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
// Paper cannot be unfolded, and charts that were drawn for a wide screen would run off it.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const place of document.querySelectorAll("[data-figure]")) Plotly.relayout(place, { width: 640 });
});
addEventListener("afterprint", () => {
  for (const place of document.querySelectorAll("[data-figure]")) Plotly.relayout(place, { width: null, autosize: true });
});
