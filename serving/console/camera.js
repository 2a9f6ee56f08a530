// One camera: its scores against the threshold, what another threshold would have raised, any frame.

import { makeChart } from "./chart.js";
import { behind, clock, figure, get, h, moment, pairs, percent, question, send, tell, trying, who } from "./dom.js";
import { makeViewer } from "./viewer.js";

const HOURS = 24;
const MOST = "20,000"; // frames, as in lookup.py: at 5 a second, an hour
const EVERY = 10; // looks; a timeline of 10,000 frames is some 400 kB
const STEPS = 1000; // of the slider

// How many alerts a threshold raises: k of the last n frames above it, as the stream counts them.
export function raised(line, threshold) {
  let alerts = 0;
  let recent = [];
  line.score.forEach((score, i) => {
    const limit = threshold ?? line.threshold[i];
    recent = [...recent, score > limit].slice(-line.alert_n);
    if (score > limit && recent.filter(Boolean).length >= line.alert_k) alerts++;
  });
  return alerts;
}

// Who set the threshold, and for what, where another model or version scores by now.
function whose(state) {
  if (state.override === null) return "the model\u2019s";
  const stamp = `set by ${state.override_by}, ${moment(state.override_at_ms)}`;
  const other = state.override_is_for;
  if (!other) return stamp;
  return other.startsWith("version") ? `${stamp} for ${other}` : `the model\u2019s; ${figure(state.override)} is ${stamp} for ${other}`;
}

