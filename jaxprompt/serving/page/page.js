// A client of the server's public routes; every request here can be made with curl, too.
const MOST_CHOSEN = 4, MOST_SHOWN = 200, MOST_ROWS = 1000, MOST_CLASSES = 20, CHUNK = 32, POLL_MS = 2000, KEPT = 61;
const ASKING = ["/v1/predict", "/v1/score", "/v1/completions"]; // routes that a model answers

const $ = (id) => document.getElementById(id);
const state = { key: sessionStorage.getItem("key") || "", prompts: [], chosen: [], table: null, answers: null, stop: null, inspected: null };

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
  let told = { message: text };
  try { told = JSON.parse(text).error; } catch { /* no JSON: the text itself */ }
  const wrong = new Error(`${told.message || response.statusText} (${response.status})`);
  Object.assign(wrong, { code: told.code, sentence: told.message });
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
  await Promise.all(state.chosen.map(describe));
  showPrompts();
  showChosen();
  document.dispatchEvent(new Event("prompts"));
}

/** Of a prompt that no request has asked for yet, the server knows the name alone until it reads it. */
async function describe(name) {
  const at = state.prompts.findIndex((prompt) => prompt.name === name);
  if (at < 0 || state.prompts[at].state !== "store") return;
  try { state.prompts[at] = await answer(promptPath(name)); } catch { /* an answer will say why */ }
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
  if (found.length > MOST_SHOWN) text += `; the first ${MOST_SHOWN} are shown, search for others`;
  say("prompts-note", text);
  showNames(found);
}

function promptRow(prompt) {
  const box = el("input", { type: "checkbox", "aria-label": `Try ${prompt.name}`, onchange: (event) => choose(prompt.name, event.target) });
  box.checked = state.chosen.includes(prompt.name);
  const about = el("span", {}, prompt.reason || [prompt.task === prompt.name ? null : prompt.task, labelsOf(prompt)].filter(Boolean).join(": "));
  if (prompt.reason) about.className = "error";
  return el("tr", {},
    el("td", {}, box),
    el("th", { scope: "row" }, prompt.name, about),
    el("td", {}, el("button", { class: "plain", type: "button", "aria-label": `Inspect ${prompt.name}`, onclick: () => inspect(prompt.name) }, "Inspect")));
}

function labelsOf({ state, task, labels }) {
  if (state === "store") return "not read yet";
  if (!task) return "no task of its own";
  if (!labels?.length) return "free text";
  return labels.slice(0, 6).join(", ") + (labels.length > 6 ? `, and ${labels.length - 6} more` : "");
}

async function choose(name, box) {
  if (box.checked && state.chosen.length >= MOST_CHOSEN) {
    box.checked = false;
    say("chosen", `At most ${MOST_CHOSEN} prompts stand side by side; take one away first.`, true);
    return;
  }
  state.chosen = box.checked ? [...state.chosen, name] : state.chosen.filter((other) => other !== name);
  if (box.checked) await describe(name);
  showChosen();
}

const chosenPrompts = () => state.chosen.map((name) => state.prompts.find((prompt) => prompt.name === name)).filter(Boolean);

/** One field where each prompt reads one text, whatever its column is called; else one a column. */
function showChosen() {
  say("chosen", state.chosen.length ? state.chosen.join(" beside ") : "Choose a prompt in the table.");
  const known = chosenPrompts(), one = known.every((prompt) => (prompt.columns || [""]).length === 1);
  const readers = new Map();
  for (const prompt of known) for (const column of one ? [""] : prompt.columns || []) readers.set(column, [...(readers.get(column) || []), prompt.name]);
  const before = Object.fromEntries([...$("fields").querySelectorAll("textarea")].map((area) => [area.name, area.value]));
  const field = ([name, by]) => {
    const area = el("textarea", { name, rows: readers.size > 1 ? 2 : 3, required: readers.size < 2, spellcheck: "false" });
    area.value = before[name] || "";
    return el("label", { class: "field" }, el("span", {}, name || "Text", by.length < known.length ? el("small", {}, ` of ${by.join(", ")}`) : null), area);
  };
  $("fields").replaceChildren(...[...(readers.size ? readers : new Map([["", []]]))].map(field));
}

