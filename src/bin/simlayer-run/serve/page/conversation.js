// Conversations as trees of messages, kept in the browser.
//
// A message that is edited, and an answer that is written again, get a sibling. Each message knows which of its children
// is chosen; the chosen ones from the root on are what is shown and sent.

const PREFIX = "simlayer.conversation.";

/** Unique here; `crypto.randomUUID` there is with TLS only. */
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);

export class Conversation {
  constructor({ id = newId(), title = "", updated = Date.now(), messages = { root: { children: [], chosen: 0 } } } = {}) {
    Object.assign(this, { id, title, updated, messages });
  }

  /** The messages that are shown, from the first to the last. */
  path() {
    const path = [];
    for (let message = this.messages.root; message?.children.length; ) {
      message = this.messages[message.children[message.chosen] ?? message.children[0]];
      if (message) path.push(message);
    }
    return path;
  }

  /** Adds a message below another (`null`: the first), and chooses it. */
  add(parent, role, text) {
    const message = { id: newId(), parent: parent?.id ?? "root", role, text, children: [], chosen: 0 };
    const above = this.messages[message.parent];
    this.messages[message.id] = message;
    above.chosen = above.children.push(message.id) - 1;
    if (this.title === "" && role === "user") this.title = text.trim().split("\n")[0].slice(0, 60);
    return message;
  }

  /** Which of how many alternatives a message is, from 0. */
  place(message) {
    const { children } = this.messages[message.parent];
    return { index: children.indexOf(message.id), count: children.length };
  }

  /** Chooses the alternative `step` further. */
  step(message, step) {
    const above = this.messages[message.parent];
    const { index, count } = this.place(message);
    above.chosen = Math.min(Math.max(index + step, 0), count - 1);
  }

  /** The messages before this one. */
  before(message) {
    const before = [];
    for (let id = message.parent; id !== "root"; id = this.messages[id].parent) before.unshift(this.messages[id]);
    return before;
  }

  /** Throws where the browser has no room. */
  save() {
    this.updated = Date.now();
    const { id, title, updated, messages } = this;
    localStorage.setItem(PREFIX + id, JSON.stringify({ id, title, updated, messages }));
  }
}

/** All conversations, the newest first. */
export function list() {
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
  const found = ids.map(load).filter((conversation) => conversation !== null);
  return found.sort((one, other) => other.updated - one.updated);
}

/** `null` where there is none, or none that can be read. */
export function load(id) {
  try {
    const kept = JSON.parse(localStorage.getItem(PREFIX + id));
    return kept?.messages?.root ? new Conversation(kept) : null;
  } catch {
    return null;
  }
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

export const isConversation = (key) => key?.startsWith(PREFIX) ?? true;
