// A client of the server's public routes; every request here can be made with curl, too.
const MOST_CHOSEN = 4, MOST_SHOWN = 200, MOST_ROWS = 1000, CHUNK = 32, POLL_MS = 2000, KEPT = 60;

const $ = (id) => document.getElementById(id);
const state = { key: sessionStorage.getItem("key") || "", prompts: [], chosen: [], table: null, answers: null, stop: null };

/** An element. Text is always text, never markup: names and answers come from other people. */
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "text", "title", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

const number = (value, digits = 3) => (value == null || !Number.isFinite(value) ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }));
const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)}%` : "–");
const message = (text, error = false) => el("p", { class: error ? "error" : "soft" }, text);

function say(id, text, error = false) {
  $(id).textContent = text;
  $(id).classList.toggle("error", error);
}

/** An answer of the server, or an Error with its sentence. */
async function ask(path, { method = "GET", body, signal, headers = {} } = {}) {
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (body && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, { method, body, signal, headers, credentials: "omit" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let said = text;
  try { said = JSON.parse(text).error.message; } catch { /* no JSON: the text itself */ }
  const wrong = new Error(`${said || response.statusText} (${response.status})`);
  wrong.status = response.status;
  wrong.retryAfter = Number(response.headers.get("Retry-After")) || 1;
  throw wrong;
}

const answer = async (path, options) => (await ask(path, options)).json();

/** As answer, but a busy server is asked again. */
async function patient(path, options, attempts = 6) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await answer(path, options);
    } catch (error) {
      if (![429, 503].includes(error.status) || attempt >= attempts) throw error;
      await new Promise((resume) => setTimeout(resume, 1000 * error.retryAfter * (1 + Math.random() / 4)));
    }
  }
}

// ---------------------------------------------------------------- prompts

const columnsOf = (prompt) => prompt.columns || [];

async function loadPrompts() {
  const prompts = [];
  try {
    for (let after = ""; ;) {
      const page = await answer(`v1/prompts?limit=1000${after && `&after=${encodeURIComponent(after)}`}`);
      prompts.push(...page.data);
      if (!page.has_more || !page.data.length) break;
      after = page.data[page.data.length - 1].name;
    }
  } catch (error) {
    say("prompts-note", error.message, true);
    return;
  }
  state.prompts = prompts;
  const names = new Set(prompts.map((prompt) => prompt.name));
  state.chosen = state.chosen.filter((name) => names.has(name));
  if (!state.chosen.length) state.chosen = prompts.slice(0, 2).map((prompt) => prompt.name);
  showPrompts();
  showChosen();
  showNames();
}

function matching() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  return state.prompts.filter((prompt) => {
    const text = [prompt.name, prompt.task, ...(prompt.labels || [])].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

function showPrompts() {
  const found = matching();
  $("prompts").replaceChildren(...found.slice(0, MOST_SHOWN).map(promptRow));
  const all = state.prompts.length;
  let text = found.length === all ? `${all} ${all === 1 ? "prompt" : "prompts"}` : `${found.length} of ${all} prompts`;
  if (found.length > MOST_SHOWN) text += `; the first ${MOST_SHOWN} are shown`;
  say("prompts-note", text);
}

function promptRow(prompt) {
  const chosen = state.chosen.includes(prompt.name);
  const box = el("input", { type: "checkbox", "aria-label": `Try ${prompt.name}`, onchange: (event) => choose(prompt.name, event.target) });
  box.checked = chosen;
  const labels = prompt.labels || [];
  return el("tr", {},
    el("td", {}, box),
    el("th", { scope: "row" }, prompt.name),
    el("td", {}, prompt.task || "–"),
    el("td", {}, labels.length ? labels.slice(0, 6).join(", ") + (labels.length > 6 ? `, and ${labels.length - 6} more` : "") : "free text"),
    el("td", { class: "number" }, String(prompt.length ?? "–")),
    el("td", { title: prompt.digest }, String(prompt.version ?? "–")),
    el("td", {}, prompt.state || "–"),
    el("td", {}, el("button", { class: "plain", type: "button", "aria-label": `Inspect ${prompt.name}`, onclick: () => inspect(prompt.name) }, "Inspect")));
}

function choose(name, box) {
  if (box.checked && state.chosen.length >= MOST_CHOSEN) {
    box.checked = false;
    say("chosen", `At most ${MOST_CHOSEN} prompts stand side by side; take one away first.`, true);
    return;
  }
  state.chosen = box.checked ? [...state.chosen, name] : state.chosen.filter((other) => other !== name);
  showChosen();
}

function showChosen() {
  say("chosen", state.chosen.length ? `Chosen: ${state.chosen.join(", ")}` : "No prompt is chosen.");
  const known = state.prompts.filter((prompt) => state.chosen.includes(prompt.name));
  const columns = [...new Set(known.flatMap(columnsOf))];
  const asText = $("as-text").checked || !columns.length;
  const before = Object.fromEntries([...$("fields").querySelectorAll("textarea")].map((area) => [area.name, area.value]));
  const names = asText ? [""] : columns;
  const label = (name) => {
    const area = el("textarea", { name, rows: 2, required: true });
    area.value = before[name] || "";
    return el("label", {}, asText ? "Text" : name, area);
  };
  $("fields").replaceChildren($("fields").querySelector("legend"), ...names.map(label));
}

function showNames() {
  const names = state.prompts.map((prompt) => prompt.name);
  const fill = (id, first) => {
    const before = $(id).value;
    $(id).replaceChildren(...first.map((text) => el("option", { value: "" }, text)), ...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(before)) $(id).value = before;
  };
  fill("rows-a", []);
  fill("rows-b", ["none"]);
  fill("delete-name", []);
}

// ---------------------------------------------------------------- try

function inputOf() {
  const areas = [...$("fields").querySelectorAll("textarea")];
  if (areas.length === 1 && !areas[0].name) return areas[0].value;
  return Object.fromEntries(areas.map((area) => [area.name, area.value]));
}

async function tryInput(event) {
  event.preventDefault();
  const input = inputOf();
  const asked = state.chosen.map((name) => ({ title: name, body: { prompt: name } }));
  if ($("ask-router").checked) asked.push({ title: "The router's choice", body: {}, router: true });
  if ($("ask-bare").checked && state.chosen.length) asked.push({ title: `The model without a prompt, as ${state.chosen[0]}`, body: { prompt: state.chosen[0], bare: true } });
  if (!asked.length) return say("chosen", "Choose a prompt in the table first.", true);
  $("send").disabled = true;
  const cards = await Promise.all(asked.map((one) => card(one, input)));
  $("answers").replaceChildren(...cards);
  $("send").disabled = false;
}

async function card({ title, body, router }, input) {
  const begin = performance.now();
  const shell = el("article", { class: "card" }, el("h3", {}, title));
  try {
    const response = await ask("v1/predict", { method: "POST", body: { ...body, inputs: [input] } });
    const milliseconds = performance.now() - begin;
    const found = (await response.json()).predictions[0];
    shell.append(...answered(found), latency(milliseconds, response), decision(found, router));
  } catch (error) {
    shell.append(message(error.message, true));
  }
  return shell;
}

function answered(found) {
  if (found.error) return [message(found.error.message || String(found.error), true)];
  const scores = [...(found.scores || [])].sort((a, b) => b.probability - a.probability);
  return [el("p", { class: "answer" }, found.prediction ?? found.text ?? ""), scores.length ? bars(scores) : ""];
}

function bars(scores) {
  return el("ul", { class: "bars" }, ...scores.map((score, rank) => {
    const bar = el("i");
    bar.style.width = percent(score.probability);
    return el("li", { class: rank ? "" : "best", title: `log-likelihood ${number(score.log_likelihood)}` },
      el("span", {}, score.label), el("span", { class: "track", "aria-hidden": "true" }, bar), el("b", {}, percent(score.probability)));
  }));
}

/** The time that the page saw, and the parts that the server names in Server-Timing. */
function latency(milliseconds, response) {
  const parts = (response.headers.get("Server-Timing") || "").split(",").map((part) => /^\s*([\w-]+).*?dur=([\d.]+)/.exec(part)).filter(Boolean);
  const text = parts.map(([, name, value]) => `${name} ${Number(value).toFixed(1)}`).join(", ");
  return message(`${milliseconds.toFixed(1)} ms${text && ` (${text})`}`);
}

function decision(found, router) {
  const version = found.version == null ? `${found.prompt}, without a prompt` : `${found.prompt}, version ${found.version}`;
  if (!router || !found.routed) return message(version);
  const { score, margin, candidates } = found.routed;
  const others = (candidates || []).map((one) => `${one.prompt} ${number(one.score, 1)}`).join(", ");
  return message(`${version}; score ${number(score, 1)}, margin ${number(margin, 1)}${others && ` (${others})`}`);
}

// ---------------------------------------------------------------- inspect

async function inspect(name) {
  const [facts, found] = await Promise.allSettled([answer(promptPath(name)), answer(`${promptPath(name)}/inspect`)]);
  $("inspect").hidden = false;
  $("inspect-title").textContent = `Inspect: ${name}`;
  const parts = [];
  if (facts.status === "fulfilled") parts.push(factList(facts.value));
  if (found.status === "fulfilled") parts.push(...report(found.value));
  else parts.push(message(found.reason.message, true));
  $("inspected").replaceChildren(...parts);
  $("inspect-title").focus();
}

const promptPath = (name) => `v1/prompts/${encodeURIComponent(name)}`;

function factList(facts) {
  const time = (seconds) => seconds && new Date(1000 * seconds).toLocaleString();
  const pairs = [["task", facts.task], ["template", facts.template], ["method", facts.method], ["length", facts.length],
    ["version", facts.version], ["digest", facts.digest?.slice(0, 12)], ["tuned on", facts.backbone?.source], ["where", facts.state],
    ["requests", facts.requests], ["last used", time(facts.last_used)], ["here since", time(facts.created)],
    ...Object.entries(facts.metrics || {}).map(([name, value]) => [`${name}, validation`, typeof value === "number" ? number(value) : value])];
  return figures(pairs.filter(([, value]) => value != null && value !== "" && typeof value !== "object").map(([name, value]) => [name, String(value)]));
}

const figures = (pairs) => el("dl", { class: "figures" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));

function report(found) {
  if (!found.vectors) return [message(JSON.stringify(found.changes || found))];
  const summary = figures([
    ["norm of a vector", `${number(found.norm.mean, 2)} ± ${number(found.norm.std, 2)}`],
    ["norm of a word", `${number(found.vocabulary_norm.mean, 2)} ± ${number(found.vocabulary_norm.std, 2)}`],
    ["cosine between vectors", `mean ${number(found.similarity.mean)}, max ${number(found.similarity.max)}`],
    ["tightness of nearest words", `${number(found.clusters.tightness)} (random: ${number(found.clusters.random)})`],
  ]);
  const most = Math.max(...found.vectors.map((vector) => vector.norm));
  const rows = found.vectors.map((vector, at) => el("tr", {},
    el("th", { scope: "row" }, String(at)), el("td", { class: "number" }, number(vector.norm, 2)),
    el("td", {}, vector.nearest.map((near) => `${near.word} ${number(near.cosine, 2)}`).join("  ·  "))));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...["Vector", "Norm", "Nearest words, with cosine"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows));
  return [summary, norms(found.vectors, most), el("div", { class: "scroll short", tabindex: 0, role: "region", "aria-label": "Vectors" }, table), ...similarityMap(found.prompts)];
}

function norms(vectors, most) {
  const width = 600 / vectors.length;
  const chart = el("svg", { viewBox: "0 0 600 60", role: "img", "aria-label": `Norms of ${vectors.length} vectors, the largest ${number(most, 2)}` },
    ...vectors.map((vector, at) => el("rect", { class: "bar", x: at * width, width: Math.max(width - 1, 0.5), y: 60 - (58 * vector.norm) / most, height: (58 * vector.norm) / most })));
  return el("figure", {}, chart, el("figcaption", {}, "Norm of each vector, in order."));
}

/** Cosines between mean vectors of prompts, where the server gives them. */
function similarityMap(prompts) {
  if (!Array.isArray(prompts) || !prompts.length) return [];
  const rows = prompts.map((other) => el("tr", {}, el("th", { scope: "row" }, other.name), el("td", { class: "number" }, number(other.cosine)), el("td", { class: "number" }, number(other.best_match))));
  return [el("h3", {}, "Other prompts"), el("table", {}, el("thead", {}, el("tr", {}, ...["Prompt", "Cosine of means", "Best match of vectors"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows))];
}

// ---------------------------------------------------------------- rows of a file

/** Rows of separated values (RFC 4180). */
function parseSeparated(text, separator) {
  const rows = [];
  let row = [], field = "", quoted = false;
  for (let at = 0; at < text.length; at++) {
    const letter = text[at];
    if (quoted) {
      if (letter !== '"') field += letter;
      else if (text[at + 1] === '"') { field += '"'; at++; } else quoted = false;
    } else if (letter === '"' && field === "") quoted = true;
    else if (letter === separator) { row.push(field); field = ""; }
    else if (letter === "\n") { row.push(field.replace(/\r$/, "")); rows.push(row); row = []; field = ""; }
    else field += letter;
  }
  if (field || row.length) { row.push(field); rows.push(row); }
  const [head, ...body] = rows.filter((cells) => cells.length > 1 || cells[0] !== "");
  if (!head) throw new Error("The file is empty.");
  return body.map((cells, at) => {
    if (cells.length !== head.length) throw new Error(`Row ${at + 1} has ${cells.length} fields, but the head has ${head.length}.`);
    return Object.fromEntries(head.map((name, column) => [name, cells[column]]));
  });
}

export function parseRows(name, text) {
  text = text.replace(/^\uFEFF/, "");
  if (/\.(jsonl|ndjson|json)$/i.test(name)) {
    if (text.trimStart().startsWith("[")) return JSON.parse(text);
    return text.split("\n").filter((line) => line.trim()).map((line, at) => {
      try { return JSON.parse(line); } catch { throw new Error(`Line ${at + 1} is no JSON.`); }
    });
  }
  return parseSeparated(text, /\.tsv$/i.test(name) ? "\t" : ",");
}

async function readFile() {
  const file = $("file").files[0];
  state.table = null;
  $("rows-send").disabled = true;
  if (!file) return;
  try {
    const rows = parseRows(file.name, await file.text());
    if (!rows.length) throw new Error("The file has no rows.");
    if (rows.length > MOST_ROWS) throw new Error(`The file has ${rows.length} rows; at most ${MOST_ROWS} go here, more with jaxprompt predict.`);
    if (rows.some((row) => row === null || typeof row !== "object" || Array.isArray(row))) throw new Error("Each row is an object of columns.");
    const columns = [...new Set(rows.flatMap(Object.keys))];
    $("rows-label").replaceChildren(el("option", { value: "" }, "no column"), ...columns.map((name) => el("option", { value: name }, name)));
    const likely = columns.find((name) => /^(label|target|answer|class|gold)$/i.test(name));
    if (likely) $("rows-label").value = likely;
    state.table = { rows, columns, name: file.name };
    $("rows-send").disabled = false;
    say("rows-note", `${rows.length} rows with the columns ${columns.join(", ")}.`);
  } catch (error) {
    say("rows-note", error.message, true);
  }
}

async function answerRows(event) {
  event.preventDefault();
  const names = [...new Set([$("rows-a").value, $("rows-b").value].filter(Boolean))];
  if (!state.table || !names.length) return say("rows-note", "Choose a file and a prompt first.", true);
  const { rows } = state.table, label = $("rows-label").value, begin = performance.now();
  const inputs = rows.map((row) => Object.fromEntries(Object.entries(row).filter(([name]) => name !== label)));
  state.stop = new AbortController();
  busy(true);
  try {
    const answers = {};
    for (const name of names) answers[name] = [];
    for (let at = 0; at < rows.length; at += CHUNK) {
      const parts = await Promise.all(names.map((name) => patient("v1/predict", { method: "POST", signal: state.stop.signal, body: { prompt: name, inputs: inputs.slice(at, at + CHUNK) } })));
      names.forEach((name, which) => answers[name].push(...parts[which].predictions));
      $("rows-progress").value = Math.min(1, (at + CHUNK) / rows.length);
    }
    state.answers = { names, answers, label, rows };
    say("rows-note", `${rows.length} rows in ${((performance.now() - begin) / 1000).toFixed(1)} s.`);
    showRows();
  } catch (error) {
    say("rows-note", error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  }
  busy(false);
}

function busy(on) {
  $("rows-send").disabled = on;
  $("rows-stop").hidden = $("rows-progress").hidden = !on;
  $("rows-progress").value = 0;
}

const plain = (value) => (value == null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));
const given = (found) => (found.error ? "" : plain(found.prediction ?? found.text));
const isRight = (found, truth) => given(found).trim() === plain(truth).trim();

/** Two-sided exact McNemar: how likely such a split of b + c disagreements is by chance. */
export function mcnemar(b, c) {
  const n = b + c;
  let term = n * Math.log(0.5), sum = 0;
  for (let i = 0; i <= Math.min(b, c); i++) {
    sum += Math.exp(term);
    term += Math.log((n - i) / (i + 1));
  }
  return Math.min(1, 2 * sum);
}

function showRows() {
  const { names, answers, label, rows } = state.answers;
  const parts = [];
  if (label) {
    const right = (name) => rows.filter((row, at) => isRight(answers[name][at], row[label])).length;
    parts.push(figures(names.map((name) => [`accuracy of ${name}`, `${percent(right(name) / rows.length)} (${right(name)} of ${rows.length})`])));
  }
  if (names.length === 2) parts.push(comparison());
  if (label) parts.push(...names.map((name) => confusion(name)));
  $("rows-summary").replaceChildren(...parts);
  showTable();
  $("rows-save").hidden = $("rows-scroll").hidden = false;
}

function comparison() {
  const { names: [a, b], answers, label, rows } = state.answers;
  const apart = rows.filter((row, at) => given(answers[a][at]) !== given(answers[b][at])).length;
  if (!label) return message(`The prompts disagree on ${apart} of ${rows.length} rows; those stand first.`);
  const count = (first, second) => rows.filter((row, at) => isRight(answers[a][at], row[label]) === first && isRight(answers[b][at], row[label]) === second).length;
  const [both, onlyA, onlyB, none] = [count(true, true), count(true, false), count(false, true), count(false, false)];
  const head = el("thead", {}, el("tr", {}, el("td"), el("th", { scope: "col", class: "number" }, `${b} right`), el("th", { scope: "col", class: "number" }, `${b} wrong`)));
  const line = (text, ...counts) => el("tr", {}, el("th", { scope: "row" }, text), ...counts.map((value) => el("td", { class: "number" }, String(value))));
  return el("div", {}, el("table", {}, el("caption", {}, `McNemar: p = ${mcnemar(onlyA, onlyB).toPrecision(3)} that ${onlyA} against ${onlyB} is chance. They disagree on ${apart} rows; those stand first.`), head,
    el("tbody", {}, line(`${a} right`, both, onlyA), line(`${a} wrong`, onlyB, none))));
}

function confusion(name) {
  const { answers, label, rows } = state.answers;
  const truths = rows.map((row) => plain(row[label]).trim()), said = answers[name].map((found) => given(found).trim());
  const classes = [...new Set([...truths, ...said])].sort();
  if (classes.length > 20) return message(`${name}: ${classes.length} different answers, too many for a table.`);
  const counts = new Map();
  truths.forEach((truth, at) => counts.set(`${truth}\n${said[at]}`, (counts.get(`${truth}\n${said[at]}`) || 0) + 1));
  const body = classes.map((truth) => el("tr", {}, el("th", { scope: "row" }, truth || "(none)"), ...classes.map((other) => el("td", { class: `number ${truth === other ? "right" : ""}` }, String(counts.get(`${truth}\n${other}`) || 0)))));
  return el("details", {}, el("summary", {}, `Confusion of ${name}`), el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Confusion of ${name}` },
    el("table", { class: "map" }, el("caption", {}, "Lines: the correct answer. Columns: the answer of the prompt."),
      el("thead", {}, el("tr", {}, el("td"), ...classes.map((text) => el("th", { scope: "col", class: "number" }, text || "(none)")))), el("tbody", {}, ...body))));
}

