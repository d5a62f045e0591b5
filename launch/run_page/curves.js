"use strict";
// Curves as SVG. Everything that comes from a run becomes text nodes and numbers, never markup.

const RUNS = JSON.parse(document.getElementById("data").textContent).runs;
const COLOURS = 6; // --c0 ... of page.css, then again with other dashes
const DASHES = ["", "5 3", "1.5 3", "9 3 2 3"];
const HEIGHT = 190;
const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };
// "split": one figure a run, because its curves are told apart by colour already. "group": every
// column with that beginning. "ramp": the columns have an order, which their colour shows.
const PANELS = [
  { title: "loss", keys: ["loss"] },
  { title: "KL", unit: "nats", keys: ["kl"] },
  { title: "KL by masked share", unit: "nats", group: "kl_by_masked_fraction/", ramp: true, split: true },
  { title: "KL by position in the block", unit: "nats", group: "kl_by_block_position/", ramp: true, split: true },
  { title: "accuracy", from: "evaluation", group: "", split: true, all: 1 },
  { title: "tokens a pass", keys: ["tokens_per_denoising_step", "tokens_per_forward"] },
  { title: "responses that end by an end token", unit: "share", keys: ["eos_fraction"], all: 1 },
  { title: "length", unit: "tokens", keys: ["mean_response_tokens", "max_new_tokens"] },
  { title: "time of a step by phase", unit: "s", group: "seconds_", split: true },
  { title: "the slowest rank of each phase", unit: "s", group: "slowest_seconds/", split: true, severalRanks: true },
  { title: "throughput", unit: "tokens/s", keys: ["trained_tokens_per_second", "rollout_tokens_per_second"] },
  { title: "peak memory", unit: "GiB", keys: ["peak_memory_bytes"], scale: 2 ** -30 },
  { title: "peak memory by phase", unit: "GiB", group: "peak_memory_bytes_by_phase/", scale: 2 ** -30, split: true },
  { title: "gradient norm", keys: ["grad_norm"] },
  { title: "learning rate", keys: ["lr"] },
];
const AXES = { step: "step", cumulative_trained_tokens: "trained tokens", cumulative_flops: "FLOPs" };

/** An element of a page ("svg:" before its name: of a picture) with attributes and text. */
function make(name, attributes = {}, text = "") {
  const isSvg = name.startsWith("svg:");
  const element = isSvg
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== "") element.textContent = text;
  return element;
}

function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e15 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return `${+(value / (unit === 1e4 ? 1e3 : unit)).toPrecision(3)}${name}`;
  return String(+value.toPrecision(3));
}

/** About `count` round numbers that span low ... high. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(last - first + 1, 0) }, (_, i) => (first + i) * step);
}

/** Round numbers between two positive ones, about as many a power of ten; of near ones the usual. */
function logTicks(low, high) {
  const powers = Math.log10(high / low);
  const parts = powers < 1 ? [1, 1.5, 2, 3, 5, 7] : powers < 3 ? [1, 2, 5] : [1];
  const every = Math.ceil(powers / 8) || 1;
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every)
    found.push(...parts.map((m) => m * 10 ** power));
  const marks = found.filter((y) => y >= low && y <= high);
  return marks.length > 2 ? marks : ticks(low, high, 5);
}

/** Positions of a column's rows on the horizontal axis; what is counted begins at 0. */
function positions(run, from, axis) {
  const steps = run[from].step || [];
  if (axis === "step") return steps;
  const at = new Map(run.columns.step.map((step, i) => [step, run.columns[axis]?.[i]]));
  return steps.map((step) => (step === 0 ? 0 : at.get(step) ?? null));
}

function style(order, count, ramp) {
  if (ramp) {
    const share = count > 1 ? Math.round((100 * order) / (count - 1)) : 100;
    return { colour: `color-mix(in oklab, var(--r0), var(--r1) ${share}%)`, dash: "" };
  }
  return { colour: `var(--c${order % COLOURS})`, dash: DASHES[Math.floor(order / COLOURS) % DASHES.length] };
}

/** Whether another rank than 0, whose times are drawn anyway, was ever the slowest. */
function hasSlowerRank(run) {
  const columns = Object.entries(run.columns).filter(([key]) => key.startsWith("slowest_rank/"));
  return columns.some(([, ranks]) => ranks.some((rank) => rank > 0));
}

