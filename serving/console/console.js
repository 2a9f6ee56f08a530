// The live list of alerts. Text from outside (camera ids above all) only ever becomes text nodes.

const SHOWN = 300; // entries kept in the list; older ones come back by the button
const EVERY_MS = 1000;
const $ = (id) => document.getElementById(id);

let alerts = []; // newest first
let selected = null; // id
let oldest = null; // where "older" goes on; null when there is no more
let newest = "";

async function get(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (answer.status === 401) location.reload();
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

const query = (values) => new URLSearchParams(
  Object.entries({ ...values, camera: $("only").value }).filter(([, value]) => value)).toString();

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function pairs(target, values) {
  target.replaceChildren(...Object.entries(values).map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  }));
}

const clock = (ms) => new Date(ms).toLocaleTimeString([], { hour12: false });
const moment = (ms) => new Date(ms).toLocaleString([], { hour12: false });
const figure = (value) => Number(value).toPrecision(4);

// Evidence may be a moment late, or owed while S3 was away: ask again a few times, then say so.
function picture(image, url, onLost, tries = 6) {
  image.onerror = () => {
    if (tries-- > 0 && image.dataset.url === url) setTimeout(() => { image.src = `${url}?again=${tries}`; }, 1500);
    else if (onLost) onLost();
  };
  image.dataset.url = url;
  image.src = url;
}

function entry(alert) {
  const item = element("li");
  item.id = `a${alert.id}`;
  item.setAttribute("role", "option");
  item.setAttribute("aria-selected", alert.id === selected);
  const thumb = element("img");
  thumb.alt = "";
  thumb.loading = "lazy";
  if (alert.frame_url) picture(thumb, alert.frame_url);
  const text = element("div");
  text.append(
    element("div", "name", alert.camera),
    element("div", "score", `${figure(alert.score)} > ${figure(alert.threshold)}`),
    element("div", "soft", moment(alert.captured_at_ms)));
  item.append(thumb, text);
  item.addEventListener("click", () => { $("live").checked = false; select(alert.id); });
  return item;
}

function select(id) {
  const alert = alerts.find((each) => each.id === id);
  if (!alert) return;
  document.getElementById(`a${selected}`)?.setAttribute("aria-selected", "false");
  selected = id;
  const item = document.getElementById(`a${id}`);
  item?.setAttribute("aria-selected", "true");
  item?.scrollIntoView({ block: "nearest" });
  $("list").setAttribute("aria-activedescendant", `a${id}`);
  show(alert);
}

function show(alert) {
  const lost = () => { $("nothing").textContent = "The picture of this alert is not (or not yet) in S3."; $("nothing").hidden = false; };
  $("nothing").hidden = true;
  for (const [image, url] of [[$("frame"), alert.frame_url], [$("heat"), alert.heat_url]]) {
    image.hidden = true;
    image.onload = () => { image.hidden = false; $("nothing").hidden = true; cover(); };
    if (url) picture(image, url, image.id === "frame" ? lost : null);
  }
  if (!alert.frame_url) lost();
  $("frame").alt = `Frame of camera ${alert.camera}`;
  $("camera").textContent = alert.camera;
  $("when").textContent = moment(alert.captured_at_ms);
  $("when").dateTime = new Date(alert.captured_at_ms).toISOString();
  const top = Math.max(alert.score, alert.threshold) * 1.15 || 1;
  const share = (value) => `${Math.max(0, Math.min(100, 100 * value / top))}%`;
  $("fill").style.width = share(alert.score);
  $("mark").style.left = share(alert.threshold);
  $("bar").setAttribute("aria-label", `score ${figure(alert.score)}, threshold ${figure(alert.threshold)}`);
  pairs($("details"), {
    score: figure(alert.score), threshold: figure(alert.threshold), energy: figure(alert.energy),
    model: alert.model, version: alert.version, frame: alert.frame_id,
    "scored after": `${Math.max(0, alert.scored_at_ms - alert.captured_at_ms).toFixed(0)} ms`,
  });
}

// The heat map lies exactly over the frame, whatever the frame's shape.
function cover() {
  const frame = $("frame"), heat = $("heat");
  if (frame.hidden || !frame.naturalWidth) return;
  const scale = Math.min(frame.clientWidth / frame.naturalWidth, frame.clientHeight / frame.naturalHeight);
  const width = frame.naturalWidth * scale, height = frame.naturalHeight * scale;
  heat.style.width = `${width}px`;
  heat.style.height = `${height}px`;
  heat.style.left = `${frame.offsetLeft + (frame.clientWidth - width) / 2}px`;
  heat.style.top = `${frame.offsetTop + (frame.clientHeight - height) / 2}px`;
}