/** The fields in which a prompt is named; the search narrows them. */
function showNames(found) {
  const names = [...new Set([...state.chosen, ...found.slice(0, MOST_SHOWN).map((prompt) => prompt.name)])];
  const fill = (id, first, names) => {
    const before = $(id).value;
    $(id).replaceChildren(...first.map((text) => el("option", { value: "" }, text)), ...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(before)) $(id).value = before;
  };
  fill("rows-a", [], names);
  fill("rows-b", ["none"], names);
  const fixed = new Set(state.prompts.filter((prompt) => prompt.writable === false).map((prompt) => prompt.name));
  const removable = names.filter((name) => !fixed.has(name));
  fill("delete-name", [], removable);
  $("delete-hint").hidden = removable.length > 0 || !names.length;
  $("delete").querySelector("button").disabled = !removable.length;
}

// ---------------------------------------------------------------- try

/** What the fields hold, as a prompt takes it: a text where it reads one, else its own columns. */
function inputOf(prompt) {
  const areas = [...$("fields").querySelectorAll("textarea")];
  if (areas.length === 1 && !areas[0].name) return areas[0].value;
  const wanted = areas.filter((area) => !prompt || (prompt.columns || []).includes(area.name));
  return Object.fromEntries(wanted.map((area) => [area.name, area.value]));
}

async function tryInput(event) {
  event.preventDefault();
  const known = chosenPrompts();
  const asked = known.map((prompt) => ({ title: prompt.name, input: inputOf(prompt), body: { prompt: prompt.name } }));
  if ($("ask-router").checked) asked.push({ title: "The router's choice", input: inputOf(), body: {}, router: true });
  if ($("ask-bare").checked && known.length) asked.push({ title: `No prompt, the task of ${known[0].name}`, input: inputOf(known[0]), body: { prompt: known[0].name, bare: true } });
  if (!asked.length) return say("chosen", "Choose a prompt in the table first.", true);
  $("send").disabled = true;
  const cards = await Promise.all(asked.map(card));
  $("answers").replaceChildren(...cards);
  $("send").disabled = false;
}