function showTable() {
  const { names, answers, label, rows } = state.answers;
  const { columns } = state.table;
  const order = rows.map((_, at) => at);
  const apart = (at) => (names.length === 2 && given(answers[names[0]][at]) !== given(answers[names[1]][at]) ? 0 : 1);
  order.sort((x, y) => apart(x) - apart(y) || x - y);
  $("rows-head").replaceChildren(el("tr", {}, ...["Row", ...columns, ...names].map((text) => el("th", { scope: "col" }, text))));
  $("rows-body").replaceChildren(...order.map((at) => el("tr", {}, el("th", { scope: "row" }, String(at + 1)),
    ...columns.map((name) => el("td", {}, plain(rows[at][name]))), ...names.map((name) => verdict(answers[name][at], label ? rows[at][label] : null)))));
}

function verdict(found, truth) {
  if (found.error) return el("td", { class: "error" }, found.error.message || String(found.error));
  const best = (found.scores || []).find((score) => score.label === found.prediction);
  const sure = best ? ` ${percent(best.probability)}` : "";
  if (truth == null) return el("td", {}, given(found) + sure);
  const right = isRight(found, truth);
  return el("td", { class: right ? "right" : "wrong" }, `${right ? "✓" : "✗"} ${given(found)}${sure}`);
}

