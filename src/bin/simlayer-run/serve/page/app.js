// The page: what is shown, and what happens when something is pressed. How a conversation is kept is in conversation.js,
// what the server is asked in api.js.

import { ApiError, chat, get } from "./api.js";
import { Conversation, isConversation, list, load, remove } from "./conversation.js";
import { bytes, copyButton, h } from "./dom.js";
import { show } from "./markdown.js";
import { draw, tokensOf } from "./memory.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = "simlayer.settings";
const CHOSEN = "simlayer.chosen";
const KEY = "simlayer.key";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "max_tokens"];

let settings = read(SETTINGS) ?? {};
let conversation = load(sessionStorage.getItem(CHOSEN) ?? localStorage.getItem(CHOSEN)) ?? new Conversation();
/** The answer that is being written: `{conversation, message, abort, changed}`. One at a time. */
let running = null;
/** The message that is being edited. */
let editing = null;
/** The messages that are shown, by id: what renews each. */
let views = new Map();
const memory = { props: null, slots: null, slot: null, error: null };

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

const apiKey = () => sessionStorage.getItem(KEY) ?? "";
const say = (text) => ($("status").textContent = text);

// ---- messages ----

function render() {
  views = new Map();
  const path = conversation.path();
  $("messages").replaceChildren(...path.map(messageView));
  if (path.length === 0) $("messages").append(h("p", { class: "empty" }, "Ask something. What the caches take is shown beside."));
  document.title = conversation.title ? `${conversation.title} – simlayer` : "simlayer";
  renewButtons();
  scrollDown(true);
}

function messageView(message) {
  if (message === editing) return editor(message);
  const isAnswer = message.role === "assistant";
  const text = h("div", { class: "text" });
  const reasoning = h("div", { class: "text" });
  const thoughts = h("details", { hidden: true }, h("summary", {}, "Reasoning"), reasoning);
  const facts = h("p", { class: "facts" });
  const error = h("p", { class: "error", role: "alert", hidden: true });
  const renew = () => {
    if (isAnswer) show(text, message.text);
    else text.textContent = message.text;
    thoughts.hidden = !message.reasoning;
    if (message.reasoning) show(reasoning, message.reasoning);
    facts.textContent = factsOf(message);
    error.hidden = !message.error;
    error.textContent = message.error ?? "";
    element.setAttribute("aria-busy", String(running?.message === message));
  };
  const element = h(
    "article",
    { class: `message ${message.role}`, "data-id": message.id, "aria-label": isAnswer ? "Answer" : "You" },
    thoughts,
    text,
    error,
    facts,
    tools(message, isAnswer),
  );
  views.set(message.id, renew);
  renew();
  return element;
}

function tools(message, isAnswer) {
  const { index, count } = conversation.place(message);
  const step = (by, label, sign, disabled) => {
    const go = () => {
      conversation.step(message, by);
      save();
      render();
    };
    return h("button", { type: "button", class: "small", "aria-label": label, disabled, "data-idle": !disabled, onclick: go }, sign);
  };
  const branches = h(
    "span",
    { class: "branches" },
    step(-1, "Previous version", "‹", index === 0),
    h("span", {}, `${index + 1} / ${count}`),
    step(1, "Next version", "›", index === count - 1),
  );
  const again = isAnswer
    ? h("button", { type: "button", class: "small", "data-idle": true, onclick: () => regenerate(message) }, "Again")
    : h("button", { type: "button", class: "small", "data-idle": true, onclick: () => edit(message) }, "Edit");
  return h("div", { class: "tools" }, count > 1 && branches, again, copyButton(() => message.text));
}

function editor(message) {
  const area = h("textarea", { "aria-label": "Edited message", rows: Math.min(message.text.split("\n").length + 1, 12) });
  area.value = message.text;
  const cancel = () => {
    editing = null;
    render();
    $("text").focus();
  };
  const finish = (event) => {
    event.preventDefault();
    const text = area.value.trim();
    if (text === "" || running) return;
    editing = null;
    const parent = conversation.before(message).at(-1) ?? null;
    answer(conversation.add(parent, "user", text));
    $("text").focus();
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) finish(event);
    if (event.key !== "Escape") return;
    event.stopPropagation();
    cancel();
  });
  const buttons = h(
    "div",
    { class: "tools" },
    h("button", { type: "submit", class: "small" }, "Send as a new branch"),
    h("button", { type: "button", class: "small", onclick: cancel }, "Cancel"),
  );
  return h("form", { class: "message user", onsubmit: finish }, area, buttons);
}

