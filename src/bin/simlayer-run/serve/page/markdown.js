// Markdown as models write it, as elements: no HTML, no pictures, links to http and https only.

import { copyButton, h } from "./dom.js";

// Deeper than that, quotes and lists are shown as they were written.
const MAX_DEPTH = 12;

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DELIMITERS = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;

/**
 * Shows `text` in `element`, as it grows: what was shown of it before and did not change is left alone, and with it what
 * the reader has selected there.
 */
export function show(element, text) {
  const found = blocks(text.split("\n"));
  const shown = element.shownBlocks ?? [];
  let same = 0;
  while (same < found.length && same < shown.length && found[same].source === shown[same]) same++;
  while (element.childNodes.length > same) element.lastChild.remove();
  for (const block of found.slice(same)) element.append(block.build());
  element.shownBlocks = found.map((block) => block.source);
}

/** The blocks of `lines`: what they were written as, and what builds their element. */
function blocks(lines, depth = 0) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at++;
      continue;
    }
    const [end, build] = block(lines, at, depth);
    found.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return found;
}

/** The block that begins at line `at`: where it ends, and what builds it. */
function block(lines, at, depth) {
  const line = lines[at];
  const nested = depth < MAX_DEPTH;
  let match;
  if ((match = FENCE.exec(line))) return fenced(lines, at, match);
  if ((match = HEADING.exec(line))) {
    const [, marks, text] = match;
    // The page has the first two levels.
    const level = Math.min(marks.length + 2, 6);
    return [at + 1, () => h(`h${level}`, {}, ...inline(text))];
  }
  if (RULE.test(line)) return [at + 1, () => h("hr")];
  if (nested && QUOTE.test(line)) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
    return [end, () => h("blockquote", {}, ...build(inside, depth + 1))];
  }
  if (nested && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !interrupts(lines, end, nested)) end++;
  const text = lines.slice(at, end).join("\n");
  return [end, () => h("p", {}, ...inline(text))];
}

function build(lines, depth) {
  return blocks(lines, depth).map((block) => block.build());
}

/** Whether a block begins here even where no empty line is before it. */
function interrupts(lines, at, nested) {
  const line = lines[at];
  const nests = nested && (QUOTE.test(line) || ITEM.test(line));
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || nests || isTable(lines, at);
}

function fenced(lines, at, [, fence, language]) {
  let end = at + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end++;
  const text = lines.slice(at + 1, end).join("\n");
  const build = () =>
    h(
      "div",
      { class: "code" },
      h("div", { class: "code-bar" }, h("span", {}, language), copyButton(() => text)),
      h("pre", { tabindex: "0" }, h("code", {}, text)),
    );
  return [Math.min(end + 1, lines.length), build];
}

function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const own = line.length - line.trimStart().length;
    if (item && own <= indent.length + 1 && /\d/.test(item[2]) === ordered && !RULE.test(line)) {
      items.push([line.slice(item[0].length)]);
    } else if (line.trim() === "") {
      const next = lines[end + 1];
      if (next === undefined || (!/^\s{2,}\S/.test(next) && !ITEM.test(next))) break;
      items.at(-1).push("");
    } else if (own > indent.length) {
      items.at(-1).push(line.slice(Math.min(own, indent.length + mark.length + 1)));
    } else if (item || interrupts(lines, end, true) || lines[end - 1].trim() === "") {
      break;
    } else {
      items.at(-1).push(line);
    }
    end++;
  }
  const start = ordered && parseInt(mark, 10) !== 1 ? parseInt(mark, 10) : null;
  const build_item = (lines) => {
    // A line of text needs no paragraph.
    const [first, ...rest] = blocks(lines, depth + 1).map((block) => block.build());
    const text = first?.tagName === "P" ? [...first.childNodes] : first ? [first] : [];
    return h("li", {}, ...text, ...rest);
  };
  return [end, () => h(ordered ? "ol" : "ul", { start }, ...items.map(build_item))];
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DELIMITERS.test(lines[at + 1]);
}

function table(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const aligned = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "right") : null));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const row = (tag, line) => h("tr", {}, ...cells(line).map((cell, i) => h(tag, { class: aligned[i] }, ...inline(cell))));
  const build = () => {
    const body = lines.slice(at + 2, end).map((line) => row("td", line));
    return h("div", { class: "table", tabindex: "0" }, h("table", {}, h("thead", {}, row("th", lines[at])), h("tbody", {}, ...body)));
  };
  return [end, build];
}

const SPECIAL = /[\\`*_~[]|https?:\/\//g;
const EMPHASES = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const isWord = (character) => character !== undefined && /[\p{L}\p{N}_]/u.test(character);

/** A line's text as nodes. */
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const push = (node) => {
    if (plain !== "") nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    if (next === text.length) break;
    const found = depth < MAX_DEPTH ? span(text, next, depth) : null;
    if (typeof found?.node === "string") plain += found.node;
    else if (found) push(found.node);
    else plain += text[next];
    at = found ? found.end : next + 1;
  }
  if (plain !== "") nodes.push(plain);
  return nodes;
}

/** What begins with the special character at `at`: its node and where it ends; null where that is only a character. */
function span(text, at, depth) {
  const character = text[at];
  if (character === "\\") {
    const escaped = text[at + 1];
    return escaped !== undefined && /[!-/:-@[-`{-~]/.test(escaped) ? { node: escaped, end: at + 2 } : null;
  }
  if (character === "`") {
    let length = 1;
    while (text[at + length] === "`") length++;
    const ticks = "`".repeat(length);
    const close = text.indexOf(ticks, at + length);
    if (close < 0) return { node: ticks, end: at + length };
    const code = text.slice(at + length, close);
    return { node: h("code", {}, code.trim() === "" ? code : code.trim()), end: close + length };
  }
  if (character === "h") {
    const url = /^https?:\/\/[^\s<>"'`]*[^\s<>"'`.,:;!?)\]}*_~]/.exec(text.slice(at, at + 2048))?.[0];
    return url ? { node: link(url, [url]), end: at + url.length } : null;
  }
  if (character === "[") {
    const middle = text.indexOf("](", at);
    const close = middle < 0 ? -1 : text.indexOf(")", middle);
    if (close < 0 || middle - at > 1000) return null;
    const url = text.slice(middle + 2, close).trim().split(/\s/)[0];
    if (!/^https?:\/\//i.test(url)) return null;
    return { node: link(url, inline(text.slice(at + 1, middle), depth + 1)), end: close + 1 };
  }
  for (const [mark, tag] of EMPHASES) {
    if (!text.startsWith(mark, at)) continue;
    const after = at + mark.length;
    if (text[after] === undefined || /\s/.test(text[after])) continue;
    if (mark[0] === "_" && isWord(text[at - 1])) continue;
    let close = text.indexOf(mark, after);
    // Neither the half of `**`, nor inside of a word.
    while (close >= 0 && (/\s/.test(text[close - 1]) || (mark[0] === "_" && isWord(text[close + mark.length])))) {
      close = text.indexOf(mark, close + 1);
    }
    if (close <= after) continue;
    return { node: h(tag, {}, ...inline(text.slice(after, close), depth + 1)), end: close + mark.length };
  }
  return null;
}

function link(url, text) {
  return h("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...text);
}