/** A field of CSV; a spreadsheet must not take it for a formula. */
const field = (value) => {
  const text = plain(value), safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
};

function saveRows() {
  const { names, answers, rows } = state.answers, { columns, name } = state.table;
  const lines = [[...columns, ...names.map((prompt) => `prediction of ${prompt}`)], ...rows.map((row, at) => [...columns.map((column) => row[column]), ...names.map((prompt) => given(answers[prompt][at]))])];
  const address = URL.createObjectURL(new Blob([lines.map((line) => line.map(field).join(",")).join("\r\n") + "\r\n"], { type: "text/csv" }));
  el("a", { href: address, download: name.replace(/\.\w+$/, "") + "-answers.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

// ---------------------------------------------------------------- live

const snapshots = [];

/** Samples of the text that Prometheus reads, without those of single prompts. */
export function parseMetrics(text) {
  const totals = new Map(), buckets = new Map();
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? ([^ ]+)/.exec(line);
    if (!found) continue;
    const [, name, labels, value] = found, edge = /(?:^|,)le="([^"]+)"/.exec(labels || "");
    if (name.endsWith("_bucket") && edge) {
      const series = buckets.get(name) || new Map();
      const at = edge[1] === "+Inf" ? Infinity : Number(edge[1]);
      series.set(at, (series.get(at) || 0) + Number(value));
      buckets.set(name, series);
    } else totals.set(name, (totals.get(name) || 0) + Number(value));
  }
  return { totals, buckets, at: performance.now() };
}