async function card({ title, input, body, router }) {
  const begin = performance.now();
  const shell = el("article", { class: "card" }, el("h3", {}, title));
  try {
    const response = await ask("v1/predict", { method: "POST", body: { ...body, inputs: [input] } });
    const milliseconds = performance.now() - begin;
    const found = (await response.json()).predictions[0];
    shell.append(...answered(found), el("footer", { class: "soft" }, ...decision(found, router), latency(milliseconds, response)));
  } catch (error) {
    if (error.code === "no_prompt_fits") shell.append(el("p", { class: "answer" }, "No prompt fits"), message(error.sentence));
    else shell.append(message(error.message, true));
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
  const text = parts.filter(([, name]) => name !== "total").map(([, name, value]) => `${name} ${Number(value).toFixed(1)}`).join(", ");
  return el("div", {}, `${milliseconds.toFixed(1)} ms${text && ` (${text})`}`);
}

function decision(found, router) {
  const version = found.version == null ? "the backbone alone" : `${found.prompt}, version ${found.version}`;
  if (!router || !found.routed) return [el("div", {}, version)];
  const { margin, candidates } = found.routed;
  const others = (candidates || []).slice(0, 4).map((one) => `${one.prompt} ${number(one.score, 2)}`).join(", ");
  return [el("div", {}, version), el("div", {}, `scores: ${others}`), margin == null ? null : el("div", {}, `margin ${number(margin, 2)} nats`)].filter(Boolean);
}

// ---------------------------------------------------------------- inspect

async function inspect(name) {
  const [facts, found] = await Promise.allSettled([answer(promptPath(name)), answer(`${promptPath(name)}/inspect`)]);
  $("inspect").hidden = false;
  state.inspected = name;
  $("inspect-title").textContent = `Inspect ${name}`;
  const parts = [];
  if (facts.status === "fulfilled") parts.push(factList(facts.value));
  if (found.status === "fulfilled") parts.push(...report(found.value));
  else parts.push(message(found.reason.message, true));
  $("inspected").replaceChildren(...parts);
  redraw();
  $("inspect-title").focus();
}

const promptPath = (name) => `v1/prompts/${encodeURIComponent(name)}`;

function factList(facts) {
  const time = (seconds) => seconds && new Date(1000 * seconds).toLocaleString();
  const pairs = [["task", facts.task], ["template", facts.template], ["labels", facts.labels?.join(", ")], ["method", facts.method],
    ["length", facts.length && `${facts.length} vectors`], ["version", facts.version], ["digest", facts.digest?.slice(0, 12)],
    ["tuned on", facts.backbone?.source], ["where", facts.state], ["rows answered", facts.requests], ["last used", time(facts.last_used)],
    ...Object.entries(facts.metrics || {}).map(([name, value]) => [`${name}, validation`, typeof value === "number" ? number(value) : value])];
  const shown = pairs.filter(([, value]) => value != null && value !== "" && typeof value !== "object");
  return el("dl", { class: "facts" }, ...shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

const figures = (pairs) => el("dl", { class: "figures" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));

function report(found) {
  if (!found.vectors) return [message(`It has no vectors; it changes ${JSON.stringify(found.changes)}.`)];
  const summary = figures([
    ["norm of a vector", `${number(found.norm.mean, 2)} ± ${number(found.norm.std, 2)}`],
    ["norm of a word", `${number(found.vocabulary_norm.mean, 2)} ± ${number(found.vocabulary_norm.std, 2)}`],
    ["cosine between vectors, mean", number(found.similarity.mean)], ["cosine between vectors, largest", number(found.similarity.max)],
    ["tightness of nearest words", number(found.clusters.tightness)], ["the same of random directions", number(found.clusters.random)],
  ]);
  const rows = found.vectors.map((vector, at) => el("tr", {},
    el("th", { scope: "row", class: "number" }, String(at)), el("td", { class: "number" }, number(vector.norm, 2)),
    el("td", {}, vector.nearest.map((near) => `${piece(near.word)} ${number(near.cosine, 2)}`).join("  ·  "))));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...["Vector", "Norm"].map((text) => el("th", { scope: "col", class: "number" }, text)), el("th", { scope: "col" }, "Nearest words, with cosine"))), el("tbody", {}, ...rows));
  return [summary, el("div", { class: "charts" }, norms(found), el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Vectors" }, table), ...similarityMap(found.prompts))];
}

/** A piece of the vocabulary: a beginning of a word as it is, what goes on in a word after a hyphen. */
const piece = (text) => (/^[\u2581\u0120]./.test(text) ? text.slice(1) : /^[<\W]/.test(text) ? text : `-${text}`);

function norms({ vectors, vocabulary_norm: words }) {
  const most = Math.max(words.mean, ...vectors.map((vector) => vector.norm));
  const label = `Norms of ${vectors.length} vectors, the largest ${number(most, 2)}; the mean norm of a word is ${number(words.mean, 2)}`;
  const svg = el("svg", { role: "img", "aria-label": label });
  const draw = () => {
    const { x, y, add } = frame(svg, { most, from: 0, to: vectors.length, marks: [0, vectors.length - 1].map((at) => [at + 0.5, at ? `vector ${at}` : "vector 0"]) });
    const width = Math.max(x(1) - x(0) - 1, 1);
    add(...vectors.map((vector, at) => el("rect", { class: "bar-of", x: x(at), width, y: y(vector.norm), height: y(0) - y(vector.norm) }, el("title", {}, `vector ${at}: ${number(vector.norm, 2)}`))),
      el("line", { class: "mark", x1: x(0), x2: x(vectors.length), y1: y(words.mean), y2: y(words.mean) }));
  };
  charts.set("norms", draw);
  return el("figure", {}, el("figcaption", {}, "Norm of each vector", el("span", { class: "legend" }, el("span", { class: "key dashed" }, "mean of all words"))), svg);
}

/** A table of prompts against prompts, as far as the server has them in memory. */
function similarityMap(map) {
  if (!map || map.names.length < 2) return [];
  const cell = (value, at, other) => {
    const found = el("td", { class: "number shade" }, number(value, 2));
    found.style.setProperty("--share", at === other ? 0 : Math.max(0, Math.min(1, value)));
    return found;
  };
  const table = (values, caption) => el("div", { class: "scroll fit", tabindex: 0, role: "region", "aria-label": caption }, el("table", { class: "grid" }, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, el("td"), ...map.names.map((name) => el("th", { scope: "col", class: "number" }, name)))),
    el("tbody", {}, ...map.names.map((name, at) => el("tr", {}, el("th", { scope: "row" }, name), ...values[at].map((value, other) => cell(value, at, other)))))));
  return [table(map.cosine, "Cosine of the mean vectors of prompts"), table(map.best_match, "Mean cosine of each vector (line) with the nearest one of another prompt (column)")];
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
    $("rows-label").replaceChildren(el("option", { value: "" }, "none"), ...columns.map((name) => el("option", { value: name }, name)));
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
    parts.push(figures(names.flatMap((name) => [[`accuracy of ${name}`, percent(right(name) / rows.length)], [`right answers of ${name}`, `${right(name)} of ${rows.length}`]])));
  }
  if (names.length === 2) parts.push(...comparison());
  if (label) parts.push(el("div", { class: "charts" }, ...names.map((name) => confusion(name))));
  $("rows-summary").replaceChildren(el("div", { class: "summary" }, ...parts));
  showTable();
  $("rows-save").hidden = $("rows-scroll").hidden = false;
}

