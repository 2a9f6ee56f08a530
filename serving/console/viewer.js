// One frame: what was seen, why it was called what it was, and what a person says of it.

import { figure, get, h, moment, pairs, picture, send, tell, trying, who } from "./dom.js";

const WORDS = { "false-alarm": "false alarm", defect: "defect", unsure: "unsure" };
const EFFECT = {
  "false-alarm": "its image joins the new normals: the next refresh learns it",
  defect: "its image joins the known defects: the next refresh or training learns it",
  unsure: "nothing is learnt from it",
};
const OPACITY = "dpdl opacity";

export const answerText = (answer) => (answer
  ? `${WORDS[answer.kind]}${answer.defect ? `: ${answer.defect}` : ""}, ${answer.by}` : "");

// path(frame): where its answer lies; again(id): the frame as it is now; mayanswer(): false while the frame is not yet what one looked at;
// onanswer(frame): its answer has changed.
export function makeViewer({ path, again, mayanswer = () => true, onanswer = () => {}, empty }) {
  const image = h("img", { alt: "", hidden: true });
  const heat = h("img", { alt: "", class: "heat", hidden: true });
  const nothing = h("p", { class: "soft" }, empty);
  const verdict = h("p", { class: "verdict" });
  const fill = h("i");
  const mark = h("b");
  const bar = h("div", { class: "bar", role: "img" }, fill, mark);
  const details = h("dl", { class: "facts" });
  const answered = h("p", { class: "answered", role: "status" });
  const slider = h("input", { type: "range", min: 0, max: 100, "aria-label": "Heat map opacity", oninput: () => opacity(+slider.value) });
  const shown = h("output");
  const classes = h("datalist", { id: "classes" });
  const named = h("input", { name: "defect", list: "classes", maxlength: 60, required: true, placeholder: "crack", "aria-label": "Class of the defect" });
  const naming = h("form", { class: "row", hidden: true }, h("label", {}, "Which defect? ", named),
    h("button", { class: "main" }, "Defect"), h("button", { type: "button", onclick: () => name(false) }, "Cancel"), classes);
  const buttons = h("div", { class: "row answers" },
    h("button", { type: "button", onclick: () => keys.F[0]() }, h("kbd", {}, "F"), " False alarm"),
    h("button", { type: "button", onclick: () => keys.D[0]() }, h("kbd", {}, "D"), " Defect\u2026"),
    h("button", { type: "button", onclick: () => keys.U[0]() }, h("kbd", {}, "U"), " Unsure"),
    h("button", { type: "button", onclick: () => keys.Z[0]() }, h("kbd", {}, "Z"), " Undo"));
  const words = h("figcaption", { hidden: true }, verdict, bar, buttons, naming, answered, details);
  const element = h("figure", { class: "viewer" }, h("div", { class: "picture" }, image, heat, nothing),
    h("label", { class: "row opacity" }, "Heat map", slider, shown, h("span", { class: "soft" }, "red: least like the normal ones")), words);
  let frame = null;

  function opacity(value) {
    slider.value = value;
    shown.textContent = `${slider.value} %`;
    localStorage.setItem(OPACITY, slider.value);
    document.documentElement.style.setProperty("--opacity", slider.value / 100);
  }

  function show(chosen) {
    const changed = frame?.frame_id !== chosen.frame_id;
    frame = chosen;
    words.hidden = false;
    if (changed) {
      name(false);
      load();
    }
    verdict.replaceChildren(...reason(frame));
    const top = Math.max(frame.score, frame.threshold) * 1.15 || 1;
    const share = (value) => `${Math.max(0, Math.min(100, (100 * value) / top))}%`;
    fill.style.width = share(frame.score);
    fill.classList.toggle("over", frame.is_anomaly);
    mark.style.left = share(frame.threshold);
    bar.setAttribute("aria-label", `score ${figure(frame.score)}, threshold ${figure(frame.threshold)}`);
    details.replaceChildren(...pairs({
      camera: frame.camera, captured: moment(frame.captured_at_ms), version: frame.version, energy: figure(frame.energy),
      "scored after": `${Math.max(0, frame.scored_at_ms - frame.captured_at_ms).toFixed(0)} ms`, frame: frame.frame_id,
    }));
    answer(frame.answer);
  }

  function load() {
    image.hidden = heat.hidden = true;
    nothing.textContent = "Loading the picture\u2026";
    nothing.hidden = false;
    image.onload = () => { image.hidden = false; nothing.hidden = true; cover(); };
    heat.onload = () => { heat.hidden = false; cover(); };
    picture(image, frame.frame_url, () => { nothing.textContent = "This picture is no longer kept."; }, frame.heat_url ? 6 : 1);
    image.alt = `Frame of camera ${frame.camera}`;
    picture(heat, frame.heat_url);
    slider.disabled = !frame.heat_url;
  }

  function answer(given) {
    answered.textContent = given
      ? `${WORDS[given.kind]}${given.defect ? `: ${given.defect}` : ""} \u2013 said ${given.by}, ${moment(given.at_ms)}; ${EFFECT[given.kind]}`
      : "Was it right? Say so, and the model learns it.";
    answered.classList.toggle("given", Boolean(given));
    for (const [i, kind] of ["false-alarm", "defect", "unsure"].entries()) {
      buttons.children[i].setAttribute("aria-pressed", given?.kind === kind);
    }
    buttons.children[3].disabled = !given;
  }

  // The heat map lies exactly over the frame, whatever the frame's shape.
  function cover() {
    if (image.hidden || !image.naturalWidth) return;
    const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
    const width = image.naturalWidth * scale, height = image.naturalHeight * scale;
    heat.style.width = `${width}px`;
    heat.style.height = `${height}px`;
    heat.style.left = `${image.offsetLeft + (image.clientWidth - width) / 2}px`;
    heat.style.top = `${image.offsetTop + (image.clientHeight - height) / 2}px`;
  }

  function settle(mine, given) {
    mine.answer = given;
    if (mine === frame) answer(given);
    onanswer(mine);
  }

  // Only what one has seen is replaced; what somebody else has said meanwhile is shown.
  async function change(mine, sent) {
    try {
      return await sent(mine.answer?.at_ms ?? 0);
    } catch (error) {
      const now = error.status === 409 && await again(mine.id);
      if (now) settle(mine, now.answer);
      throw error;
    }
  }

  const give = trying(async (kind, defect) => {
    const mine = frame;
    const by = mine && await who();
    if (!by) return;
    settle(mine, await change(mine, (expected) => send("PUT", path(mine), { kind, by, expected, ...(defect ? { defect } : {}) })));
    tell(`${answerText(mine.answer)}: ${EFFECT[kind]}. Z takes it back.`);
  });

  const undo = trying(async () => {
    const mine = frame;
    if (!mine?.answer) return;
    const was = await change(mine, (expected) => send("DELETE", `${path(mine)}?expected=${expected}`));
    settle(mine, null);
    tell(`Taken back: ${answerText(was)}.`);
  });

  const name = trying(async (open) => {
    naming.hidden = !open;
    if (!open) return;
    named.focus();
    named.select();
    const known = await get("api/v1/defects");
    classes.replaceChildren(...known.classes.map((each) => h("option", { value: each })));
  });

  naming.addEventListener("submit", (event) => {
    event.preventDefault();
    const defect = named.value.trim();
    if (!defect) return;
    name(false);
    buttons.children[1].focus();
    give("defect", defect);
  });
  naming.addEventListener("keydown", (event) => { if (event.key === "Escape") { name(false); buttons.children[1].focus(); } });

  const keys = {
    F: [() => mayanswer() && give("false-alarm"), "answer: false alarm"],
    D: [() => mayanswer() && frame && name(true), "answer: defect, of a class that you name"],
    U: [() => mayanswer() && give("unsure"), "answer: unsure"],
    Z: [() => mayanswer() && undo(), "take the answer back"],
    ArrowRight: [() => opacity(+slider.value + 5), "more heat map"],
    ArrowLeft: [() => opacity(+slider.value - 5), "less heat map"],
  };
  const watcher = new ResizeObserver(cover);
  watcher.observe(image);
  opacity(+(localStorage.getItem(OPACITY) ?? 55));
  return { element, keys, show, close: () => watcher.disconnect(), frame: () => frame };
}

function reason(frame) {
  const times = frame.threshold > 0 && frame.score > 0 ? ` (${(frame.score / frame.threshold).toFixed(2)} times it)` : "";
  const score = h("strong", {}, figure(frame.score));
  return frame.is_anomaly
    ? [h("strong", { class: "over" }, "Called a defect"), ": its score ", score, ` is above the threshold ${figure(frame.threshold)}${times}. `
      + "The heat map shows where it differs most from the normal ones."]
    : [h("strong", {}, "Called normal"), ": its score ", score, ` is not above the threshold ${figure(frame.threshold)}${times}. `
      + "No heat map is kept of such frames."];
}