/** A quantile of what was observed between two snapshots of a histogram. */
export function quantile(now, before, share) {
  const edges = [...now.keys()].sort((a, b) => a - b), count = (edge) => now.get(edge) - (before?.get(edge) || 0);
  const all = edges.length ? count(edges[edges.length - 1]) : 0;
  if (!all) return NaN;
  let low = 0, under = 0;
  for (const edge of edges) {
    const upTo = count(edge);
    if (upTo >= share * all) return edge === Infinity ? low : low + ((edge - low) * (share * all - under)) / Math.max(upTo - under, 1);
    low = edge;
    under = upTo;
  }
  return low;
}

async function poll() {
  if (!$("live-on").checked || document.hidden) return;
  try {
    snapshots.push(parseMetrics(await (await ask("metrics")).text()));
    if (snapshots.length > KEPT) snapshots.shift();
    say("live-note", "");
    showLive();
  } catch (error) {
    say("live-note", error.message, true);
  }
}

function showLive() {
  const now = snapshots[snapshots.length - 1], before = snapshots[Math.max(0, snapshots.length - 16)];
  const total = (name) => now.totals.get(`jaxprompt_${name}`);
  const grown = (name) => (total(name) ?? 0) - (before.totals.get(`jaxprompt_${name}`) ?? 0);
  const histogram = (name, share) => quantile(now.buckets.get(`jaxprompt_${name}_bucket`) || new Map(), before === now ? null : before.buckets.get(`jaxprompt_${name}_bucket`), share);
  const mean = (name) => grown(`${name}_sum`) / grown(`${name}_count`);
  const seconds = (now.at - before.at) / 1000;
  const ms = (value) => (Number.isFinite(value) ? `${(1000 * value).toFixed(1)} ms` : "–");
  const whole = (value) => (value == null ? "–" : String(Math.round(value)));
  const pairs = [
    ["requests a second", seconds ? number(grown("requests_total") / seconds, 1) : "–"],
    ["p50", ms(histogram("request_seconds", 0.5))], ["p99", ms(histogram("request_seconds", 0.99))],
    ["p99 in the queue", ms(histogram("queue_seconds", 0.99))],
    ["rows in the queue", whole(total("queue_rows"))],
    ["rows a batch", number(mean("batch_rows"), 1)],
    ["prompts a batch", number(mean("batch_distinct_prompts"), 1)],
    ["slots in use", `${whole(total("slots_used"))} of ${whole(total("slots"))}`],
    ["prompts that gave way to others", whole(total("evictions"))],
    ["rejected", whole(total("rejected_total") ?? 0)], // a counter with labels begins with its first event
    ["compilations since ready", whole(total("compilations"))],
  ];
  $("live").replaceChildren(...figures(pairs).children);
  chart();
}