/** What is told below an answer. */
function factsOf(message) {
  if (message.role !== "assistant" || running?.message === message) return "";
  const { end, stopped, error } = message;
  const { usage, timings, kv, finish } = end ?? {};
  const facts = [];
  const written = timings?.predicted_n ?? usage?.completion_tokens;
  if (written != null) {
    const speed = timings?.predicted_per_second;
    facts.push(speed ? `${written} tokens, ${speed.toFixed(1)} a second` : `${written} tokens`);
  }
  const cached = timings?.cache_n ?? usage?.prompt_tokens_details?.cached_tokens;
  const read = timings?.prompt_n ?? (usage && cached != null ? usage.prompt_tokens - cached : usage?.prompt_tokens);
  if (read != null) facts.push(cached ? `prompt: ${read} read, ${cached} kept` : `prompt: ${read} read`);
  if (kv?.allocated_bytes) {
    const factor = kv.f16_bytes / kv.allocated_bytes;
    facts.push(factor >= 1.05 ? `${bytes(kv.allocated_bytes)}, ${factor.toFixed(1)} times smaller than f16` : bytes(kv.allocated_bytes));
  }
  if (finish === "length") facts.push("cut off at the longest answer");
  if (stopped) facts.push("stopped");
  else if (!end && !error) facts.push("interrupted");
  return facts.join(" · ");
}

/** Whether what comes should stay in sight: not where the reader has scrolled up. */
let following = true;
$("messages").addEventListener("scroll", ({ target }) => {
  following = target.scrollHeight - target.scrollTop - target.clientHeight < 60;
});

function scrollDown(always = false) {
  if (always || following) $("messages").scrollTop = $("messages").scrollHeight;
}

// ---- answers ----

function send(event) {
  event?.preventDefault();
  const text = $("text").value.trim();
  if (text === "" || running) return;
  $("text").value = "";
  grow();
  answer(conversation.add(conversation.path().at(-1) ?? null, "user", text));
}

function regenerate(message) {
  if (running) return;
  answer(conversation.before(message).at(-1));
}

function edit(message) {
  if (running) return;
  editing = message;
  render();
  const area = $("messages").querySelector("form textarea");
  area?.scrollIntoView({ block: "nearest" });
  area?.focus();
}

/** Has the message answered, beside the answers that it has. */
async function answer(question) {
  const message = conversation.add(question, "assistant", "");
  const task = { conversation, message, abort: new AbortController(), saved: Date.now() };
  const sent = task.conversation.before(message).map(({ role, text }) => ({ role, content: text }));
  if (settings.system) sent.unshift({ role: "system", content: settings.system });
  const sampling = Object.fromEntries(NUMBERS.filter((name) => settings[name] != null).map((name) => [name, settings[name]]));
  running = task;
  save(task.conversation);
  render();
  renewList();
  say("The answer is being written.");
  loadMemory();
  try {
    for await (const part of chat(sent, sampling, apiKey(), task.abort.signal)) {
      if ("text" in part) {
        message.text += part.text;
        if (part.reasoning) message.reasoning = (message.reasoning ?? "") + part.reasoning;
      } else {
        message.end = part;
      }
      renewLater(task);
    }
    say("The answer is complete.");
  } catch (error) {
    failed(message, error);
  }
  running = null;
  renew(task);
  save(task.conversation);
  renewList();
  renewButtons();
  loadMemory();
}

function failed(message, error) {
  if (error.name === "AbortError") {
    message.stopped = true;
    say("Stopped.");
    return;
  }
  message.error = error instanceof ApiError ? error.message : `The answer could not be understood: ${error.message}`;
  say("");
  if (error.status === 401) openSettings();
}

/** Shows what came once a picture of the screen, not once a token. */
function renewLater(task) {
  if (task.changed) return;
  task.changed = true;
  // Pages that are hidden draw nothing, and still should keep what came.
  (document.hidden ? (then) => setTimeout(then, 500) : requestAnimationFrame)(() => {
    task.changed = false;
    renew(task);
    if (running === task && Date.now() - task.saved > 1000) {
      task.saved = Date.now();
      save(task.conversation);
    }
  });
}

function renew(task) {
  if (task.conversation !== conversation) return;
  views.get(task.message.id)?.();
  scrollDown();
}

function stop() {
  running?.abort.abort();
}

function renewButtons() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  for (const button of document.querySelectorAll("[data-idle]")) button.disabled = running !== null;
}

function save(which = conversation) {
  try {
    which.save();
    // Each tab comes back to its own, a new one to the last.
    if (which === conversation) for (const storage of [sessionStorage, localStorage]) storage.setItem(CHOSEN, which.id);
  } catch {
    say("The browser has no room to keep this conversation. Delete others.");
  }
}

// ---- conversations ----

function renewList() {
  const entry = ({ id, title }) =>
    h(
      "li",
      { class: id === conversation.id ? "chosen" : null },
      h("button", { type: "button", class: "title", "aria-current": id === conversation.id ? "true" : null, onclick: () => choose(id) }, title || "Untitled"),
      h("button", { type: "button", class: "small", "aria-label": `Delete ${title || "Untitled"}`, onclick: () => drop(id, title) }, "✕"),
    );
  $("conversations").replaceChildren(...list().map(entry));
}

function choose(id) {
  go(running?.conversation.id === id ? running.conversation : (load(id) ?? new Conversation()));
}

