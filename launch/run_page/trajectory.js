// A response drawn pass by pass. `done` is the number of passes made, over all its blocks.

const part = (name) => document.getElementById(name);
const view = { sample: null, done: 0, tokens: [] };

function passColour(pass, most) {
  const share = most > 1 ? Math.round((100 * (pass - 1)) / (most - 1)) : 0;
  return `color-mix(in oklch decreasing hue, var(--p0), var(--p1) ${share}%)`;
}

function shown(text) {
  return text === "" ? "◌" : text.replaceAll("\n", "↵\n");
}

function share(p) {
  return `${+(100 * p).toPrecision(3)} %`;
}

function said(sample, i) {
  const block = sample.blocks[i];
  const lines = [
    JSON.stringify(sample.texts[i]),
    `id ${sample.ids[i]}, token ${i + 1} of ${sample.ids.length}, block ${block + 1}`,
    `pass ${sample.committed_at[i]} of the block's ${sample.passes_of_block[block]}, ${sample.passes[i]} of the response`,
  ];
  if (sample.confidence) lines.push(`confidence ${share(sample.confidence[i])}`);
  if (sample.kl && sample.kl[i] !== null) lines.push(`KL ${+sample.kl[i].toPrecision(3)} nats in the trained state`);
  if (sample.kl && sample.kl[i] === null) lines.push("not under loss in the trained state");
  const teacher = sample.teacher?.[i];
  if (teacher?.length) lines.push(`teacher: ${teacher.map(([text, p]) => `${JSON.stringify(text)} ${share(p)}`).join(", ")}`);
  if (i >= sample.response_tokens) lines.push("after the response's end");
  return lines.join("\n");
}

/** Put a response on the page, all of its passes made. */
function open(sample) {
  view.sample = sample;
  const most = Math.max(...sample.passes_of_block, 1);
  const box = part("tokens");
  box.replaceChildren();
  let block = null;
  view.tokens = sample.ids.map((_, i) => {
    if (i === 0 || sample.blocks[i] !== sample.blocks[i - 1]) box.append((block = make("span", { class: "block" })));
    const token = make("span", {}, shown(sample.texts[i]));
    token.addEventListener("pointerenter", (event) => tell(event, isMade(i) ? said(sample, i) : "not committed yet"));
    token.addEventListener("pointerleave", () => tell(null, ""));
    block.append(token);
    return token;
  });
  part("prompt").textContent = sample.prompt;
  part("passes").replaceChildren();
  for (let pass = 1; pass <= most; pass++) {
    const swatch = make("span", { class: "swatch" }, String(pass));
    swatch.style.background = passColour(pass, most);
    part("passes").append(swatch);
  }
  part("pass").max = Math.max(...sample.passes, 0);
  step(Number(part("pass").max));
  box.scrollTop = 0; // reading begins at the beginning
}

const isMade = (i) => view.sample.passes[i] <= view.done;

function step(done) {
  const { sample, tokens } = view;
  const most = Math.max(...sample.passes_of_block, 1);
  view.done = Math.min(Math.max(done, 0), Number(part("pass").max));
  let begun = 0; // the last block that has had a pass
  sample.passes.forEach((pass, i) => {
    if (pass - sample.committed_at[i] < view.done) begun = Math.max(begun, sample.blocks[i]);
  });
  tokens.forEach((token, i) => {
    const names = ["token"];
    if (/^\S{1,24}$/.test(sample.texts[i])) names.push("whole"); // a line breaks beside it
    if (!isMade(i)) names.push(sample.blocks[i] > begun ? "later" : "open");
    else if (sample.passes[i] === view.done && view.done > 0) names.push("fresh");
    if (i >= sample.response_tokens) names.push("after");
    token.className = names.join(" ");
    token.style.background = isMade(i) ? passColour(sample.committed_at[i], most) : "";
  });
  const fresh = tokens.find((token) => token.classList.contains("fresh"));
  if (fresh) bringIntoView(fresh);
  part("pass").value = view.done;
  const made = sample.passes.filter((_, i) => isMade(i)).length;
  part("pass-said").textContent = `pass ${view.done} of ${part("pass").max} · block ${begun + 1} of ${sample.passes_of_block.length} · ${made} of ${sample.ids.length} tokens`;
}

/** Scroll the response, not the page. */
function bringIntoView(token) {
  const box = part("tokens");
  const [frame, place] = [box.getBoundingClientRect(), token.getBoundingClientRect()];
  if (place.top < frame.top || place.bottom > frame.bottom)
    box.scrollTop += place.top - frame.top - box.clientHeight / 2;
}

function list(run) {
  const select = part("response");
  select.replaceChildren();
  run.samples.forEach((sample, i) => {
    const name = `step ${sample.step} · sample ${sample.sample} · ${sample.response_tokens} token${sample.response_tokens === 1 ? "" : "s"} · ${sample.finish_reason}`;
    select.append(make("option", { value: i }, name));
  });
  select.value = run.samples.length - 1; // of the latest step
  open(run.samples.at(-1));
}

function onKey(event) {
  if (event.target.tagName === "SELECT" || event.ctrlKey || event.altKey || event.metaKey) return;
  const isInside = part("trajectory").contains(document.activeElement);
  const last = Number(part("pass").max);
  const aim = { ArrowLeft: view.done - 1, ArrowRight: view.done + 1, ...(isInside && { Home: 0, End: last }) }[event.key];
  if (aim === undefined) return;
  event.preventDefault();
  step(aim);
}

function beginTrajectory() {
  const recorded = RUNS.filter((run) => run.samples.length);
  if (!recorded.length) return;
  part("trajectory").hidden = false;
  part("run-label").hidden = recorded.length === 1;
  recorded.forEach((run, i) => part("run").append(make("option", { value: i }, run.name)));
  part("run").addEventListener("change", () => list(recorded[part("run").value]));
  part("response").addEventListener("change", () => open(recorded[part("run").value].samples[part("response").value]));
  part("pass").addEventListener("input", () => step(Number(part("pass").value)));
  part("back").addEventListener("click", () => step(view.done - 1));
  part("on").addEventListener("click", () => step(view.done + 1));
  document.addEventListener("keydown", onKey);
  list(recorded[0]);
}

beginTrajectory();