function chart() {
  const rates = snapshots.slice(1).map((snapshot, at) => {
    const grown = (snapshot.totals.get("jaxprompt_requests_total") || 0) - (snapshots[at].totals.get("jaxprompt_requests_total") || 0);
    return Math.max(0, grown / ((snapshot.at - snapshots[at].at) / 1000));
  });
  const most = Math.max(1, ...rates), step = 560 / (KEPT - 1);
  const points = rates.map((rate, at) => `${at ? "L" : "M"}${(40 + at * step).toFixed(1)} ${(80 - (70 * rate) / most).toFixed(1)}`).join("");
  $("live-chart").replaceChildren(el("line", { class: "axis", x1: 40, x2: 600, y1: 80, y2: 80 }), el("text", { x: 0, y: 16 }, number(most, 0)), el("text", { x: 0, y: 84 }, "0"), el("path", { class: "line", d: points }));
}

// ---------------------------------------------------------------- manage, and the server's state

async function put(event) {
  event.preventDefault();
  const name = $("put-name").value.trim(), form = new FormData();
  for (const file of $("put-files").files) form.append("files", file, file.name);
  await manage(async () => {
    const facts = await answer(promptPath(name), { method: "PUT", body: form, headers: $("put-replace").checked ? {} : { "If-None-Match": "*" } });
    return `${name} is there, version ${facts.version}.`;
  });
}

