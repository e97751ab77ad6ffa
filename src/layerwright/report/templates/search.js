"use strict";
(function () {
  const search = document.getElementById("search");
  const planned = document.getElementById("planned");
  const shown = document.getElementById("shown");
  const rows = Array.from(document.querySelectorAll("#decisions tbody tr"));
  const texts = rows.map((row) => row.textContent.toLowerCase());
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach(function (row, index) {
      const fits = words.every((word) => texts[index].includes(word)) && (!planned.checked || row.dataset.planned === "yes");
      row.hidden = !fits;
      count += fits ? 1 : 0;
    });
    shown.textContent = count + " of " + rows.length + " layers";
  }
  document.getElementById("tools").hidden = false;
  search.addEventListener("input", filter);
  planned.addEventListener("change", filter);
  filter();
})();
