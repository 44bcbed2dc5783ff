// The server's page in a browser, as `cargo xtask page` runs it: node page.mjs URL PICTURES CHROMIUM
//
// Holds three turns, writes an answer again, edits a message, goes between branches, stops an answer, reloads; nothing may
// be asked of another host, no error be told, no text of the model become an element that it should not. Pictures of the
// page go to the folder PICTURES.

import assert from "node:assert/strict";
import path from "node:path";
import { chromium } from "playwright-core";

const [url, pictures, executablePath] = process.argv.slice(2);
const host = new URL(url).host;
// A small model on a busy machine writes a few tokens a second.
const PATIENCE = 120_000;

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
const wide = { viewport: { width: 1280, height: 800 }, colorScheme: "light" };
const context = await browser.newContext(wide);
context.setDefaultTimeout(PATIENCE);
const page = await context.newPage();

/** What the page was not to do. */
const faults = [];
watch(page);

function watch(page) {
  page.on("pageerror", (error) => faults.push(`error: ${error.message}`));
  page.on("console", (message) => {
    // What a browser says of each answer but 2xx; such answers are asked for below.
    const expected = message.text().startsWith("Failed to load resource");
    if (["error", "warning"].includes(message.type()) && !expected) faults.push(message.text());
  });
  page.on("request", (request) => {
    if (new URL(request.url()).host !== host) faults.push(`asked another host: ${request.url()}`);
  });
}

const messages = page.locator(".message");
const answers = page.locator(".message.assistant");
const text = (locator) => locator.locator("> .text").innerText();
const texts = (locator) => locator.locator("> .text").allInnerTexts();
const box = page.getByRole("textbox", { name: "Message", exact: true });

async function step(name, check) {
  const started = Date.now();
  await check();
  console.error(`ok: ${name} (${((Date.now() - started) / 1000).toFixed(1)} s)`);
}

async function answered() {
  await page.getByText("The answer is complete.").waitFor();
  await page.getByRole("button", { name: "Send" }).waitFor();
  assert.equal(await page.locator(".error:visible").count(), 0);
}

async function ask(question) {
  await box.fill(question);
  await box.press("Enter");
  await page.getByText("The answer is being written.").waitFor();
  await answered();
}

/** Few tokens an answer, and the same each time. */
async function set(values) {
  await page.getByRole("button", { name: "Settings" }).click();
  for (const [label, value] of Object.entries(values)) await page.getByLabel(label).fill(String(value));
  await page.getByRole("button", { name: "Save" }).click();
}

await step("the page comes with its policy", async () => {
  const response = await page.goto(url);
  assert.equal(response.status(), 200);
  const policy = response.headers()["content-security-policy"] ?? "";
  for (const part of ["default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"]) {
    assert.ok(policy.includes(part), `${part}: ${policy}`);
  }
  await page.getByRole("button", { name: "Send" }).waitFor();
  await set({ Temperature: 0, "Longest answer": 40 });
});

await step("three turns", async () => {
  await ask("Name three animals.");
  await ask("Which of them is the largest?");
  await ask("Write its name in a code block.");
  assert.equal(await messages.count(), 6);
  for (const answer of await texts(answers)) assert.notEqual(answer.trim(), "");
  for (const facts of await page.locator(".assistant .facts").allInnerTexts()) assert.match(facts, /\d+ tokens/);
});

await step("the memory and the layers are shown", async () => {
  await page.locator("#memory .bar").waitFor();
  assert.ok((await page.locator("#memory .layer").count()) > 1);
  await page.locator("#memory .layer").first().click();
  await page.locator("#memory .note", { hasText: "Layer 0" }).waitFor();
});

let first;
await step("an answer written again is a branch", async () => {
  first = await text(answers.last());
  await set({ Temperature: 1.5, Seed: 7 });
  await answers.last().getByRole("button", { name: "Again" }).click();
  await page.getByText("The answer is being written.").waitFor();
  await answered();
  await answers.last().getByText("2 / 2").waitFor();
  await answers.last().getByRole("button", { name: "Previous version" }).click();
  assert.equal(await text(answers.last()), first);
  await answers.last().getByRole("button", { name: "Next version" }).click();
  await answers.last().getByText("2 / 2").waitFor();
});

await step("an edited message is a branch, with what followed kept in the other", async () => {
  await set({ Temperature: 0, Seed: "" });
  const second = messages.nth(2);
  await second.getByRole("button", { name: "Edit" }).click();
  const editor = page.getByRole("textbox", { name: "Edited message" });
  await editor.fill("Which of them is the smallest?");
  await editor.press("Enter");
  await page.getByText("The answer is being written.").waitFor();
  await answered();
  assert.equal(await messages.count(), 4);
  assert.equal(await text(messages.nth(2)), "Which of them is the smallest?");
  await messages.nth(2).getByRole("button", { name: "Previous version" }).click();
  assert.equal(await messages.count(), 6);
  assert.equal(await text(messages.nth(2)), "Which of them is the largest?");
});

await step("up edits the last message, escape leaves it", async () => {
  await box.focus();
  await box.press("ArrowUp");
  const editor = page.getByRole("textbox", { name: "Edited message" });
  assert.equal(await editor.inputValue(), "Write its name in a code block.");
  await editor.press("Escape");
  assert.equal(await messages.count(), 6);
});

