// Elements, requests, dialogs. Text from outside (camera ids above all) only ever becomes text nodes.

export const $ = (id) => document.getElementById(id);

// h("a", { href, class, onclick, "aria-label" }, child, ...): children are elements or text.
export function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const pairs = (values) => Object.entries(values).map(
  ([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));

export const figure = (value) => (value === null || value === undefined ? "\u2013" : Number(value).toPrecision(4));
export const percent = (share) => (share === null || share === undefined ? "\u2013"
  : share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);
export const clock = (ms) => new Date(ms).toLocaleTimeString([], { hour12: false });
export const moment = (ms) => new Date(ms).toLocaleString([], { hour12: false });

export function since(ms) {
  const seconds = Math.max(0, (Date.now() - ms) / 1000);
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.floor(seconds)} s`;
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(30000), ...options });
  if (answer.status === 401) location.reload();
  if (answer.ok) return answer.json();
  const { detail } = await answer.json().catch(() => ({}));
  const error = new Error(typeof detail === "string" ? detail : `${answer.status} ${answer.statusText}`);
  throw Object.assign(error, { status: answer.status });
}

export const get = (path, values = {}) => {
  const query = new URLSearchParams(
    Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined));
  return ask(query.size ? `${path}?${query}` : path);
};

export const send = (method, path, body) => ask(path, {
  method,
  headers: { "x-dpdl": "1", ...(body ? { "content-type": "application/json" } : {}) },
  body: body ? JSON.stringify(body) : undefined,
});

// Pages end before an id: with this one as the end the entry comes first.
export function behind(id) {
  const [ms, count] = id.split("-");
  return `${ms}-${+count + 1}`;
}

export function say(trouble) {
  $("state").textContent = trouble || `live, ${clock(Date.now())}`;
  $("state").classList.toggle("bad", Boolean(trouble));
  $("state").role = trouble ? "alert" : null; // a clock that ticks is not read aloud
}

let telling = 0;
export function tell(text, bad = false) {
  $("told").textContent = text;
  $("told").classList.toggle("bad", bad);
  $("told").hidden = false;
  clearTimeout(telling);
  telling = setTimeout(() => { $("told").hidden = true; }, 6000);
}

// What a person did went wrong: said where they look, and nothing is half done.
export const trying = (act) => async (...values) => {
  try {
    return await act(...values);
  } catch (error) {
    tell(error.message, true);
    return null;
  }
};

// A modal question; resolves to the form's values, or null when it is left.
export function question(title, content, yes, no = "Cancel") {
  const dialog = $("dialog");
  if (dialog.open) return Promise.resolve(null);
  const form = h("form", { method: "dialog" }, h("h2", {}, title), ...content, h("div", { class: "row" },
    yes && h("button", { value: "yes", class: "main" }, yes),
    h("button", { value: "no", type: "button", onclick: () => dialog.close("no") }, no)));
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  dialog.showModal();
  (form.querySelector("input") ?? form.querySelector("button")).focus();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(
      dialog.returnValue === "yes" ? Object.fromEntries(new FormData(form)) : null), { once: true });
  });
}

const WHO = "dpdl who";
export const name = () => localStorage.getItem(WHO) ?? "";

export async function askName() {
  const given = await question("Who are you?", [
    h("p", {}, "Your name stands with what you answer and change. This browser remembers it."),
    h("input", { name: "who", "aria-label": "Your name", required: true, maxlength: 60, value: name(), autocomplete: "name" }),
  ], "That is me");
  if (given?.who?.trim()) localStorage.setItem(WHO, given.who.trim());
  showName();
  return given ? name() : "";
}

// The name for a change; asked for once. "" when it was not given: then nothing is changed.
export const who = async () => name() || askName();

export function showName() {
  $("who").textContent = name() ? `You: ${name()}` : "You: who?";
}

// Evidence may be a moment late, or owed while S3 was away: ask again a few times, then say so.
// Without a url there is none to show: one that is still loading must not come up either.
export function picture(image, url, onlost, tries = 6) {
  if (!url) {
    image.hidden = true;
    image.dataset.url = "";
    image.removeAttribute("src");
    return;
  }
  image.onerror = () => {
    if (image.dataset.url !== url) return;
    if (tries-- > 0) setTimeout(() => { if (image.dataset.url === url) image.src = `${url}?again=${tries}`; }, 1500);
    else onlost?.();
  };
  image.dataset.url = url;
  image.src = url;
}
