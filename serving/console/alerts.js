// The live list of alerts, and the one that is selected. The list draws only what can be seen, so that
// a hundred thousand are as quick as ten; they are fetched page by page as one scrolls.

import { behind, figure, get, h, moment, picture, tell, trying } from "./dom.js";
import { answerText, makeViewer } from "./viewer.js";

const ROW = 96; // pixels, as in console.css
const SPARE = 4; // rows drawn beyond the visible ones
const PAGE = 100;
const SETTLED_MS = 800; // what came in so short a time was not what one meant to answer
const KEPT = 20000; // in memory; older ones are fetched again by time

export function openAlerts(root, camera) {
  const viewer = makeViewer({
    path: (alert) => `api/v1/alerts/${alert.id}/answer`,
    again: async (id) => (await get("api/v1/alerts", { before: behind(id), count: 1 })).alerts.find((each) => each.id === id),
    mayanswer,
    onanswer: () => draw(true),
    empty: "No alert yet. The first one will show here.",
  });
  const live = h("input", { type: "checkbox", checked: true, onchange: () => follow(live.checked) });
  const only = h("select", { "aria-label": "Camera", onchange: () => { location.hash = `#/alerts/${encodeURIComponent(only.value)}`; } },
    h("option", { value: "" }, "all cameras"));
  const until = h("input", { type: "datetime-local", "aria-label": "Not later than", onchange: () => { live.checked = !until.value; trying(restart)(); } });
  const rows = h("div", { class: "rows", role: "listbox", tabindex: 0, "aria-label": "Alerts, newest first" });
  const list = h("div", { class: "list" }, rows);
  const count = h("p", { class: "soft count" });
  root.append(h("div", { class: "row head" }, h("h1", {}, "Alerts"), only, h("label", {}, "until ", until),
    h("label", {}, live, " Follow the newest ", h("kbd", {}, "L"))),
  h("div", { class: "split" }, viewer.element, h("section", { "aria-label": "All alerts" }, count, list)));

  let alerts = []; // newest first
  let known = new Set();
  let selected = null;
  let older = null;
  let newest = "";
  let begun = false;
  let turn = 0; // of the list: what comes for an earlier one, or after the page has closed, is dropped
  let fetching = null; // the turn whose older alerts are awaited
  let drawn = new Map(); // index -> element, of those on the screen
  let rounds = 0;
  let cameAt = 0;

  const filter = () => ({ camera, to: until.value ? new Date(until.value).getTime() : "" });

  async function restart() {
    const mine = ++turn;
    const page = await get("api/v1/alerts", { count: PAGE, ...filter() });
    if (mine !== turn) return;
    alerts = page.alerts;
    known = new Set(alerts.map((each) => each.id));
    newest = page.newest;
    older = page.older;
    list.scrollTop = 0;
    begun = true;
    draw(true);
    if (live.checked || !alerts.some((each) => each.id === selected)) top();
  }

  async function more() {
    const mine = turn;
    if (fetching === mine || !older || alerts.length >= KEPT) return;
    fetching = mine;
    try {
      let fresh = [];
      while (!fresh.length && older) { // of a camera that seldom alerts, a page may hold none
        const page = await get("api/v1/alerts", { count: PAGE, before: older, camera });
        if (mine !== turn) return;
        older = page.older;
        fresh = page.alerts.filter((each) => !known.has(each.id));
      }
      fresh.forEach((each) => known.add(each.id));
      alerts.push(...fresh);
      draw(true);
    } finally {
      if (fetching === mine) fetching = null;
    }
  }

  async function look() {
    if (rounds++ % 10 === 0) await cameras();
    if (!begun) return restart();
    if (until.value) return;
    const mine = turn;
    const page = await get("api/v1/alerts", { after: newest, camera });
    if (mine !== turn) return;
    if (page.skipped) return restart();
    newest = page.newest;
    const fresh = page.alerts.filter((each) => !known.has(each.id));
    if (!fresh.length) return;
    fresh.forEach((each) => known.add(each.id));
    alerts.unshift(...fresh);
    if (alerts.length > KEPT) {
      const cut = alerts.splice(KEPT), open = cut.find((each) => each.id === selected);
      cut.forEach((each) => known.delete(each.id));
      older = alerts.at(-1).id;
      if (open) alerts.push(open);
    }
    if (!live.checked) list.scrollTop += fresh.length * ROW; // what one reads stays where it is
    draw(true);
    if (live.checked || selected === null) top();
  }

  async function cameras() {
    const names = (await get("api/v1/cameras")).cameras.map((each) => each.camera).sort();
    if (camera && !names.includes(camera)) names.push(camera);
    if (names.join("\n") === only.dataset.names) return;
    only.dataset.names = names.join("\n");
    only.replaceChildren(h("option", { value: "" }, "all cameras"), ...names.map((each) => h("option", { value: each }, each)));
    only.value = camera;
  }

  // Answering ends following: what one answers stays.
  function mayanswer() {
    const followed = live.checked;
    live.checked = false;
    if (!followed || Date.now() - cameAt > SETTLED_MS) return true;
    tell("Another alert had just come up. It stays now: press again to answer it.");
    return false;
  }

  function follow(on) {
    live.checked = on;
    if (!on) return;
    if (!until.value) return top();
    until.value = ""; // the newest are not among those until then
    trying(restart)();
  }

  function top() {
    if (selected !== null && alerts.length && alerts[0].id !== selected) cameAt = Date.now();
    list.scrollTop = 0;
    select(0);
  }

  function draw(anew = false) {
    rows.style.height = `${alerts.length * ROW}px`;
    count.textContent = `${alerts.length}${older ? " and more" : ""} ${alerts.length === 1 ? "alert" : "alerts"}`;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
    const last = Math.min(alerts.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
    const wanted = new Map();
    for (let i = first; i < last; i++) {
      const there = drawn.get(i);
      wanted.set(i, there && there.dataset.id === alerts[i].id && !anew ? there : entry(alerts[i], i, there));
    }
    for (const [i, element] of drawn) if (wanted.get(i) !== element) element.remove();
    for (const element of wanted.values()) if (!element.isConnected) rows.append(element);
    drawn = wanted;
    if (last > alerts.length - 2 * SPARE) more().catch(() => {});
  }

  function entry(alert, i, there) {
    if (there?.dataset.id === alert.id) {
      there.setAttribute("aria-selected", alert.id === selected);
      there.querySelector(".said").textContent = answerText(alert.answer);
      return there;
    }
    const thumb = h("img", { alt: "" });
    picture(thumb, alert.frame_url);
    const item = h("div", {
      class: "entry", id: `a${alert.id}`, role: "option", "data-id": alert.id, "aria-selected": String(alert.id === selected),
      "aria-setsize": older ? -1 : alerts.length, "aria-posinset": i + 1,
      onclick: () => { live.checked = false; select(alerts.findIndex((each) => each.id === alert.id)); },
    }, thumb, h("div", {}, h("div", { class: "name" }, alert.camera),
      h("div", {}, h("span", { class: "over" }, figure(alert.score)), ` > ${figure(alert.threshold)}`),
      h("div", { class: "soft" }, moment(alert.captured_at_ms)),
      h("div", { class: "said" }, answerText(alert.answer))));
    item.style.top = `${i * ROW}px`;
    return item;
  }

  function select(i) {
    const alert = alerts[i];
    if (!alert) return;
    selected = alert.id;
    if (i * ROW < list.scrollTop) list.scrollTop = i * ROW;
    if ((i + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (i + 1) * ROW - list.clientHeight;
    draw(true);
    rows.setAttribute("aria-activedescendant", `a${alert.id}`);
    viewer.show(alert);
  }

  function step(by) {
    live.checked = false;
    const at = alerts.findIndex((each) => each.id === selected);
    select(Math.max(0, Math.min(alerts.length - 1, at + by)));
  }

  list.addEventListener("scroll", () => { if (list.scrollTop > ROW) live.checked = false; draw(); });
  const down = [() => step(1), "next alert"], up = [() => step(-1), "alert before"];
  return {
    look,
    close: () => { turn++; viewer.close(); },
    keys: {
      ArrowDown: down, ArrowUp: up, J: [down[0], ""], K: [up[0], ""], ...viewer.keys,
      L: [() => follow(!live.checked), "follow the newest"],
      C: [() => { const frame = viewer.frame(); if (frame) location.hash = `#/camera/${encodeURIComponent(frame.camera)}`; }, "open its camera"],
    },
  };
}