function add(fresh, where) {
  const known = new Set(alerts.map((each) => each.id));
  fresh = fresh.filter((each) => !known.has(each.id));
  if (where === "top") { alerts.unshift(...fresh); $("list").prepend(...fresh.map(entry)); }
  else { alerts.push(...fresh); $("list").append(...fresh.map(entry)); }
}

function trim() {
  if (alerts.length <= SHOWN || !$("live").checked) return;
  alerts.splice(SHOWN).forEach((each) => document.getElementById(`a${each.id}`)?.remove());
  oldest = alerts.at(-1).id;
  $("older").hidden = false;
}

async function restart() {
  const first = await get(`api/v1/alerts?${query({ count: 50 })}`);
  alerts = [];
  $("list").replaceChildren();
  add(first.alerts, "top");
  newest = first.newest;
  oldest = first.older;
  $("older").hidden = !oldest;
  if (alerts.length) select(alerts[0].id);
}

async function older() {
  const page = await get(`api/v1/alerts?${query({ before: oldest, count: 50 })}`);
  add(page.alerts, "bottom");
  oldest = page.older;
  $("older").hidden = !oldest;
}

async function look() {
  const page = await get(`api/v1/alerts?${query({ after: newest, count: 100 })}`);
  if (page.skipped) return restart();
  newest = page.newest;
  add(page.alerts, "top");
  trim();
  if (page.alerts.length && ($("live").checked || !selected)) select(alerts[0].id);
}

async function facts() {
  const [status, page] = await Promise.all([get("api/v1/status"), get("api/v1/cameras")]);
  const { scorer, consumer } = status; // either may be restarting: then it only has `trouble`
  const lag = Object.values(consumer.lag ?? {}).reduce((sum, each) => sum + each, 0);
  const frames = page.cameras.reduce((sum, each) => sum + each.frames, 0);
  pairs($("facts"), {
    version: scorer.version ?? "?", cameras: page.known, "frames scored": frames, waiting: lag,
  });
  const refused = Object.keys(scorer.refused ?? {});
  say(consumer.trouble || scorer.trouble || (refused.length ? `version ${refused.at(-1)} was refused` : ""));
  const chosen = $("only").value;
  const names = page.cameras.map((each) => each.camera);
  if (names.join("\n") !== $("only").dataset.names) {
    $("only").dataset.names = names.join("\n");
    $("only").replaceChildren(new Option("all", ""), ...names.map((name) => new Option(name, name)));
    $("only").value = names.includes(chosen) ? chosen : "";
  }
}

function say(trouble) {
  $("state").textContent = trouble || `live, ${clock(Date.now())}`;
  $("state").classList.toggle("bad", Boolean(trouble));
}

function opacity(value) {
  $("opacity").value = value;
  document.documentElement.style.setProperty("--opacity", $("opacity").value / 100);
  $("percent").textContent = `${$("opacity").value} %`;
}

function step(by) {
  const at = alerts.findIndex((each) => each.id === selected);
  const next = alerts[Math.max(0, Math.min(alerts.length - 1, at + by))];
  if (next) { $("live").checked = false; select(next.id); }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const keys = {
    ArrowDown: () => step(1), j: () => step(1), ArrowUp: () => step(-1), k: () => step(-1),
    ArrowRight: () => opacity(+$("opacity").value + 5), ArrowLeft: () => opacity($("opacity").value - 5),
    l: () => { $("live").checked = !$("live").checked; if ($("live").checked && alerts.length) select(alerts[0].id); },
  };
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); act(); }
});
document.querySelector("form.controls").addEventListener("submit", (event) => event.preventDefault());
$("opacity").addEventListener("input", () => opacity($("opacity").value));
$("older").addEventListener("click", () => older().catch((error) => say(error.message)));
$("only").addEventListener("change", () => restart().catch((error) => say(error.message)));
$("live").addEventListener("change", () => { if ($("live").checked && alerts.length) select(alerts[0].id); });
addEventListener("resize", cover);
opacity(55);

for (let round = 0, begun = false; ; round++) {
  try {
    if (!begun) { await restart(); begun = true; } else if (!document.hidden) await look();
    if (round % 3 === 0) await facts();
  } catch (error) {
    say(`no answer from the server (${error.message}); trying again`);
  }
  await new Promise((done) => setTimeout(done, EVERY_MS));
}
