// Versions of each model: what scores now, what the gate said in numbers, promote and roll back.

import { figure, get, h, moment, percent, question, send, tell, trying, who } from "./dom.js";

const PAGE = 50;
const EVERY = 5; // looks

export function openVersions(root, model) {
  const now = h("p", { class: "summary" }, "Looking for versions\u2026");
  const back = h("button", { type: "button", onclick: () => keys.B[0]() }, h("kbd", {}, "B"), " Roll back\u2026");
  const body = h("tbody");
  const more = h("button", { type: "button", hidden: true, onclick: () => { shown += PAGE; load(); } }, "Older versions");
  const moves = h("ol", { class: "moves" });
  const models = h("select", { "aria-label": "Model", hidden: true, onchange: () => { location.hash = `#/versions/${encodeURIComponent(models.value)}`; } });
  const heads = ["Version", "Made", "AUROC", "Threshold", "New normals", "Gate", ""];
  root.append(h("div", { class: "row head" }, h("h1", {}, "Versions"), models, now, back),
    h("section", { class: "card" }, h("table", {}, h("thead", {}, h("tr", {}, ...heads.map((each) => h("th", { scope: "col" }, each)))), body), more),
    h("section", { class: "card" }, h("h2", {}, "What was made current"), moves));

  let page = null, shown = PAGE, rounds = 0, last = "";

  async function load() {
    const [found, all] = await Promise.all([get("api/v1/versions", { model, count: shown }), get("api/v1/models")]);
    page = found;
    const text = JSON.stringify([page, all]);
    if (text === last) return;
    last = text;
    models.replaceChildren(...all.models.map((each) => h("option", { value: each.model, selected: each.model === page.model }, `${each.model} (${scores(each)})`)));
    models.hidden = all.models.length < 2 && all.models[0].model === page.model;
    now.replaceChildren(...(page.current ? ["Now scoring, by the pointer: ", h("strong", {}, page.current)] : ["No version is current."]));
    back.disabled = !page.rollback_to;
    body.replaceChildren(...page.versions.flatMap(row));
    more.hidden = page.known <= shown;
    moves.replaceChildren(...page.promotions.slice(0, 50).map((move) => h("li", {},
      h("span", { class: "soft" }, moment(move.at)), " ", h("strong", {}, move.version), ` by ${move.by}: ${move.why}`)));
  }

  function row(version) {
    const promote = h("button", { type: "button", onclick: () => ask(version.version, { why: "promoted in the console", verb: "Promote" }) }, "Promote\u2026");
    promote.disabled = version.current;
    const gate = version.decision || version.why ? h("details", {},
      h("summary", {}, h("span", { class: `gate ${version.decision}` }, version.decision || (version.kind === "broken" ? "broken" : "no gate")), ` ${version.why}`),
      h("dl", { class: "numbers" }, ...Object.entries(version.numbers).map(([name, value]) => h("div", {},
        h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(3) : String(value)))))) : "\u2013";
    return h("tr", { "aria-current": version.current },
      h("th", { scope: "row" }, version.current ? h("span", { class: "pill" }, "current") : null, " ", version.version,
        version.parent ? h("div", { class: "soft" }, `from ${version.parent}`) : null),
      h("td", {}, version.kind, h("div", { class: "soft" }, moment(version.created_at)),
        version.dataset ? h("div", { class: "soft" }, `data ${version.dataset}`) : null),
      h("td", {}, version.auroc === null ? "\u2013" : version.auroc.toFixed(3)),
      h("td", {}, figure(version.threshold), version.false_alarm_rate ? h("div", { class: "soft" }, `for ${percent(version.false_alarm_rate)} false alarms`) : null),
      h("td", {}, version.new_normals === null ? "\u2013" : String(version.new_normals)),
      h("td", { class: "wide" }, gate), h("td", {}, promote));
  }

  const ask = trying(async (version, { why, verb, back = false }) => {
    const expected = page.current;
    const by = await who();
    if (!by) return;
    const given = await question(`${verb} ${version}?`, [
      h("p", {}, expected ? `Now ${expected} scores. ` : "", "Every frame is scored by the new one within seconds; results keep the version that scored them."),
      h("label", {}, "Why ", h("input", { name: "why", maxlength: 200, required: true, value: why }))], verb);
    if (!given) return;
    const of = encodeURIComponent(page.model);
    const moved = await send("POST", `api/v1/versions/${encodeURIComponent(version)}/promote?model=${of}`, { expected, by, why: given.why, back });
    tell(`${page.model}: ${moved.version} is current.`);
    await load();
  });

  const keys = { B: [() => page?.rollback_to && ask(page.rollback_to, { why: "rolled back in the console", verb: "Roll back to", back: true }), "roll back"] };
  return { look: async () => { if (rounds++ % EVERY === 0) await load(); }, keys };
}

function scores({ default: main, bound_cameras: bound }) {
  if (main) return "every camera not bound to another";
  return bound === 1 ? "1 camera" : `${bound || "no"} cameras`;
}