function comparison() {
  const { names: [a, b], answers, label, rows } = state.answers;
  const apart = rows.filter((row, at) => given(answers[a][at]) !== given(answers[b][at])).length;
  if (!label) return [el("p", {}, `The prompts disagree on ${apart} of ${rows.length} rows; those stand first.`)];
  const count = (first, second) => rows.filter((row, at) => isRight(answers[a][at], row[label]) === first && isRight(answers[b][at], row[label]) === second).length;
  const [both, onlyA, onlyB, none] = [count(true, true), count(true, false), count(false, true), count(false, false)];
  const head = el("thead", {}, el("tr", {}, el("td"), el("th", { scope: "col", class: "number" }, `${b} right`), el("th", { scope: "col", class: "number" }, `${b} wrong`)));
  const line = (text, ...counts) => el("tr", {}, el("th", { scope: "row" }, text), ...counts.map((value) => el("td", { class: "number" }, String(value))));
  const chance = mcnemar(onlyA, onlyB), told = chance < 0.0001 ? "below 0.0001" : chance.toPrecision(2);
  return [el("p", {}, `${a} alone is right on ${onlyA} rows, ${b} alone on ${onlyB}. By chance such a split, or a clearer one, has the probability ${told} (McNemar's exact test). They disagree on ${apart} rows; those stand first in the table.`),
    el("div", { class: "scroll fit", tabindex: 0, role: "region", "aria-label": "Right and wrong answers of both" }, el("table", { class: "grid" }, head, el("tbody", {}, line(`${a} right`, both, onlyA), line(`${a} wrong`, onlyB, none))))];
}

