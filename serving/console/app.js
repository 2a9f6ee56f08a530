// The shell: which page is open, what the keys do, whether the server answers.

import { openAlerts } from "./alerts.js";
import { openCamera } from "./camera.js";
import { $, askName, get, h, pairs, question, say, showName } from "./dom.js";
import { openVersions } from "./versions.js";
import { openWall } from "./wall.js";

const EVERY_MS = 1000;
const FACTS_EVERY = 3;
// Each opens into an element and gives { look, keys, help, close }: look runs once a second.
const PAGES = { cameras: openWall, alerts: openAlerts, camera: openCamera, versions: openVersions };
const KEYS = {
  1: [() => { location.hash = "#/cameras"; }, "cameras"],
  2: [() => { location.hash = "#/alerts"; }, "alerts"],
  3: [() => { location.hash = "#/versions"; }, "versions"],
  "?": [() => help(), "this list"],
};
let page = null;

function route() {
  const [, name = "", argument = ""] = location.hash.match(/^#\/([a-z]+)\/?(.*)$/) ?? [];
  const chosen = PAGES[name] ? name : "cameras";
  page?.close?.();
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash === `#/${chosen === "camera" ? "cameras" : chosen}`;
    if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  $("main").replaceChildren();
  page = PAGES[chosen]($("main"), decode(argument));
  look();
}

function decode(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

function help() {
  const row = ([key, [, what]]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, what));
  question("Keys", [h("dl", { class: "keys" }, ...[...Object.entries(page.keys ?? {}), ...Object.entries(KEYS)]
    .filter(([, [, what]]) => what).map(row))], "", "Close");
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("dialog").open) return;
  const { tagName, type } = event.target;
  if (["SELECT", "TEXTAREA"].includes(tagName) || (tagName === "INPUT" && !["range", "checkbox"].includes(type))) return;
  if (type === "range" && event.key.startsWith("Arrow")) return;
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  const found = page.keys?.[key] ?? KEYS[key];
  if (found) { event.preventDefault(); found[0](); }
});

async function facts() {
  const status = await get("api/v1/status");
  const { scorer, consumer } = status; // either may be restarting: then it only has `trouble`
  const waiting = Object.values(status.waiting).reduce((sum, each) => sum + each, 0);
  $("facts").replaceChildren(...pairs({ version: scorer.version ?? "?", waiting }));
  const refused = Object.keys(scorer.refused ?? {});
  // The scorer's is by model, or one text while it restarts.
  const models = typeof scorer.trouble === "string" ? scorer.trouble
    : Object.entries(scorer.trouble ?? {}).map(([model, why]) => model === "replicas" ? why : `model ${model}: ${why}`).join("; ");
  return consumer.trouble || models || (refused.length ? `version ${refused.at(-1)} was refused` : "");
}

let looking = null;
async function look() {
  const mine = page;
  if (looking === mine) return;
  looking = mine;
  try {
    await mine.look();
    mine.failed = "";
  } catch (error) {
    mine.failed = `no answer from the server (${error.message}); trying again`;
  } finally {
    if (looking === mine) looking = null;
  }
}

addEventListener("hashchange", route);
$("keys").addEventListener("click", help);
$("who").addEventListener("click", askName);
showName();
route();

for (let round = 0, trouble = ""; ; round++) {
  if (!document.hidden) {
    if (round) await look();
    try {
      if (round % FACTS_EVERY === 0) trouble = await facts();
    } catch (error) {
      trouble = `no answer from the server (${error.message}); trying again`;
    }
    say(page.failed || trouble);
  }
  await new Promise((done) => setTimeout(done, EVERY_MS));
}
