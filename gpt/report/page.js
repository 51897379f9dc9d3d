"use strict";
// Draws the page's charts from the data that it holds; fetches nothing.

const root = document.documentElement;
const { figures, dark, reload_s: reloadSeconds } = JSON.parse(
  document.getElementById("data").textContent,
);
const boxes = [...document.querySelectorAll(".chart")];
const isTouch = matchMedia("(pointer: coarse)").matches;
const canHover = matchMedia("(hover: hover)").matches;

function noteError(text) {
  root.dataset.errors = `${root.dataset.errors ?? ""}${text}\n`;
}
addEventListener("error", (event) => noteError(event.message));
addEventListener("unhandledrejection", (event) => noteError(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) =>
  noteError(`blocked: ${event.effectiveDirective} ${event.blockedURI}`),
);

// Storage may be forbidden for a page from a file; then nothing is remembered.
function recall(key) {
  try {
    return sessionStorage.getItem(key);
  } catch {
    return null;
  }
}
function remember(key, value) {
  try {
    sessionStorage.setItem(key, value);
  } catch {
    // nothing to do
  }
}

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function figureOf(box) {
  let text = JSON.stringify(figures[box.dataset.figure]);
  if (isDark()) {
    for (const [light, other] of Object.entries(dark)) text = text.replaceAll(light, other);
  }
  const figure = JSON.parse(text);
  for (const input of inputsOf(box)) {
    const axis = figure.layout[`${input.dataset.axis}axis`];
    const type = input.checked ? "log" : "linear";
    if ((axis.type ?? "linear") !== type) {
      axis.type = type;
      delete axis.range;
      delete axis.rangemode;
    }
  }
  figure.layout.dragmode = isTouch ? false : "zoom";
  return figure;
}

function inputsOf(box) {
  return [...box.closest("figure").querySelectorAll(".switches input")];
}

function draw(box) {
  const figure = figureOf(box);
  const options = {
    responsive: true,
    displaylogo: false,
    displayModeBar: canHover ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  if (!box.classList.contains("js-plotly-plot")) box.replaceChildren();
  return Plotly.react(box, figure.data, figure.layout, options);
}

async function drawAll() {
  let drawn = 0;
  for (const box of boxes) {
    try {
      await draw(box);
      drawn += 1;
    } catch (error) {
      noteError(`${box.id}: ${error}`);
    }
    // A pause in between, so that the page can be read and scrolled meanwhile.
    await new Promise((resolve) => setTimeout(resolve));
  }
  root.dataset.drawn = String(drawn);
}

function setUpSwitches(box) {
  const inputs = inputsOf(box);
  for (const input of inputs) {
    const axis = figures[box.dataset.figure].layout[`${input.dataset.axis}axis`];
    const kept = recall(`${box.id}-${input.dataset.axis}`);
    input.checked = kept === null ? axis.type === "log" : kept === "true";
    input.addEventListener("change", () => {
      remember(`${box.id}-${input.dataset.axis}`, String(input.checked));
      draw(box);
    });
    input.closest(".switches").classList.add("ready");
  }
}

function showMark(number) {
  const box = document.getElementById("chart-loss");
  const curve = box?.data?.findIndex((trace) => trace.meta === "marks") ?? -1;
  if (curve < 0) return false;
  const point = box.data[curve].customdata.findIndex((numbers) => numbers.includes(number));
  box.scrollIntoView({ block: "center" });
  Plotly.Fx.hover(box, [{ curveNumber: curve, pointNumber: point }]);
  return true;
}

function showFinding(event) {
  const point = event.points.find((each) => each.data.meta === "marks");
  if (!point) return;
  const number = [point.customdata].flat()[0];
  const finding = document.getElementById(`finding-${number}`);
  for (const other of document.querySelectorAll(".finding.shown")) other.classList.remove("shown");
  finding.classList.add("shown");
  finding.scrollIntoView({ block: "center" });
  finding.focus({ preventScroll: true });
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember("theme", root.dataset.theme);
    label();
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    label();
    drawAll();
  });
  label();
}

const theme = recall("theme");
if (theme === "light" || theme === "dark") root.dataset.theme = theme;
setUpTheme();
boxes.forEach(setUpSwitches);
for (const link of document.querySelectorAll("a[data-mark]")) {
  link.addEventListener("click", (event) => {
    if (showMark(Number(link.dataset.mark))) event.preventDefault();
  });
}
drawAll().then(() => {
  document.getElementById("chart-loss")?.on?.("plotly_click", showFinding);
});
if (reloadSeconds) setTimeout(() => location.reload(), 1000 * reloadSeconds);
