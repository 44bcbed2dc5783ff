// What the caches take: the bar against f16, the layers, the slots, and the conversations that are parked.

import { bytes, h, svg } from "./dom.js";

const KINDS = {
  active: "active: all tokens are kept",
  lazy: "lazy: the first and the recent tokens only",
  window: "window: by the model's design",
  recurrent: "recurrent: a state of one size",
  convolution: "convolution: a state of one size",
  shared: "shared: another layer's cache",
  nothing: "nothing: no cache at all",
};

/** What the colour of a layer is: `full`, and what is not known here, has all tokens. */
const kindOf = (layer) => (layer.lazy || layer.kind === "lazy" ? "lazy" : layer.kind in KINDS ? layer.kind : "active");

/**
 * Draws what is known: `props` and `slots` are the server's, each may be missing; `slot` is the one whose layers are
 * shown, `choose` is called with another, `error` says why nothing is known.
 */
export function draw(panel, { props, slots, slot, choose, error }) {
  const shown = slots?.find((one) => one.id === slot) ?? slots?.[0];
  panel.replaceChildren(
    h("h2", {}, "Memory"),
    ...(error ? [h("p", { class: "note" }, error)] : []),
    ...(shown?.kv ? bar(shown) : []),
    ...(shown?.layers?.length ? picture(shown) : []),
    ...(slots?.length ? table(slots, shown, choose) : []),
    ...server(props),
  );
}

/** How many tokens a slot has. */
export const tokensOf = (slot) => slot.tokens ?? slot.n_past ?? slot.kv?.context_tokens;

function bar(slot) {
  const { kv, n_ctx } = slot;
  const { f16_bytes: f16 = 0, allocated_bytes: taken = 0 } = kv;
  const share = f16 > 0 ? Math.min(taken / f16, 1) : 0;
  // Before there are tokens, and for very short texts, a cache takes more than f16 would: no word of factors then.
  const factor = taken > 0 && f16 / taken >= 1.05 ? `${(f16 / taken).toFixed(1)} times smaller than f16` : null;
  const text = `${bytes(taken)}; f16 would take ${bytes(f16)}`;
  const context = tokensOf(slot);
  return [
    h(
      "figure",
      { class: "bar" },
      svg(
        "svg",
        { viewBox: "0 0 100 6", preserveAspectRatio: "none", role: "img", "aria-label": `The cache takes ${text}` },
        svg("rect", { class: "f16", width: 100, height: 6 }),
        svg("rect", { class: "taken", width: Math.max(share * 100, taken > 0 ? 0.5 : 0), height: 6 }),
      ),
      h("figcaption", {}, h("strong", {}, factor ?? text), factor && h("span", {}, text)),
    ),
    context != null && h("p", { class: "note" }, n_ctx ? `${context} of ${n_ctx} tokens` : `${context} tokens`),
  ];
}

/** A column a layer, as high as its cache is large; the frame around it is what f16 would take. */
function picture({ kv, layers }) {
  const caches = layers.filter((layer) => !["recurrent", "convolution", "shared", "nothing"].includes(layer.kind)).length;
  const largest = Math.max(1, ...layers.map((layer) => layer.kv_bytes ?? 0));
  const full = Math.max(largest, (kv?.f16_bytes ?? 0) / Math.max(caches, 1));
  const told = h("p", { class: "note", "aria-live": "polite" }, "Each column is a layer; choose one to read of it.");
  const columns = layers.map((layer, i) => {
    const kind = kindOf(layer);
    const height = Math.max((48 * (layer.kv_bytes ?? 0)) / full, 1.5);
    const text = describe(layer, kind);
    const tell = () => (told.textContent = text);
    return svg(
      "g",
      { class: `layer ${kind}`, tabindex: "0", role: "listitem", "aria-label": text, onclick: tell, onfocus: tell, onpointerenter: tell },
      svg("rect", { class: "f16", x: 10 * i + 1, y: 1, width: 8, height: 48 }),
      svg("rect", { class: "taken", x: 10 * i + 1, y: 49 - height, width: 8, height }),
    );
  });
  const count = (kind) => layers.filter((layer) => kindOf(layer) === kind).length;
  const legend = Object.entries(KINDS).filter(([kind]) => count(kind) > 0);
  return [
    h("h3", {}, "Layers"),
    svg(
      "svg",
      { class: "layers", viewBox: `0 0 ${10 * layers.length} 50`, preserveAspectRatio: "none", role: "list", "aria-label": "Layers" },
      ...columns,
    ),
    told,
    h(
      "ul",
      { class: "legend" },
      ...legend.map(([kind, meaning]) => h("li", { class: kind }, h("strong", {}, count(kind)), ` ${meaning}`)),
    ),
  ];
}

function describe({ index, kv_bytes, score }, kind) {
  const parts = [`Layer ${index}: ${KINDS[kind].split(":")[0]}`];
  if (kv_bytes != null) parts.push(bytes(kv_bytes));
  if (score != null) parts.push(`score ${score.toFixed(3)}`);
  return parts.join(", ");
}

function table(slots, shown, choose) {
  if (slots.length < 2) return [];
  const row = (slot) =>
    h(
      "tr",
      { class: slot === shown ? "chosen" : null },
      h("td", {}, h("button", { type: "button", class: "small", "aria-pressed": String(slot === shown), onclick: () => choose(slot.id) }, String(slot.id))),
      h("td", {}, slot.state ?? ""),
      h("td", { class: "right" }, String(tokensOf(slot) ?? "")),
      h("td", { class: "right" }, slot.kv ? bytes(slot.kv.allocated_bytes ?? 0) : ""),
    );
  const head = ["Slot", "State", "Tokens", "Takes"].map((text, i) => h("th", { scope: "col", class: i > 1 ? "right" : null }, text));
  return [
    h("h3", {}, "Conversations in memory"),
    h("div", { class: "table" }, h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...slots.map(row)))),
  ];
}

function server(props) {
  if (!props) return [];
  const { parked } = props;
  const kv_mem = props.kv_mem ?? props.kv?.mem_bytes;
  const lines = [];
  if (kv_mem != null) lines.push(["For all caches", bytes(kv_mem)]);
  if (parked) {
    const of = parked.max_bytes != null ? ` of ${bytes(parked.max_bytes)}` : "";
    lines.push(["Parked on disk", `${parked.entries ?? 0}, ${bytes(parked.bytes ?? 0)}${of}`]);
  }
  if (lines.length === 0) return [];
  return [h("h3", {}, "Server"), h("dl", {}, ...lines.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))];
}
