// The wall: all cameras, the worst first, to be read from across the hall.

import { get, h, percent, picture, since } from "./dom.js";

const SHOWN = 200; // tiles at a time; the filter finds the others
const MARK = { alerting: "\u25b2", silent: "\u25a0", ok: "\u25cf" };
const EVERY = 2; // looks

export function openWall(root) {
  const summary = h("p", { class: "summary", "aria-live": "polite" }, "Looking for cameras\u2026");
  const only = h("input", { type: "search", placeholder: "Camera", "aria-label": "Show cameras whose name contains" });
  const grid = h("div", { class: "wall" });
  const tiles = new Map();
  let cameras = [];
  let known = 0;
  let rounds = 0;
  only.addEventListener("input", draw);
  root.append(h("div", { class: "row head" }, h("h1", {}, "Cameras"), summary, only), grid);

  function draw() {
    const wanted = cameras.filter((each) => each.camera.toLowerCase().includes(only.value.toLowerCase()));
    const shown = wanted.slice(0, SHOWN);
    const now = shown.map((camera) => {
      if (!tiles.has(camera.camera)) tiles.set(camera.camera, tile(camera.camera));
      tiles.get(camera.camera).show(camera);
      return tiles.get(camera.camera).element;
    });
    if (now.length !== grid.children.length || now.some((each, i) => each !== grid.children[i])) {
      const focused = document.activeElement;
      grid.replaceChildren(...now);
      if (grid.contains(focused)) focused.focus();
    }
    const told = sentence(cameras, known) + (wanted.length > SHOWN ? ` The worst ${SHOWN} are shown.` : "")
      + (known > cameras.length ? ` The filter looks through the worst ${cameras.length}.` : "");
    if (summary.textContent !== told) summary.textContent = told;
  }

  async function look() {
    if (rounds++ % EVERY) return;
    ({ cameras, known } = await get("api/v1/cameras"));
    draw();
  }

  function step(by) {
    const at = [...grid.children].indexOf(document.activeElement);
    grid.children[Math.max(0, Math.min(grid.children.length - 1, at + by))]?.focus();
  }

  return {
    look,
    keys: {
      ArrowRight: [() => step(1), "next camera"], ArrowLeft: [() => step(-1), "camera before"],
      Enter: [() => document.activeElement?.click(), "open the camera"],
      "/": [() => only.focus(), "find a camera"],
    },
  };
}

function sentence(cameras, known) {
  if (!cameras.length) return "No camera has sent a frame yet.";
  const count = (state) => cameras.filter((each) => each.state === state).length;
  // Of more than are sent, the worst are: only the last state among them may be cut short.
  const counted = (state) => (known > cameras.length && cameras.at(-1).state === state ? "at least " : "") + count(state);
  const quiet = count("silent") ? ` ${counted("silent")} silent.` : "";
  if (!count("alerting")) return `None of ${known} is alerting.${quiet}`;
  const [worst] = cameras;
  return `${counted("alerting")} of ${known} alerting. Worst: ${worst.camera}, where `
    + `${percent(worst.alert_share)} of the frames raise an alert.${quiet}`;
}

function tile(name) {
  const state = h("span", { class: "pill" });
  const share = h("strong", { class: "big" });
  const rate = h("span", { class: "soft" });
  const last = h("span", { class: "soft" });
  const frame = h("img", { alt: "", hidden: true });
  const heat = h("img", { alt: "", class: "heat", hidden: true });
  for (const image of [frame, heat]) image.addEventListener("load", () => { image.hidden = false; });
  const element = h("a", { class: "tile", href: `#/camera/${encodeURIComponent(name)}` },
    h("span", { class: "shot" }, frame, heat),
    h("span", { class: "words" }, state, h("span", { class: "name" }, name),
      h("span", {}, share, h("span", { class: "soft" }, " of frames alert")), rate, last));

  function show(camera) {
    element.dataset.state = camera.state;
    state.textContent = `${MARK[camera.state]} ${camera.state}`;
    share.textContent = percent(camera.alert_share);
    const speed = camera.frames_per_s === null ? "\u2013" : camera.frames_per_s.toFixed(1);
    const quiet = camera.last_scored_at_ms ? `no frame for ${since(camera.last_scored_at_ms)}` : "no frame yet";
    rate.textContent = camera.state === "silent" ? quiet : `${speed} frames/s`;
    last.textContent = camera.last_alert_at_ms ? `last alert ${since(camera.last_alert_at_ms)} ago` : "no alert yet";
    if (camera.last_alert_frame_url && frame.dataset.url !== camera.last_alert_frame_url) {
      picture(frame, camera.last_alert_frame_url);
      picture(heat, camera.last_alert_heat_url);
    }
  }
  return { element, show };
}