/** The curves of a panel: name, points [x, y] and how they look. */
function curves(panel, runs, axis) {
  const from = panel.from || "columns";
  const found = [];
  for (const run of runs) {
    if (panel.severalRanks && !hasSlowerRank(run)) continue;
    let keys = panel.keys || Object.keys(run[from]).filter((key) => key !== "step" && key.startsWith(panel.group));
    if (panel.ramp) keys = keys.sort((a, b) => parseFloat(a.slice(panel.group.length)) - parseFloat(b.slice(panel.group.length)));
    const x = positions(run, from, axis);
    keys.forEach((key, order) => {
      const values = run[from][key];
      if (!values || !values.some((value) => value !== null)) return;
      const points = values.map((value, i) => [x[i], value === null ? null : value * (panel.scale || 1)]);
      const name = panel.group === undefined ? key : key.slice(panel.group.length);
      const manyRuns = !panel.split && RUNS.length > 1;
      const look = manyRuns
        ? { ...style(RUNS.indexOf(run), RUNS.length), dash: DASHES[order % DASHES.length] }
        : style(order, keys.length, panel.ramp);
      found.push({ name: manyRuns && keys.length === 1 ? run.name : manyRuns ? `${run.name}: ${name}` : name, points, ...look });
    });
  }
  return found;
}

/** What a panel's figures span. `log`: their vertical axis is logarithmic, which takes positive values only. */
function ranges(panel, drawn, wantsLog) {
  const points = drawn.flatMap((curve) => curve.points).filter(([x, y]) => x !== null && y !== null);
  const x = points.map((point) => point[0]);
  const y = points.map((point) => point[1]);
  const [left, right] = [Math.min(...x), Math.max(...x)];
  let [low, high] = [Math.min(...y), Math.max(...y)];
  const across = { left, right: right > left ? right : left + 1 };
  if (wantsLog && low > 0 && !panel.all) {
    const room = high > low ? (high / low) ** 0.04 : 2;
    return { ...across, low: low / room, high: high * room, log: true };
  }
  if (panel.all) [low, high] = [0, panel.all];
  else if (low > 0 && low < 0.7 * high) low = 0;
  if (high === low) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const room = panel.all ? 0 : 0.04 * (high - low);
  return { ...across, low: low === 0 ? 0 : low - room, high: high + room, log: false };
}

function keyMark(curve) {
  const key = make("span", { class: "key" });
  const line = make("svg:svg", { viewBox: "0 0 18 8", "aria-hidden": "true" });
  const path = make("svg:path", { class: "curve", d: "M0 4H18", "stroke-dasharray": curve.dash });
  path.style.stroke = curve.colour;
  line.append(path);
  key.append(line, document.createTextNode(curve.name));
  return key;
}

