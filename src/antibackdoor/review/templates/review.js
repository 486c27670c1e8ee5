"use strict";
// Everything that comes from the data goes into the page as text, never as markup.
const at = (id) => document.getElementById(id);
let queue = "flagged", item = null, classes = [], look = null, busy = false;

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("No answer: the program was ended. What you decided before is saved; start it again to go on.");
  }
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

// One step at a time: a key pressed while a decision is on its way must not hit the next sample.
async function step(work) {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    await work();
    at("trouble").hidden = true;
  } catch (error) {
    at("trouble").textContent = error.message;
    at("trouble").hidden = false;
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

function words(decision) {
  return decision.name === "relabel" ? "relabeled: " + decision.label : decision.name === "undecided" ? "open" : decision.name;
}

function thumbnail(source, name, size) {
  const image = document.createElement("img");
  image.src = source;
  image.alt = name;
  image.width = image.height = size;
  return image;
}

function compared(words, images) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  caption.textContent = words;
  figure.append(caption, ...images);
  return figure;
}

function counts(told) {
  at("counts").textContent = `${told.keep} kept · ${told.drop} dropped · ${told.relabel} relabeled · ${told.open} of ${told.flagged} flagged open`;
  const done = told.flagged - told.open;
  at("bar").firstElementChild.style.width = (told.flagged ? 100 * done / told.flagged : 100) + "%";
  at("bar").setAttribute("aria-valuemax", told.flagged);
  at("bar").setAttribute("aria-valuenow", done);
}

// said: what was just done; the status line, which screen readers speak, goes on with the sample that is shown now.
async function show(position, said = "") {
  item = await ask(`api/item/${queue}/${position}`);
  at("picture").src = "picture/" + item.row;
  at("picture").alt = `sample ${item.id}, labeled ${item.label}`;
  at("position").textContent = `${item.position + 1} of ${item.total}` + (item.flagged ? "" : " · not flagged");
  at("id").textContent = item.id;
  at("label").textContent = item.label;
  at("suggested").textContent = item.suggested ? item.suggested.name : "–";
  at("note").textContent = item.note;
  at("score").textContent = item.score.toPrecision(4);
  at("probability").textContent = item.probability;
  at("decision").textContent = words(item.decision);
  at("decision").dataset.name = item.decision.name;
  at("reason").textContent = item.reason;
  at("suggest").disabled = item.suggested === null;
  at("open").disabled = item.decision.name === "undecided";
  const inside = at("strip").contains(document.activeElement);
  at("strip").replaceChildren(...item.strip.map((other) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.name = other.decision.name;
    if (other.position === item.position) button.setAttribute("aria-current", "true");
    button.title = words(other.decision);
    button.append(thumbnail("picture/" + other.row, `sample ${other.position + 1}, ${words(other.decision)}`, 72));
    button.addEventListener("click", () => step(() => show(other.position)));
    return button;
  }));
  if (inside) at("strip").querySelector("[aria-current]").focus();
  const groups = item.references.filter((group) => group.rows.length).map((group) => compared(`Trusted, labeled ${group.label}`,
    group.rows.map((row) => thumbnail("picture/" + row, `trusted sample labeled ${group.label}`, 96))));
  if (look && look.label === item.label) groups.unshift(compared(look.title, [thumbnail("look", look.words, 96)]));
  at("references").replaceChildren(...groups);
  counts(item.counts);
  const suggested = item.suggested ? `, suggested ${item.suggested.name}` : "";
  const now = `Now ${item.id}, labeled ${item.label}${suggested}, ${words(item.decision)}.`;
  at("status").textContent = [said, now].filter(Boolean).join(" ");
}

async function decide(decision, code) {
  const told = await ask("api/decide", { row: item.row, decision, ...(code === undefined ? {} : { code }) });
  const done = told.counts.open === 0 && queue === "flagged" ? " All flagged samples are decided: press E to export." : "";
  const next = decision === "undecided" ? item.position : Math.min(item.position + 1, item.total - 1);
  await show(next, `${item.id}: ${words(told.decision)}, saved.${done}`);
}

const actions = {
  k: () => decide("keep"),
  d: () => decide("drop"),
  s: () => item.suggested ? decide("relabel", item.suggested.code) : undefined,
  o: () => item.decision.name === "undecided" ? undefined : decide("undecided"),
  u: async () => {
    const told = await ask("api/undo", {});
    if (!(queue in told.positions)) { queue = "all"; at("queue").value = queue; }
    await show(told.positions[queue], "Taken back.");
  },
  arrowleft: () => item.position > 0 ? show(item.position - 1) : undefined,
  arrowright: () => item.position + 1 < item.total ? show(item.position + 1) : undefined,
  " ": async () => {
    if (item.next !== null) await show(item.next);
    else at("status").textContent = "No other sample is open.";
  },
};

function choose() {
  if (item.suggested) at("class").value = item.suggested.code;
  at("classes").returnValue = "cancel";
  at("classes").showModal();
  at("class").focus();
}

function openExport() {
  at("export").returnValue = "cancel";
  at("export").showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("classes").open || at("export").open || !item) return;
  if (event.target instanceof HTMLSelectElement) return;
  if (event.target instanceof HTMLButtonElement && (event.key === " " || event.key === "Enter")) return;
  const key = event.key.toLowerCase();
  if (key === "r") { event.preventDefault(); choose(); }
  else if (key === "e") { event.preventDefault(); openExport(); }
  else if (key in actions && !(event.repeat && "kdsou".includes(key))) { event.preventDefault(); step(actions[key]); }
});
for (const [id, key] of [["keep", "k"], ["drop", "d"], ["suggest", "s"], ["open", "o"], ["undo", "u"]]) {
  at(id).addEventListener("click", () => step(actions[key]));
}
at("relabel").addEventListener("click", choose);
at("save").addEventListener("click", openExport);
at("class").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); at("classes").close("ok"); }
});
at("classes").addEventListener("close", () => {
  const code = at("class").value;
  if (at("classes").returnValue === "ok" && code !== "") step(() => decide("relabel", Number(code)));
});
at("export").addEventListener("close", () => {
  if (at("export").returnValue !== "ok") return;
  step(async () => {
    at("status").textContent = "Writing …";
    const told = await ask("api/export", { form: at("form").value, undecided: at("undecided").value });
    at("status").textContent = `${told.told}: ${told.folder}`;
  });
});
at("queue").addEventListener("change", () => step(async () => {
  queue = at("queue").value;
  at("queue").blur();
  await show(0);
}));

step(async () => {
  const start = await ask("api/start");
  classes = start.classes;
  look = start.look;
  document.body.dataset.kind = start.kind;
  at("run").textContent = start.run;
  at("class").replaceChildren(...classes.map((name, code) => {
    const option = document.createElement("option");
    option.value = code;
    option.textContent = name;
    return option;
  }));
  if (start.kind === "series") at("form").querySelector("[value=folder]").remove();
  if (start.queues.flagged === 0) { queue = "all"; at("queue").value = queue; at("queue").options[0].disabled = true; }
  await show(start.queues.flagged === 0 ? 0 : start.first ?? 0);
});
