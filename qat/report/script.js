// The page reads well without this: theme button, copy buttons, coverage filter, read-out under the pointer.
"use strict";
const root = document.documentElement;

const themes = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");
function setTheme(name) {
  if (name === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = name;
  themeButton.textContent = "Theme: " + name;
}
let theme = "auto";
try { theme = localStorage.getItem("qat-theme") || "auto"; } catch { /* storage may be off for files */ }
if (!themes.includes(theme)) theme = "auto";
setTheme(theme);
themeButton.addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  setTheme(theme);
  try { localStorage.setItem("qat-theme", theme); } catch { /* as above */ }
});

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

const filter = document.getElementById("filter");
if (filter) {
  const lines = [...document.querySelectorAll(".coverage tbody tr")];
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const line of lines) {
      const text = line.textContent.toLowerCase();
      line.hidden = !words.every((word) => text.includes(word));
      shown += line.hidden ? 0 : 1;
    }
    document.getElementById("matches").textContent = words.length ? `${shown} of ${lines.length} parameters` : "";
  });
}

for (const chart of document.querySelectorAll(".chart.lines")) {
  const { first, last } = JSON.parse(chart.dataset.chart);
  const arms = [...chart.querySelectorAll("[data-points]")].map((path) => ({
    name: path.dataset.arm, points: JSON.parse(path.dataset.points),
  })).reverse();
  const area = chart.querySelector(".area");
  const cross = chart.querySelector(".cross");
  const readout = chart.querySelector(".readout");
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const step = first + share * (last - first);
    const nearest = (points) => points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    const lines = arms.map((arm) => `${arm.name}  ${nearest(arm.points)[1].toPrecision(5)}`);
    readout.textContent = [`step ${nearest(arms[0].points)[0]}`, ...lines].join("\n");
    cross.style.left = `${100 * share}%`;
    readout.style.left = share < 0.5 ? `calc(${100 * share}% + .6rem)` : "auto";
    readout.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * share}% + .6rem)`;
    cross.hidden = readout.hidden = false;
  });
  area.addEventListener("pointerleave", () => { cross.hidden = readout.hidden = true; });
}

addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