await step("shift-enter makes a line, and a message is shown as it was written", async () => {
  await set({ "Longest answer": 8 });
  await box.fill("<b>one</b> ");
  await box.press("Shift+Enter");
  await box.pressSequentially("two");
  await box.press("Enter");
  await answered();
  assert.equal(await text(messages.nth(6)), "<b>one</b> \ntwo");
  assert.equal(await messages.nth(6).locator("b").count(), 0);
});

await step("reloading keeps everything", async () => {
  const before = await texts(messages);
  await page.reload();
  await messages.nth(7).waitFor();
  assert.deepEqual(await texts(messages), before);
  await messages.nth(2).getByText("1 / 2").waitFor();
  await messages.nth(5).getByText("2 / 2").waitFor();
  await page.locator("#memory .layer").first().waitFor();
});

await step("escape stops an answer, and what came is kept", async () => {
  await set({ "Longest answer": 2000 });
  await page.getByRole("button", { name: "New conversation" }).click();
  await box.fill("Tell a very long story about a lighthouse, with many chapters.");
  await box.press("Enter");
  await answers.last().locator("> .text", { hasText: /[^]{20}/ }).waitFor();
  await page.keyboard.press("Escape");
  await page.getByRole("button", { name: "Send" }).waitFor();
  await answers.last().getByText("stopped").waitFor();
  const kept = await text(answers.last());
  await page.reload();
  await answers.last().waitFor();
  assert.equal(await text(answers.last()), kept);
  assert.equal(await page.locator("#conversations li").count(), 2);
});

await step("what a model writes becomes no element but those of its Markdown", async () => {
  const found = await page.evaluate(async () => {
    const { show } = await import("./page/markdown.js");
    const element = document.createElement("div");
    const hostile = [
      "<img src=x onerror=alert(1)> <script>alert(1)</script> [a](javascript:alert(1)) [b](data:text/html,x) ![c](https://example.com/x.png)",
      "> ".repeat(5000) + "deep",
      "[".repeat(20000),
      "*_~`".repeat(5000),
      "- ".repeat(3000),
      "|".repeat(3000) + "\n" + "|-".repeat(3000),
      "```\n<b>not closed",
    ].join("\n\n");
    const started = performance.now();
    show(element, hostile);
    const took = performance.now() - started;
    const tags = new Set([...element.querySelectorAll("*")].map((one) => one.localName));
    const targets = [...element.querySelectorAll("a")].map((a) => a.protocol);
    // As it grows, the whole text has to look the same as in one piece.
    const text = "# T\n\none **two** `three`\n\n1. a\n   - b\n2. c\n\n| x | y |\n|---|--:|\n| 1 | 2 |\n\n```rust\nfn f() {}\n```\n\n> q";
    const grown = document.createElement("div");
    for (let end = 1; end <= text.length; end++) show(grown, text.slice(0, end));
    const once = document.createElement("div");
    show(once, text);
    return { tags: [...tags], targets, took, same: grown.innerHTML === once.innerHTML, html: once.innerHTML };
  });
  for (const tag of ["img", "script", "b", "iframe", "style"]) assert.ok(!found.tags.includes(tag), tag);
  assert.ok(found.targets.every((protocol) => protocol === "https:"), String(found.targets));
  assert.ok(found.took < 2000, `${found.took} ms`);
  assert.ok(found.same);
  for (const part of ["<h3>T</h3>", "<strong>two</strong>", "<code>three</code>", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>", '<td class="right">2</td>', "<blockquote><p>q</p></blockquote>"]) {
    assert.ok(found.html.includes(part), `${part}: ${found.html}`);
  }
});

await step("a long text makes layers lazy", async () => {
  await set({ "Longest answer": 60 });
  await page.getByRole("button", { name: "New conversation" }).click();
  const days = Array.from({ length: 30 }, (_, day) => `Day ${day + 1}: ${7 + ((day * 5) % 11)} ships passed the lighthouse, and the keeper wrote down their names.`);
  await ask(`Here are a keeper's notes.\n\n${days.join("\n")}\n\nWhat did the keeper do?`);
  await page.locator("#memory .legend .lazy").waitFor();
  await page.getByText("times smaller than f16").first().waitFor();
  await ask("And how many days do the notes tell of?");
});

await step("pictures", async () => {
  await page.mouse.move(640, 5);
  await page.screenshot({ path: path.join(pictures, "serve-light.png") });
  const state = await context.storageState();
  const phone = await browser.newContext({
    storageState: state,
    viewport: { width: 390, height: 780 },
    colorScheme: "dark",
    isMobile: true,
    hasTouch: true,
  });
  const small = await phone.newPage();
  watch(small);
  await small.goto(url);
  await small.locator(".message").nth(3).waitFor();
  await small.getByRole("button", { name: "Conversations" }).tap();
  await small.locator("#conversations .title").nth(2).tap();
  await small.locator(".message").nth(5).waitFor();
  assert.ok(await small.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "wider than the phone");
  await small.screenshot({ path: path.join(pictures, "serve-phone.png") });
  await small.getByRole("button", { name: "Conversations" }).tap();
  await small.locator("#conversations .title").nth(0).tap();
  await small.getByRole("button", { name: "Memory and layers" }).tap();
  await small.locator("#memory .layer").first().waitFor();
  await small.screenshot({ path: path.join(pictures, "serve-dark.png") });
  await phone.close();
});

await browser.close();
assert.deepEqual(faults, []);
