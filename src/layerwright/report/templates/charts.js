"use strict";
(function () {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const coarse = matchMedia("(pointer: coarse)").matches;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Text and grid take the page's own colours, so that both themes stay in one place: the style sheet.
  function themed(layout) {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = (own) => ({ ...own, gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line") });
    const label = { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--text") }, align: "left" };
    return {
      ...layout, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), hoverlabel: label,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--text"), size: 13, family: "system-ui, sans-serif" },
      // a finger on a chart scrolls the page instead of zooming
      ...(coarse ? { dragmode: false } : {}),
    };
  }
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  function draw() {
    const done = figures.map(function (figure) {
      const place = document.getElementById("chart-" + figure.key);
      return Plotly.react(place, figure.data, themed({ ...figure.layout, height: figure.height }), config);
    });
    Promise.all(done).then(function () { root.dataset.charts = String(done.length); });
  }
  draw();
  dark.addEventListener("change", draw);
})();