export function openCamera(root, camera) {
  const at = `api/v1/cameras/${encodeURIComponent(camera)}`;
  const again = async (id) => (await get(`${at}/scores`, { before: behind(id), count: 1 })).scores.find((each) => each.id === id);
  const facts = h("dl", { class: "facts" });
  const canvas = h("canvas", { class: "chart", role: "img", "aria-label": "Scores against the threshold" });
  const chart = makeChart(canvas, (i) => pick(i));
  const slider = h("input", { type: "range", min: 0, max: STEPS, "aria-label": "Threshold", oninput: () => propose(level()) });
  const value = h("input", { type: "number", step: "any", "aria-label": "Threshold as a number", onchange: () => value.value && propose(+value.value) });
  const would = h("p", { class: "would", role: "status" });
  const apply = h("button", { type: "button", class: "main", onclick: () => keys.A[0]() }, h("kbd", {}, "A"), " Apply");
  const clear = h("button", { type: "button", onclick: () => set(null) }, "Back to the model\u2019s");
  const when = h("input", { type: "datetime-local", step: 1, "aria-label": "Time of the frame" });
  const lookup = h("form", { class: "row" }, h("label", {}, "Frame at ", when), h("button", {}, "Show"),
    h("span", { class: "soft" }, "or click into the timeline; ", h("kbd", {}, "J"), " ", h("kbd", {}, "K"), " step"));
  const viewer = makeViewer({
    path: (frame) => `${at}/scores/${frame.id}/answer`,
    again,
    empty: "Choose a frame in the timeline or by its time, also one that raised no alert.",
  });
  root.append(
    h("div", { class: "row head" }, h("h1", {}, camera), facts,
      h("a", { class: "button", href: `#/alerts/${encodeURIComponent(camera)}` }, "Its alerts")),
    h("div", { class: "split even" }, h("div", { class: "column" },
      h("section", { class: "card", "aria-label": "Timeline" }, canvas,
        h("div", { class: "row threshold" }, h("label", { class: "wide" }, "Threshold", slider), value, apply, clear), would),
      h("section", { class: "card", "aria-label": "Look up a frame" }, lookup)), viewer.element));

  let line = null, state = null, proposed = null, chosen = -1, rounds = 0;
  let low = 0, high = 1;

  const level = () => low + ((high - low) * slider.value) / STEPS;
  const inUse = () => state?.threshold ?? line?.threshold.at(-1) ?? 0;

  async function look() {
    if (rounds++ % EVERY) return;
    const [next, all] = await Promise.all([timeline(), get("api/v1/cameras")]);
    if (!next) {
      would.textContent = "No such camera is listed: it was forgotten, never sent a frame, or is beyond stream.max_cameras.";
      return;
    }
    const id = line?.id[chosen];
    line = next;
    chosen = id ? line.id.indexOf(id) : -1;
    state = all.cameras.find((each) => each.camera === camera) ?? state;
    chart.show(line);
    chart.choose(chosen);
    draw();
  }

  const timeline = () => get(`${at}/timeline`, { hours: HOURS })
    .catch((error) => { if (error.status === 404) return null; throw error; });

  function draw() {
    if (state) {
      facts.replaceChildren(...pairs({
        state: state.state, "alerts now": percent(state.alert_share),
        rate: state.frames_per_s === null ? "\u2013" : `${state.frames_per_s.toFixed(1)} frames/s`,
        threshold: `${figure(state.threshold)}, ${whose(state)}`,
      }));
      clear.disabled = state.override === null;
    }
    if (!line.id.length) { would.textContent = "No frame of the last day is kept."; return; }
    const scores = [...line.score].sort((a, b) => a - b);
    [low, high] = [scores[0], Math.max(scores.at(-1), inUse()) * 1.02];
    if (proposed === null) {
      slider.value = (STEPS * (inUse() - low)) / (high - low);
      value.value = figure(inUse());
    }
    tellWould();
  }

  function propose(next) {
    if (!line?.id.length || !Number.isFinite(next)) return;
    proposed = next;
    slider.value = (STEPS * (next - low)) / (high - low);
    value.value = figure(next);
    chart.propose(next);
    tellWould();
  }

  function tellWould() {
    const frames = line.id.length;
    const span = line.complete ? `the last ${HOURS} hours` : `the time since ${moment(line.captured_at_ms[0])}`;
    const bound = line.complete ? "" : ` Earlier ones are not shown: stream.scores_kept bounds them, or ${MOST} at most.`;
    const mixed = line.versions.length > 1 ? ` ${line.versions.length} versions scored them; scores of different versions need not compare.` : "";
    const now = raised(line, null);
    would.replaceChildren(...(proposed === null
      ? [`Of the ${frames} frames in ${span} `, h("strong", {}, `${now}`), ` raised an alert (${percent(now / frames)}).${bound}${mixed}`]
      : [`At ${figure(proposed)}, ${span} would have raised `, h("strong", {}, `${raised(line, proposed)}`),
        ` alerts instead of ${now}, of ${frames} frames.${bound}${mixed}`]));
    apply.disabled = proposed === null;
  }

  const set = trying(async (threshold) => {
    const by = await who();
    if (!by) return;
    state = await send("PUT", `${at}/threshold`, { threshold, by });
    proposed = null;
    chart.propose(null);
    draw();
    tell(threshold === null ? "The model\u2019s threshold holds again, within seconds." : `Threshold ${figure(threshold)} holds from now on, within seconds.`);
  });

  const pick = trying(async (i) => {
    if (!line?.id[i]) return;
    chosen = i;
    chart.choose(i);
    const found = await again(line.id[i]);
    if (found) viewer.show(found);
    else tell("This frame is no longer kept.", true);
  });

  lookup.addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = new Date(when.value).getTime();
    if (!line?.id.length || !Number.isFinite(wanted)) return;
    let best = 0;
    line.captured_at_ms.forEach((each, i) => { if (Math.abs(each - wanted) < Math.abs(line.captured_at_ms[best] - wanted)) best = i; });
    pick(best);
    tell(`The nearest frame is of ${clock(line.captured_at_ms[best])}.`);
  });

  const sure = async () => {
    if (proposed === null) return;
    const yes = await question(`Threshold ${figure(proposed)} for ${camera}?`, [
      h("p", {}, `It takes the place of ${figure(inUse())}. `, would.textContent)], "Apply");
    if (yes) set(proposed);
  };
  const step = (by) => line && pick(Math.max(0, Math.min(line.id.length - 1, (chosen < 0 ? line.id.length : chosen) + by)));
  const keys = {
    J: [() => step(1), "next frame"], K: [() => step(-1), "frame before"],
    T: [() => slider.focus(), "to the threshold slider"], A: [sure, "apply the threshold"], ...viewer.keys,
  };
  return { look, keys, close: () => { chart.close(); viewer.close(); } };
}
