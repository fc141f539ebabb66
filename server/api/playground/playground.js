// The playground: one page over the server's own public API. Model text reaches the page as text nodes only.
"use strict";

const $ = (id) => document.getElementById(id);
const EXAMPLES = { chat: "Say something", text: 'A text to go on with, such as "ragout:"' };
const MOST_TURNS = 40;

const state = {
  mode: "chat",
  key: "",
  layers: new Set(),
  history: { with: [], without: [] }, // chat messages of each column
  running: null, // AbortController
  samples: [],
  before: null,
};

// ── the server ─────────────────────────────────────────────────────────────────────────────────────────────────────

function headers() {
  const own = { "Content-Type": "application/json" };
  if (state.key) own.Authorization = `Bearer ${state.key}`;
  return own;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

/** Yields the parsed events of a streamed answer. Throws an Error with the server's own words. */
async function* events(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await failure(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) {
    if (response.status === 401 || response.status === 403) showKeys(true);
    return;
  }
  const models = (await response.json()).data;
  const chosen = $("model").value;
  $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  if (models.some((model) => model.id === chosen)) $("model").value = chosen;
  state.models = models;
  offerMemory();
}

/** Switches for memory only where the chosen model has one. */
function offerMemory() {
  const model = (state.models || []).find((each) => each.id === $("model").value);
  const has = Boolean(model && model.memory && model.memory.length);
  for (const id of ["compare", "memory", "colour"]) $(id).disabled = !has;
  if (!has) $("compare").checked = $("memory").checked = false;
  else if (state.had === false) $("compare").checked = $("memory").checked = true;
  state.had = has;
  arrange();
}

// ── answers ────────────────────────────────────────────────────────────────────────────────────────────────────────

/** One answer in a column: text as it comes, one span a chunk, coloured once the gates of its tokens are known. */
class Answer {
  constructor(column, withMemory) {
    this.column = column;
    this.memory = withMemory;
    this.output = column.querySelector("output");
    this.turn = add(column, "assistant waiting", "");
    this.prompt = null; // the prompt's own tokens, in completion mode
    this.spans = []; // by token of the answer
    this.text = "";
    this.tokens = 0;
    this.first = 0;
  }

  take(event, begun) {
    if (event.usage && event.usage.timings) this.close(event.usage);
    const choice = event.choices && event.choices[0];
    if (!choice) return;
    const text = choice.delta ? choice.delta.content || "" : choice.text || "";
    const ids = choice.token_ids || [];
    if (ids.length || text) {
      const now = performance.now();
      this.first = this.first || now;
      this.tokens += ids.length;
      const span = document.createElement("span");
      span.className = "token";
      span.textContent = text;
      this.turn.append(span);
      this.text += text;
      for (let i = 0; i < ids.length; i++) this.spans.push(span);
      this.say(now, begun);
      this.column.querySelector(".log").scrollTop = 1e9;
    }
    if (choice.memory_trace) this.colour(choice.memory_trace);
  }

  colour(trace) {
    if (trace.prompt.length && this.prompt === null) this.colourPrompt(trace.prompt);
    for (const entry of trace.tokens) {
      if (this.offset === undefined) this.offset = entry.position;
      const span = this.spans[entry.position - this.offset];
      if (span) mark(span, entry);
    }
  }

  /** In completion mode the prompt is shown token by token, coloured too; a chat's prompt is the template's. */
  colourPrompt(entries) {
    this.prompt = entries;
    this.offset = entries[entries.length - 1].position + 1;
    if (state.mode !== "text" || !this.asked) return;
    this.asked.replaceChildren(
      ...entries.map((entry) => {
        const span = document.createElement("span");
        span.className = "token";
        span.textContent = entry.token;
        mark(span, entry);
        return span;
      }),
    );
  }

  say(now, begun) {
    const seconds = (now - this.first) / 1000;
    const rate = this.tokens > 1 && seconds > 0 ? `${((this.tokens - 1) / seconds).toFixed(1)} tokens/s · ` : "";
    this.output.value = `${rate}first after ${Math.round(this.first - begun)} ms`;
  }

  close(usage) {
    const t = usage.timings;
    const rows = this.memory ? ` · ${t.rows} rows, ${t.hits} hits, stall ${t.stall_ms.toFixed(1)} ms` : "";
    const rate = t.inter_token_ms ? `${(1000 / t.inter_token_ms).toFixed(1)} tokens/s · ` : "";
    this.output.value = `${rate}TTFT ${t.ttft_ms === null ? "–" : t.ttft_ms.toFixed(0)} ms${rows}`;
  }

  end(error) {
    this.turn.classList.remove("waiting");
    if (!error) return;
    if (!this.text) this.turn.remove();
    add(this.column, "error", error.name === "AbortError" ? "Stopped." : error.message);
  }
}

/** Gate and n-gram of a token onto its span; of several tokens in one span, the most open one counts. */
function mark(span, entry) {
  if (!entry.memory.length) return;
  for (const each of entry.memory) offerLayer(each);
  const known = span.entry;
  span.entry = !known || shown(entry) >= shown(known) ? entry : known;
  span.tabIndex = 0;
  paint(span);
}

function offerLayer(each) {
  const name = `${each.memory}:${each.layer}`;
  if (state.layers.has(name)) return;
  state.layers.add(name);
  $("layer").append(new Option(`${each.memory}, layer ${each.layer}`, name));
}

/** The gate that the chosen layer shows for a token; 0 where it has none. */
function shown(entry) {
  const choice = $("layer").value;
  const gates = entry.memory.filter((each) => choice === "max" || `${each.memory}:${each.layer}` === choice);
  return Math.max(0, ...gates.map((each) => each.gate));
}

function paint(span) {
  const gate = shown(span.entry);
  span.dataset.gate = gate.toFixed(3);
  span.style.background = `rgba(var(--gate), ${(0.85 * gate).toFixed(3)})`;
}

function add(column, kind, text) {
  const log = column.querySelector(".log");
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.textContent = text;
  log.append(turn);
  log.scrollTop = 1e9;
  return turn;
}

// ── asking ─────────────────────────────────────────────────────────────────────────────────────────────────────────

function columns() {
  const both = [
    { name: "with", element: $("with"), memory: true },
    { name: "without", element: $("without"), memory: false },
  ];
  return $("compare").checked ? both : both.filter((each) => each.memory === $("memory").checked);
}

async function ask(prompt) {
  state.running = new AbortController();
  $("send").textContent = "Stop";
  $("send").classList.add("stop");
  // One after the other: side by side they would share the machine and slow each other.
  for (const column of columns()) {
    if (state.running.signal.aborted) break;
    await askColumn(column, prompt, state.running.signal);
  }
  state.running = null;
  $("send").textContent = "Send";
  $("send").classList.remove("stop");
}

async function askColumn({ name, element, memory }, prompt, signal) {
  const chat = state.mode === "chat";
  const asked = add(element, chat ? "user" : "prompt", prompt);
  const answer = new Answer(element, memory);
  answer.asked = asked;
  const history = state.history[name];
  if (chat) history.push({ role: "user", content: prompt });
  const has = Boolean(state.had);
  const body = {
    model: $("model").value,
    stream: true,
    timings: true,
    return_token_ids: true,
    temperature: Number($("temperature").value),
    max_tokens: Number($("tokens").value),
    ...(has ? { memory: memory ? { enabled: true, trace: $("colour").checked } : { enabled: false } } : {}),
    ...(chat ? { messages: history.slice(-MOST_TURNS) } : { prompt }),
  };
  const begun = performance.now();
  let error = null;
  try {
    for await (const event of events(chat ? "v1/chat/completions" : "v1/completions", body, signal)) {
      answer.take(event, begun);
    }
  } catch (caught) {
    error = caught;
  }
  answer.end(error);
  if (!chat) return;
  if (answer.text) history.push({ role: "assistant", content: answer.text });
  else history.pop();
}

// ── live figures ───────────────────────────────────────────────────────────────────────────────────────────────────

/** Sums of the series in Prometheus text, by name; `name{tier="device"}` is kept apart as well. */
function totals(text) {
  const sums = {};
  for (const line of text.split("\n")) {
    if (!line || line[0] === "#") continue;
    const value = Number(line.slice(line.lastIndexOf(" ") + 1));
    const name = line.slice(0, line.search(/[{ ]/));
    sums[name] = (sums[name] || 0) + value;
    const tier = /tier="(\w+)"/.exec(line);
    if (tier) sums[`${name}:${tier[1]}`] = (sums[`${name}:${tier[1]}`] || 0) + value;
  }
  return sums;
}

async function measure() {
  try {
    const response = await fetch("metrics", { headers: headers() });
    if (response.ok) show(totals(await response.text()), performance.now());
  } catch {
    $("throughput").textContent = "–";
  }
  setTimeout(measure, document.hidden ? 5000 : 1000);
}

function show(sums, now) {
  const before = state.before;
  state.before = { sums, now };
  $("running").textContent = String(sums.engram_num_requests_running || 0);
  if (!before) return;
  const grown = (name) => (sums[name] || 0) - (before.sums[name] || 0);
  const rate = (1000 * grown("engram_generation_tokens_total")) / (now - before.now);
  $("throughput").textContent = rate.toFixed(rate < 10 ? 1 : 0);
  state.samples = [...state.samples.slice(-59), rate];
  const peak = Math.max(1, ...state.samples);
  const points = state.samples.map((sample, i) => `${(100 * i) / 59},${24 - (24 * sample) / peak}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
  const rows = grown("engram_memory_rows_total");
  if (rows > 0) $("hits").textContent = percent(grown("engram_memory_hits_total:device") / rows);
  const step = grown("engram_step_seconds_total");
  if (step > 0) $("stall").textContent = percent(grown("engram_memory_stall_seconds_total") / step);
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

// ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────────

function arrange() {
  const shownColumns = columns().map((each) => each.name);
  for (const name of ["with", "without"]) $(name).hidden = !shownColumns.includes(name);
  $("columns").classList.toggle("two", shownColumns.length === 2);
  $("columns").classList.toggle("plain", !$("colour").checked);
  $("memory").parentElement.hidden = $("compare").checked;
  $("layer-choice").hidden = $("legend").hidden = !$("colour").checked || !state.had;
}

function setMode(mode) {
  state.mode = mode;
  $("mode-chat").setAttribute("aria-pressed", String(mode === "chat"));
  $("mode-text").setAttribute("aria-pressed", String(mode === "text"));
  $("prompt").placeholder = EXAMPLES[mode];
  clear();
}

function clear() {
  state.history = { with: [], without: [] };
  for (const name of ["with", "without"]) {
    $(name).querySelector(".log").replaceChildren();
    $(name).querySelector("output").value = "";
  }
}

function showKeys(open) {
  $("keys").hidden = !open;
  $("key").setAttribute("aria-expanded", String(open));
  if (open) $("apikey").focus();
}

function tip(span) {
  const entry = span.entry;
  const row = (...cells) => {
    const line = document.createElement("tr");
    line.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return line;
  };
  const longest = entry.memory.reduce((a, b) => (b.ngram.token_ids.length > a.ngram.token_ids.length ? b : a));
  const ngram = Object.assign(document.createElement("b"), { textContent: `“${longest.ngram.text}”` });
  const table = document.createElement("table");
  for (const each of entry.memory) table.append(row(`${each.memory}, layer ${each.layer}`, `gate ${each.gate.toFixed(3)}`));
  table.append(row("token ids", longest.ngram.token_ids.join(" ")));
  $("tip").replaceChildren(ngram, table);
  $("tip").hidden = false;
  const at = span.getBoundingClientRect();
  const own = $("tip").getBoundingClientRect();
  $("tip").style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 8))}px`;
  $("tip").style.top = `${at.bottom + own.height + 12 < innerHeight ? at.bottom + 6 : at.top - own.height - 6}px`;
}

function onToken(event) {
  const span = event.target.closest && event.target.closest(".token[data-gate]");
  if (span && $("colour").checked) tip(span);
  else $("tip").hidden = true;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) return state.running.abort();
  const prompt = $("prompt").value;
  if (!prompt.trim()) return;
  $("prompt").value = "";
  ask(prompt);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.running) $("composer").requestSubmit();
  }
});
$("mode-chat").addEventListener("click", () => setMode("chat"));
$("mode-text").addEventListener("click", () => setMode("text"));
$("clear").addEventListener("click", clear);
$("model").addEventListener("change", offerMemory);
for (const id of ["compare", "memory", "colour"]) $(id).addEventListener("change", arrange);
$("layer").addEventListener("change", () => {
  for (const span of document.querySelectorAll(".token")) if (span.entry) paint(span);
});
$("key").addEventListener("click", () => showKeys($("keys").hidden));
$("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("apikey").value.trim();
  showKeys(false);
  loadModels();
});
for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, onToken);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") $("tip").hidden = true;
});

loadModels();
measure();
$("prompt").focus();