function confusion(name) {
  const { answers, label, rows } = state.answers;
  const truths = rows.map((row) => plain(row[label]).trim()), said = answers[name].map((found) => given(found).trim());
  const classes = [...new Set([...truths, ...said])].sort();
  if (classes.length > MOST_CLASSES) return message(`${name}: ${classes.length} different answers, too many for a table.`);
  const counts = new Map(), totals = new Map();
  truths.forEach((truth, at) => {
    counts.set(`${truth}\n${said[at]}`, (counts.get(`${truth}\n${said[at]}`) || 0) + 1);
    totals.set(truth, (totals.get(truth) || 0) + 1);
  });
  const cell = (truth, other) => {
    const count = counts.get(`${truth}\n${other}`) || 0;
    const found = el("td", { class: "number shade" }, truth === other ? el("strong", {}, String(count)) : String(count));
    found.style.setProperty("--share", count / (totals.get(truth) || 1));
    return found;
  };
  const body = classes.map((truth) => el("tr", {}, el("th", { scope: "row" }, truth || "(none)"), ...classes.map((other) => cell(truth, other))));
  return el("div", { class: "scroll fit", tabindex: 0, role: "region", "aria-label": `Confusion of ${name}` },
    el("table", { class: "grid" }, el("caption", {}, `Confusion of ${name}. Lines: the correct answer; columns: the answer given.`),
      el("thead", {}, el("tr", {}, el("td"), ...classes.map((text) => el("th", { scope: "col", class: "number" }, text || "(none)")))), el("tbody", {}, ...body)));
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
  if (truth == null) return el("td", { class: "verdict" }, given(found) + sure);
  const right = isRight(found, truth);
  return el("td", { class: `verdict ${right ? "right" : "wrong"}` }, `${right ? "✓" : "✗"} ${given(found)}${sure}`);
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

// ---------------------------------------------------------------- charts

const charts = new Map(); // how each chart is drawn, for when the window changes

function redraw() {
  for (const draw of charts.values()) draw();
}

/** Round numbers from 0 on, at most five, of which the last is not below the largest value. */
export function ticks(most) {
  const raw = most / 3, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= raw * (1 - 1e-9));
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, at) => at * step);
}

/** The axes of a chart as wide as its figure, with scales of what is drawn into it. */
function frame(svg, { most, from, to, marks, height = 190 }) {
  const width = Math.max(svg.parentElement?.clientWidth || 0, 240), left = 46, right = 14, top = 12, bottom = 26;
  const steps = ticks(most || 1), highest = steps[steps.length - 1];
  const x = (value) => left + ((width - left - right) * (value - from)) / (to - from);
  const y = (value) => height - bottom - ((height - top - bottom) * value) / highest;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(
    ...steps.flatMap((step) => [el("line", { class: "axis", x1: left, x2: width - right, y1: y(step), y2: y(step) }), el("text", { x: left - 8, y: y(step) + 4, "text-anchor": "end" }, step.toLocaleString("en", { maximumFractionDigits: 3 }))]),
    ...marks.filter((_, place) => width > 380 || !place || place === marks.length - 1).map(([at, text], place, all) => el("text", { x: x(at), y: height - 7, "text-anchor": place ? (place === all.length - 1 ? "end" : "middle") : "start" }, text)));
  return { x, y, add: (...nodes) => svg.append(...nodes) };
}

/** Lines over the last two minutes; where a value is missing, a line is broken. */
function lines(id, times, series) {
  const most = Math.max(...series.flatMap(([, values]) => values.filter(Number.isFinite)), 0);
  const { x, y, add } = frame($(id), { most, from: -120, to: 0, marks: [[-120, "2 minutes ago"], [-60, "1 minute ago"], [0, "now"]] });
  for (const [kind, values] of series) {
    let pen = "M";
    const path = values.map((value, at) => {
      if (!Number.isFinite(value)) { pen = "M"; return ""; }
      const step = `${pen}${x(Math.max(times[at], -120)).toFixed(1)} ${y(value).toFixed(1)}${pen === "M" ? "h0" : ""}`; // h0: a point alone
      pen = "L";
      return step;
    }).join("");
    add(el("path", { class: `line ${kind}`, d: path }));
  }
}