async function remove(event) {
  event.preventDefault();
  const name = $("delete-name").value;
  if (!name || !confirm(`Remove ${name} from the server?`)) return;
  await manage(async () => {
    await ask(promptPath(name), { method: "DELETE" });
    return `${name} is removed.`;
  });
}

async function manage(change) {
  try {
    const done = await change();
    await loadPrompts();
    say("manage-note", done);
  } catch (error) {
    say("manage-note", error.message, true);
  }
}

async function showState() {
  try {
    await ask("ready");
    let facts = {};
    try { facts = await answer("version"); } catch { /* an older server */ }
    $("ask-router").disabled = facts.router === false || facts.router === null;
    say("state", ["ready", facts.backbone, facts.version && `version ${facts.version}`].filter(Boolean).join(" · "));
  } catch (error) {
    say("state", error.message, error.status !== 503);
    setTimeout(showState, POLL_MS);
  }
}

function start() {
  $("key").value = state.key;
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.key = $("key").value;
    sessionStorage.setItem("key", state.key);
    showState();
    loadPrompts();
  });
  $("search").addEventListener("input", showPrompts);
  $("as-text").addEventListener("change", showChosen);
  $("try").addEventListener("submit", tryInput);
  $("try").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("try").requestSubmit();
  });
  $("file").addEventListener("change", readFile);
  $("rows").addEventListener("submit", answerRows);
  $("rows-stop").addEventListener("click", () => state.stop?.abort());
  $("rows-save").addEventListener("click", saveRows);
  $("put").addEventListener("submit", put);
  $("delete").addEventListener("submit", remove);
  showState();
  loadPrompts();
  poll();
  setInterval(poll, POLL_MS);
}

start();