function go(to) {
  conversation = to;
  editing = null;
  memory.slot = null;
  for (const storage of [sessionStorage, localStorage]) storage.setItem(CHOSEN, to.id);
  toggle("list", false);
  render();
  renewList();
  renewMemory();
  $("text").focus();
}

function drop(id, title) {
  if (!confirm(`Delete “${title || "Untitled"}”?`)) return;
  if (running?.conversation.id === id) {
    stop();
    // What still comes is not kept.
    running.conversation.save = () => {};
  }
  remove(id);
  if (id === conversation.id) go(new Conversation());
  else renewList();
}

// ---- memory ----

let timer = null;

async function loadMemory() {
  clearTimeout(timer);
  if (!document.hidden) {
    const [props, slots] = await Promise.allSettled([get("props", apiKey()), get("slots", apiKey())]);
    if (props.status === "fulfilled") memory.props = props.value;
    if (slots.status === "fulfilled" && Array.isArray(slots.value)) memory.slots = slots.value;
    memory.error = slots.status === "rejected" ? `The server does not tell what its caches take: ${slots.reason.message}` : null;
    renewMemory();
  }
  clearTimeout(timer);
  timer = setTimeout(loadMemory, running ? 1500 : 15000);
}

/** The slot of this conversation, as far as that can be known: the busy one, or the one that has as many tokens. */
function slotOfConversation() {
  const busy = memory.slots?.find((slot) => (slot.state ?? "idle") !== "idle");
  if (running?.conversation === conversation && busy) return busy.id;
  const usage = conversation.path().findLast((message) => message.end?.usage)?.end.usage;
  const tokens = usage ? usage.prompt_tokens + usage.completion_tokens : NaN;
  // The last token of an answer need not be in the cache.
  return memory.slots?.find((slot) => Math.abs(tokensOf(slot) - tokens) <= 1)?.id;
}

/** What was drawn last; drawn again only when it changed, so that the focus stays where it is. */
let drawn = "";

function renewMemory() {
  const slot = memory.slot ?? slotOfConversation();
  const now = JSON.stringify([memory, slot]);
  if (now === drawn) return;
  drawn = now;
  const { props } = memory;
  $("model").textContent = props?.model ?? props?.model_alias ?? props?.model_path?.split("/").at(-1) ?? "";
  const choose = (slot) => {
    memory.slot = slot;
    renewMemory();
  };
  draw($("memory"), { ...memory, slot, choose });
}

// ---- settings ----

function openSettings() {
  const { elements } = $("settings").querySelector("form");
  for (const name of [...NUMBERS, "system"]) elements[name].value = settings[name] ?? "";
  elements.key.value = apiKey();
  $("settings").returnValue = "";
  if (!$("settings").open) $("settings").showModal();
}

function saveSettings() {
  if ($("settings").returnValue !== "save") return;
  const { elements } = $("settings").querySelector("form");
  const numbers = NUMBERS.filter((name) => elements[name].value !== "").map((name) => [name, Number(elements[name].value)]);
  settings = { theme: settings.theme, ...Object.fromEntries(numbers), system: elements.system.value };
  sessionStorage.setItem(KEY, elements.key.value.trim());
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
  loadMemory();
}

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function applyTheme() {
  const theme = settings.theme in THEMES ? settings.theme : "auto";
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[theme]}`);
  $("theme").title = `Colours: ${THEMES[theme]}`;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  settings.theme = names[(names.indexOf(settings.theme ?? "auto") + 1) % names.length];
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
  applyTheme();
}

// ---- what is pressed ----

/** Opens or closes what stands beside the conversation where there is room, and over it on a phone. */
function toggle(id, open) {
  const is = document.body.classList.toggle(`show-${id}`, open);
  $(`show-${id}`).setAttribute("aria-expanded", String(is));
}

function grow() {
  const area = $("text");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 240)}px`;
}

$("composer").addEventListener("submit", send);
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => go(new Conversation()));
$("theme").addEventListener("click", nextTheme);
$("show-settings").addEventListener("click", openSettings);
$("settings").addEventListener("close", saveSettings);
$("show-list").addEventListener("click", () => toggle("list"));
$("show-memory").addEventListener("click", () => toggle("memory"));
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  if (event.key === "ArrowUp" && $("text").value === "") {
    const last = conversation.path().findLast((message) => message.role === "user");
    if (!last) return;
    event.preventDefault();
    edit(last);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if (running) stop();
  for (const id of ["list", "memory"]) toggle(id, false);
});
document.addEventListener("visibilitychange", () => !document.hidden && loadMemory());
window.addEventListener("pagehide", () => running && save(running.conversation));
// Another tab has changed something.
window.addEventListener("storage", ({ key }) => {
  if (!isConversation(key)) return;
  renewList();
  const changed = load(conversation.id);
  if (changed && !running && !editing && changed.updated !== conversation.updated) {
    conversation = changed;
    render();
  }
});

applyTheme();
render();
renewList();
loadMemory();
$("text").focus();