// ---------------------------------------------------------------- live

const snapshots = [];

/** Samples of the text that Prometheus reads; of those that have a route, the ones of models. */
export function parseMetrics(text) {
  const totals = new Map(), buckets = new Map();
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? ([^ ]+)/.exec(line);
    if (!found) continue;
    const [, name, labels, value] = found, edge = /(?:^|,)le="([^"]+)"/.exec(labels || "");
    const route = /(?:^|,)route="([^"]*)"/.exec(labels || "");
    if (route && !ASKING.includes(route[1])) continue; // this page's own questions, and the like
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
    ["requests per second", seconds ? number(grown("requests_total") / seconds, 1) : "–"],
    ["latency, p50", ms(histogram("request_seconds", 0.5))], ["latency, p99", ms(histogram("request_seconds", 0.99))],
    ["wait in the queue, p99", ms(histogram("queue_seconds", 0.99))],
    ["rows in the queue", whole(total("queue_rows"))],
    ["rows in a batch", number(mean("batch_rows"), 1)],
    ["prompts in a batch", number(mean("batch_distinct_prompts"), 1)],
    ["slots in use", `${whole(total("slots_used"))} of ${whole(total("slots"))}`],
    ["prompts evicted from slots", whole(total("evictions"))],
    ["requests refused", whole(total("rejected_total") ?? 0)], // a counter with labels begins with its first event
    ["compilations since ready", whole(total("compilations"))],
  ];
  $("live").replaceChildren(...figures(pairs).children);
  showCharts();
}

function showCharts() {
  const last = snapshots[snapshots.length - 1], later = snapshots.slice(1);
  if (!last) return;
  const count = (snapshot) => snapshot.totals.get("jaxprompt_requests_total") || 0;
  const rates = later.map((snapshot, at) => Math.max(0, (1000 * (count(snapshot) - count(snapshots[at]))) / (snapshot.at - snapshots[at].at)));
  const seconds = (snapshot) => snapshot.buckets.get("jaxprompt_request_seconds_bucket") || new Map();
  const share = (wanted) => later.map((snapshot, at) => 1000 * quantile(seconds(snapshot), seconds(snapshots[at]), wanted));
  const times = later.map((snapshot) => (snapshot.at - last.at) / 1000);
  lines("rate-chart", times, [["", rates]]);
  lines("latency-chart", times, [["", share(0.5)], ["dashed", share(0.99)]]);
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
    $("ask-router").disabled = !facts.router;
    $("ask-router").parentElement.title = facts.router ? "" : "This server has no router; see jaxprompt library.";
    $("key-form").hidden = !facts.keys;
    $("state").classList.add("ready");
    say("state", ["ready", facts.backbone, facts.kind, facts.version && `jaxprompt ${facts.version}`].filter(Boolean).join(" · "));
  } catch (error) {
    $("state").classList.remove("ready");
    say("state", error.status === 503 ? await warming() : error.message, error.status !== 503);
    setTimeout(showState, POLL_MS);
  }
}

/** How far a server is that is not ready. */
async function warming() {
  try {
    const { state: what, done, programs } = await (await fetch("ready")).json();
    return what === "warming" ? `compiling: ${done} of ${programs} programs` : what;
  } catch {
    return "not ready";
  }
}

function start() {
  charts.set("live", showCharts);
  addEventListener("resize", redraw);
  $("inspect-close").addEventListener("click", () => {
    $("inspect").hidden = true;
    ($("prompts").querySelector(`button[aria-label="Inspect ${CSS.escape(state.inspected)}"]`) || $("search")).focus();
  });
  $("key").value = state.key;
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.key = $("key").value;
    sessionStorage.setItem("key", state.key);
    showState();
    loadPrompts();
  });
  $("search").addEventListener("input", showPrompts);
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

export { $, answered, ask, describe, el, latency, message, promptPath, say, state };

start();