/** One figure; `shared` are the ranges of all figures of its panel. */
function figure(panel, title, drawn, shared, axis) {
  const box = make("figure", { "data-panel": panel.title });
  const head = make("h2", {}, title);
  if (panel.unit) head.append(make("span", { class: "unit" }, ` ${panel.unit}`));
  const plot = make("svg:svg", { class: "plot", role: "img", "aria-label": `${title} over ${AXES[axis]}` });
  const caption = make("figcaption");
  drawn.forEach((curve) => caption.append(keyMark(curve)));
  box.append(head, plot, caption);
  document.getElementById("curves").append(box);
  const width = plot.clientWidth || 340;
  plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const { left, right, low, high, log } = shared;
  const height = (y) => (log ? Math.log(y / low) / Math.log(high / low) : (y - low) / (high - low));
  const toX = (x) => MARGIN.left + ((x - left) / (right - left)) * (width - MARGIN.left - MARGIN.right);
  const toY = (y) => HEIGHT - MARGIN.bottom - height(y) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  for (const y of log ? logTicks(low, high) : ticks(low, high, 5)) {
    plot.append(make("svg:line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: toY(y), y2: toY(y) }));
    plot.append(make("svg:text", { x: MARGIN.left - 6, y: toY(y) + 4, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(left, right, Math.max(2, Math.floor(width / 70))))
    if (axis !== "step" || Number.isInteger(x))
      plot.append(make("svg:text", { x: toX(x), y: HEIGHT - 6, "text-anchor": "middle" }, short(x)));
  for (const curve of drawn) drawCurve(plot, curve, toX, toY);
  watch(plot, drawn, toX, axis, width);
}

function drawCurve(plot, curve, toX, toY) {
  let path = "";
  let isOpen = false;
  const points = curve.points.filter(([x]) => x !== null);
  points.forEach(([x, y], i) => {
    if (y !== null) path += `${isOpen ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
    const isAlone = y !== null && !isOpen && (points[i + 1]?.[1] ?? null) === null;
    if (isAlone || (y !== null && points.length <= 12)) {
      const dot = make("svg:circle", { cx: toX(x), cy: toY(y), r: 2.5 });
      dot.style.fill = curve.colour;
      plot.append(dot);
    }
    isOpen = y !== null;
  });
  const line = make("svg:path", { class: "curve", d: path, "stroke-dasharray": curve.dash });
  line.style.stroke = curve.colour;
  plot.append(line);
}

/** The values under the pointer. */
function watch(plot, drawn, toX, axis, width) {
  const cross = make("svg:line", { class: "cross", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
  plot.append(cross);
  plot.addEventListener("pointermove", (event) => {
    const at = ((event.clientX - plot.getBoundingClientRect().left) * width) / plot.clientWidth;
    const distance = (point) => Math.abs(toX(point[0]) - at);
    const nearest = (points) => points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    const read = drawn.map((curve) => [curve, curve.points.filter(([x, y]) => x !== null && y !== null)]);
    const places = read.filter(([, points]) => points.length).map(([curve, points]) => [curve, nearest(points)]);
    const x = nearest(places.map(([, point]) => point))[0];
    cross.setAttribute("x1", toX(x));
    cross.setAttribute("x2", toX(x));
    cross.setAttribute("visibility", "visible");
    const there = places.filter(([, point]) => point[0] === x);
    tell(event, [`${AXES[axis]} ${short(x)}`, ...there.map(([curve, point]) => `${curve.name}: ${+point[1].toPrecision(5)}`)].join("\n"));
  });
  plot.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    tell(null, "");
  });
}

/** Text beside the pointer; none without an event. */
function tell(event, text) {
  const tip = document.getElementById("tip");
  tip.hidden = event === null;
  if (event === null) return;
  tip.textContent = text;
  const x = Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 4);
  const y = event.clientY + 16 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 8 : event.clientY + 16;
  tip.style.left = `${Math.max(x, 4)}px`;
  tip.style.top = `${Math.max(y, 4)}px`;
}

function drawAll() {
  const axis = document.getElementById("axis").value;
  const isLog = document.getElementById("vertical").value === "logarithmic";
  document.getElementById("curves").replaceChildren();
  for (const panel of PANELS) {
    const groups = panel.split ? RUNS.map((run) => [run]) : [RUNS];
    const figures = groups.map((runs) => [runs, curves(panel, runs, axis)]).filter(([, drawn]) => drawn.length);
    if (!figures.length) continue;
    const shared = ranges(panel, figures.flatMap(([, drawn]) => drawn), isLog);
    for (const [runs, drawn] of figures)
      figure(panel, panel.split && RUNS.length > 1 ? `${panel.title} · ${runs[0].name}` : panel.title, drawn, shared, axis);
  }
}

function begin() {
  const axis = document.getElementById("axis");
  for (const [key, name] of Object.entries(AXES)) axis.append(make("option", { value: key }, name));
  axis.addEventListener("change", drawAll);
  document.getElementById("vertical").addEventListener("change", drawAll);
  const facts = document.getElementById("facts");
  for (const run of RUNS) {
    const last = (key) => run.columns[key]?.at(-1) ?? 0;
    const said = `${run.steps} steps · ${short(last("cumulative_trained_tokens"))} trained tokens · loss ${short(last("loss"))}`;
    facts.append(make("span", {}, RUNS.length > 1 ? `${run.name}: ${said}` : said), make("br"));
  }
  if (RUNS.length > 1)
    RUNS.forEach((run, i) => document.getElementById("legend").append(keyMark({ name: run.name, ...style(i, RUNS.length) })));
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    drawAll();
  }).observe(document.body);
}

begin();
