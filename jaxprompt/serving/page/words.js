// Other words around the vectors of a prompt: each change asks the server for the same text again.
import { $, answered, ask, describe, el, latency, message, promptPath, say, state } from "./page.js";

const PAUSE_MS = 250; // after the last key, before the server is asked
const now = { prompt: null, timer: 0, stop: null, texts: {} };

/** The columns of a template; where Jinja makes its text, those that the prompt's task reads. */
function columnsOf(template) {
  const named = [...template.matchAll(/\{\{|\}\}|\{([^{}]*)\}/g)].map((match) => match[1]).filter(Boolean);
  return [...new Set(named.flatMap((name) => (name === "rendered_input" ? now.prompt.columns || [] : [name])))];
}

function showPrompts() {
  const usable = state.prompts.filter((prompt) => prompt.task || prompt.state === "store");
  const before = $("words-prompt").value;
  $("words-prompt").replaceChildren(...usable.map((prompt) => el("option", { value: prompt.name }, prompt.name)));
  if (usable.some((prompt) => prompt.name === before)) $("words-prompt").value = before;
  if ($("words-prompt").value !== now.prompt?.name || !before) choosePrompt();
}

async function choosePrompt() {
  const name = $("words-prompt").value;
  await describe(name);
  now.prompt = state.prompts.find((prompt) => prompt.name === name) || null;
  ownWords();
}

function ownWords() {
  const { template, labels } = now.prompt || {};
  $("words-template").value = template || "";
  $("words-labels").value = (labels || []).join(", ");
  $("words-bare").checked = false;
  changed();
}

const areas = () => [...$("words-fields").querySelectorAll("textarea")];

/** A field for each column that the template names. Texts are remembered, also while a brace is missing. */
function showFields() {
  for (const area of areas()) now.texts[area.name] = area.value;
  const columns = now.prompt ? columnsOf($("words-template").value) : [], before = areas().map((area) => area.name);
  if (!columns.length || columns.join("\n") === before.join("\n")) return;
  const renamed = columns.length === 1 && before.length === 1 ? now.texts[before[0]] : ""; // it keeps its text
  $("words-fields").replaceChildren(...columns.map((name) => {
    const area = el("textarea", { name, rows: 2, spellcheck: "false" });
    area.value = now.texts[name] ?? renamed;
    return el("label", { class: "field" }, name, area);
  }));
}

const input = () => Object.fromEntries(areas().map((area) => [area.name, area.value]));

/** What is typed, as far as it differs from the prompt's own words. */
function wording() {
  const { template, labels } = now.prompt, found = {};
  const typed = $("words-labels").value.trim();
  if ($("words-template").value !== template) found.template = $("words-template").value;
  if (typed && typed !== (labels || []).join(", ")) found.labels = typed.split(",").map((label) => label.trim());
  return found;
}

function changed() {
  showFields();
  clearTimeout(now.timer);
  now.timer = setTimeout(answerNow, PAUSE_MS);
}

async function answerNow() {
  now.stop?.abort();
  if (!now.prompt) return;
  const row = input(), empty = !Object.values(row).some((text) => text.trim());
  if (empty) {
    $("words-answers").replaceChildren();
    return say("words-note", "Type a text.");
  }
  const { signal } = (now.stop = new AbortController());
  const other = { wording: wording(), bare: $("words-bare").checked };
  const same = !Object.keys(other.wording).length && !other.bare;
  const own = Object.fromEntries((now.prompt.columns || []).map((name) => [name, row[name] ?? Object.values(row)[0] ?? ""]));
  const asked = [["The prompt's own words", own, {}], ...(same ? [] : [["These words", row, other]])];
  const cards = await Promise.all(asked.map((one) => card(...one, signal)));
  if (signal.aborted) return;
  say("words-note", same ? "These are the prompt's own words." : "");
  $("words-answers").replaceChildren(...cards);
}

async function card(title, row, more, signal) {
  const shell = el("article", { class: "card" }, el("h3", {}, title)), begin = performance.now();
  try {
    const response = await ask("v1/predict", { method: "POST", signal, body: { prompt: now.prompt.name, inputs: [row], ...more } });
    const milliseconds = performance.now() - begin, found = await response.json();
    const notes = (found.warnings || []).map((text) => message(text));
    shell.append(...answered(found.predictions[0]), ...notes, el("footer", { class: "soft" }, latency(milliseconds, response)));
  } catch (error) {
    if (error.name !== "AbortError") shell.append(message(error.message, true));
  }
  return shell;
}

/** The server makes the config, so that it is one that `jaxprompt train` reads. */
async function keep(event) {
  event.preventDefault();
  if (!now.prompt) return;
  try {
    const response = await ask(`${promptPath(now.prompt.name)}/config`, { method: "POST", body: { wording: wording() } });
    const link = el("a", { href: URL.createObjectURL(await response.blob()), download: `${now.prompt.name.replace(/[^\w.-]+/g, "-")}-words.yaml` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say("words-note", `${link.download} is saved for jaxprompt train. It tunes new vectors; prompt.init=file and prompt.file=PROMPT start from these.`);
  } catch (error) {
    say("words-note", error.message, true);
  }
}

document.addEventListener("prompts", showPrompts);
$("words-prompt").addEventListener("change", choosePrompt);
$("words-own").addEventListener("click", ownWords);
$("words").addEventListener("input", (event) => event.target.id === "words-prompt" || changed());
$("words").addEventListener("submit", keep);
if (state.prompts.length) showPrompts();
