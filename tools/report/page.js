"use strict";
// What moves on the report page: values under the pointer, and the captions, unpacked a page (a step) at a time.
(() => {
  const byId = (id) => document.getElementById(id);
  const parsed = (id) => JSON.parse(byId(id).textContent);
  const show = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const signed = (value) => (value > 0 ? "+" : "") + show(value);

  // An element with attributes and children. Texts are set as texts: nothing that a model wrote is read as markup.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "click") element.addEventListener("click", value);
      else if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // ------------------------------------------------------------------------------------------------------------- curves

  const curves = parsed("curves-data");
  for (const figure of document.querySelectorAll(".curve")) {
    const { steps, x, lines } = curves[figure.dataset.place];
    const svg = figure.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const values = figure.querySelectorAll(".value");
    let place = null;

    function point(at) {
      place = at;
      cursor.style.visibility = at === null ? "hidden" : "visible";
      if (at !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x[at]);
      figure.querySelector(".at").textContent = at === null ? "" : `step ${steps[at]}`;
      lines.forEach((line, i) => {
        const value = at === null ? null : line.values[at];
        values[i].textContent = value === null ? "" : String(value);
      });
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      return x.reduce((best, one, i) => (Math.abs(one - at) < Math.abs(x[best] - at) ? i : best), 0);
    }

    svg.addEventListener("pointermove", (event) => point(nearest(event)));
    svg.addEventListener("pointerleave", () => point(null));
    svg.addEventListener("blur", () => point(null));
    svg.addEventListener("click", (event) => goToStep(steps[nearest(event)]));
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) point(place === null ? (move > 0 ? 0 : x.length - 1) : Math.min(Math.max(place + move, 0), x.length - 1));
      else if (event.key === "Home") point(0);
      else if (event.key === "End") point(x.length - 1);
      else if (event.key === "Enter" && place !== null) goToStep(steps[place]);
      else return;
      event.preventDefault();
    });
  }

  // ----------------------------------------------------------------------------------------------------------- captions

  const index = parsed("index-data");
  const pages = index.pages;
  if (!pages.length) return;
  const texts = index.questions.map((text) => text.toLowerCase());
  const families = [...new Set(pages.flatMap((page) => page.groups.map((group) => group.family)))].sort();
  families.forEach((family) => byId("family").append(make("option", { value: family }, family)));
  const largest = Math.max(...pages.flatMap((page) => page.groups.map((group) => group.spread)));
  byId("spread").max = Math.max(0.05, Math.ceil(largest * 20) / 20);

  let shown = []; // places of the pages on which a group passes the filters
  let page = 0;
  let group = 0; // place among the page's groups that pass
  let groups = [];
  const unpacked = new Map();

  async function unpack(place) {
    if (!unpacked.has(place)) {
      const bytes = Uint8Array.from(atob(byId(`page-${place}`).textContent), (character) => character.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      if (unpacked.size > 20) unpacked.clear();
      unpacked.set(place, new Response(stream).json());
    }
    return unpacked.get(place);
  }

  function passes(one, wanted) {
    if (byId("family").value && one.family !== byId("family").value) return false;
    if (one.spread < Number(byId("spread").value) - 1e-9) return false;
    return wanted === null || one.questions.some((question) => wanted.has(question));
  }

  function filter() {
    const words = byId("question").value.trim().toLowerCase();
    const wanted = words ? new Set(texts.flatMap((text, i) => (text.includes(words) ? [i] : []))) : null;
    const found = pages.map((one) => one.groups.flatMap((entry, i) => (passes(entry, wanted) ? [i] : [])));
    byId("spread-value").textContent = show(Number(byId("spread").value));
    shown = found.flatMap((places, i) => (places.length ? [i] : []));
    const number = found.reduce((sum, places) => sum + places.length, 0);
    const all = pages.reduce((sum, one) => sum + one.groups.length, 0);
    byId("count").textContent = `${number} of ${all} groups`;
    byId("page").replaceChildren(...shown.map((i) => {
      const rest = found[i].length < pages[i].groups.length ? ` (${found[i].length})` : "";
      return make("option", { value: i }, pages[i].title + rest);
    }));
    if (!shown.includes(page)) page = shown.find((i) => i > page) ?? shown.at(-1) ?? page;
    return found;
  }

  async function render(keepGroup = false) {
    const found = filter();
    groups = shown.length ? found[page] : [];
    group = keepGroup ? Math.max(0, Math.min(group, groups.length - 1)) : 0;
    byId("page").value = page;
    byId("previous").disabled = shown[0] === page || !shown.length;
    byId("next").disabled = shown.at(-1) === page || !shown.length;
    byId("strip").replaceChildren(...groups.map(stripButton));
    await renderGroup();
  }

  function picture(entry, attributes = {}) {
    if (entry.picture === null) return make("div", { class: "blank", ...attributes });
    return make("img", { src: byId(`picture-${entry.picture}`).textContent, alt: `image ${entry.id}`, ...attributes });
  }

  function stripButton(place, i) {
    const entry = pages[page].groups[place];
    const means = entry.means.map((mean) => show(mean)).join(" | ");
    return make("button", { type: "button", title: entry.id, click: () => choose(i) }, picture(entry),
      make("span", { dir: "auto" }, entry.id), make("span", {}, `mean ${means}`), make("span", {}, `spread ${show(entry.spread)}`));
  }

  function choose(i) {
    group = i;
    renderGroup();
  }

  async function renderGroup() {
    [...byId("strip").children].forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === group));
      // Within the strip only: scrollIntoView would move the page too.
      if (i === group) byId("strip").scrollLeft = button.offsetLeft - byId("strip").offsetLeft - byId("strip").clientWidth / 2 + 52;
    });
    if (!groups.length) {
      byId("detail").replaceChildren(make("p", {}, "No group passes the filters."));
      return;
    }
    const [atPage, place] = [page, groups[group]];
    const packed = await unpack(atPage);
    if (page !== atPage || groups[group] !== place) return; // another one was chosen meanwhile
    const entry = pages[page].groups[place];
    const facts = make("dl", { class: "facts" });
    const rows = [["image", entry.id], ["family", entry.family], [`${index.earned} spread`, show(entry.spread)]];
    const mean = `mean ${index.earned}`;
    index.names.forEach((name, i) => rows.push([index.names.length > 1 ? `${mean}, ${name}` : mean, show(entry.means[i], 3)]));
    rows.forEach(([name, value]) => facts.append(make("dt", {}, name), make("dd", { dir: "auto" }, value)));
    const sides = packed[place].map((side, i) => renderSide(side, i)).filter(Boolean);
    byId("detail").replaceChildren(
      make("div", { class: "head" }, entry.picture === null ? null : picture(entry), facts),
      make("div", { class: "sides" }, ...sides),
    );
  }

  function renderSide(side, place) {
    const name = index.names.length > 1 ? index.names[place] : "";
    if (side === null) return make("div", { class: "side" }, make("h3", {}, name), make("p", {}, "no captions of this image"));
    const step = name && side.step !== null ? `, step ${side.step}` : "";
    const numbers = questionNumbers(side.asked);
    const element = make("div", { class: "side" }, name ? make("h3", {}, name + step) : null);
    const bound = Math.max(1, ...side.captions.map((caption) => Math.abs(caption.advantage ?? 0)));
    const cards = side.captions.map((caption, i) => renderCaption(caption, i, side.asked, numbers, bound));
    element.append(make("div", { class: "captions" }, ...cards));
    if (side.asked.length) element.append(renderMatrix(side, numbers, element));
    return element;
  }

  // Askings of one question, under several shuffles or by several captions, share a number and a row: its place in the image.
  function questionNumbers(asked) {
    const seen = new Map();
    return asked.map(([text, , , , source]) => {
      const key = `${source}:${text}`;
      if (!seen.has(key)) seen.set(key, seen.size);
      return seen.get(key);
    });
  }

  function outcome(question, [, chosen, score, , failure]) {
    const [, , gold, abstain] = question;
    if (failure) return ["failed", "!"];
    if (gold === null) return ["rating", show(score)];
    if (chosen === null) return ["unparsed", "?"];
    if (chosen === gold) return ["right", "✓"];
    return chosen === abstain ? ["abstain", "–"] : ["wrong", "✗"];
  }

  function renderCaption(caption, i, asked, numbers, bound) {
    const advantage = caption.advantage ?? null;
    const parts = Object.entries(caption.parts).map(([name, value]) => `${name} ${show(value)}`).join(", ");
    const header = make("header", {}, make("b", {}, String(i + 1)), make("span", { title: parts }, `${index.earned} ${show(caption.reward)}`),
      advantage === null ? null : make("span", {}, `advantage ${signed(advantage)}`),
      caption.length === null ? null : make("span", {}, `${caption.length} tokens`),
      caption.truncated ? make("span", { class: "cut" }, "cut off") : null);
    const card = make("article", { class: "caption" }, header);
    if (advantage !== null) {
      const width = (50 * Math.abs(advantage)) / bound;
      const bar = make("i", { class: advantage < 0 ? "down" : "up" });
      bar.style.width = `${width}%`;
      bar.style.left = advantage < 0 ? `${50 - width}%` : "50%";
      card.append(make("div", { class: "bar", "aria-hidden": "true" }, bar));
    }
    card.append(make("p", { dir: "auto" }, ...marked(caption, asked, numbers)));
    return card;
  }

  // The caption in pieces, option texts that answered a question marked.
  function marked(caption, asked, numbers) {
    const spans = [];
    for (const answer of caption.answers) {
      const question = asked[answer[0]];
      const kind = outcome(question, answer)[0];
      if (kind !== "right" && kind !== "wrong") continue;
      const found = find(String(question[1][answer[1]] ?? ""), caption.text, question[0]);
      if (found) spans.push({ ...found, kind, number: numbers[answer[0]], text: question[0] });
    }
    spans.sort((a, b) => a.start - b.start || b.stop - a.stop);
    const pieces = [];
    let at = 0;
    for (const { start, stop, kind, number, text } of spans) {
      if (start < at) continue;
      const mark = make("mark", { class: kind, title: text, "data-number": number }, caption.text.slice(start, stop));
      mark.append(make("sup", {}, String(number + 1)));
      pieces.push(caption.text.slice(at, start), mark);
      at = stop;
    }
    return [...pieces, caption.text.slice(at)];
  }

  // Where the words of an option stand in a caption: in the sentence that has most words of the question.
  function find(words, text, question) {
    if (!words.trim()) return null;
    const plain = words.trim().replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/\s+/g, "\\s+");
    const edge = /[\u3040-\u30ff\u3400-\u9fff]/.test(words) ? ["", ""] : ["(?<![\\p{L}\\p{N}])", "(?![\\p{L}\\p{N}])"];
    const asked = new Set(question.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []);
    let best = null;
    for (const match of text.matchAll(new RegExp(edge[0] + plain + edge[1], "giu"))) {
      const start = Math.max(...[".", "!", "?", "\n", "。"].map((end) => text.lastIndexOf(end, match.index - 1))) + 1;
      const rest = text.slice(match.index).search(/[.!?\n。]/);
      const sentence = text.slice(start, rest < 0 ? text.length : match.index + rest);
      const shared = (sentence.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []).filter((word) => asked.has(word)).length;
      if (best === null || shared > best.shared) best = { start: match.index, stop: match.index + match[0].length, shared };
    }
    return best;
  }

  function renderMatrix(side, numbers, element) {
    const rows = [...new Set(numbers)];
    const columns = side.captions.map((_, i) => make("th", { scope: "col" }, String(i + 1)));
    const body = make("tbody");
    for (const number of rows) {
      const text = side.asked[numbers.indexOf(number)][0];
      const cells = side.captions.map((caption, i) => {
        const answers = caption.answers.filter((answer) => numbers[answer[0]] === number);
        return make("td", {}, ...answers.map((answer) => {
          const question = side.asked[answer[0]];
          const [kind, symbol] = outcome(question, answer);
          const said = `caption ${i + 1}: ${kind}${answer[1] === null ? "" : `, ${question[1][answer[1]]}`}`;
          return make("span", { class: `cell ${kind}`, title: said, "aria-label": said, role: "img" }, symbol);
        }));
      });
      const button = make("button", { type: "button", class: "text", "aria-expanded": "false", dir: "auto" }, `${number + 1}  ${text}`);
      const row = make("tr", {}, make("th", { scope: "row" }, button), ...cells);
      const options = make("tr", { class: "options", hidden: "" },
        make("td", { colspan: columns.length + 1 }, ...renderOptions(side, numbers, number)));
      button.addEventListener("click", () => {
        options.hidden = !options.hidden;
        button.setAttribute("aria-expanded", String(!options.hidden));
        element.querySelectorAll("mark").forEach((mark) => {
          if (Number(mark.dataset.number) === number) mark.classList.toggle("active", !options.hidden);
        });
      });
      body.append(row, options);
    }
    const head = make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "question \\ caption"), ...columns));
    return make("table", { class: "matrix" }, head, body);
  }

  // A question as it was asked, once for each order of its options: who chose what, and how sure the verifier was.
  function renderOptions(side, numbers, number) {
    return side.asked.flatMap((question, place) => {
      if (numbers[place] !== number) return [];
      const [, options, gold, abstain] = question;
      const given = side.captions.flatMap((caption, i) =>
        caption.answers.filter((answer) => answer[0] === place).map((answer) => ({ i: i + 1, answer })));
      const lines = options.map((text, option) => {
        const by = given.filter(({ answer }) => answer[1] === option).map(({ i }) => i).join(", ");
        const probs = given.flatMap(({ answer }) => (answer[5].length ? [answer[5][option]] : []));
        const mean = probs.length ? ` · mean probability ${show(probs.reduce((sum, p) => sum + p, 0) / probs.length)}` : "";
        const kind = option === gold ? " ✓" : option === abstain ? " (abstains)" : "";
        return make("li", {}, make("span", { class: option === gold ? "gold" : "" }, `${"ABCDEFGHIJ"[option]}) `,
          make("bdi", {}, text), kind), make("span", { class: "by" }, `${by ? ` · chosen by ${by}` : ""}${mean}`));
      });
      const rest = given.filter(({ answer }) => answer[1] === null || answer[3] || answer[4]).map(({ i, answer }) =>
        make("li", { class: "by" }, `caption ${i}: `, make("bdi", {}, answer[4] || answer[3] || "rated")));
      return [make("ol", {}, ...lines, ...rest)];
    });
  }

  function turn(by) {
    const at = shown.indexOf(page) + by;
    if (at < 0 || at >= shown.length) return;
    page = shown[at];
    render(true);
  }

  function goToStep(step) {
    const number = (one) => Number(one.title.replace("step ", ""));
    let best = shown[0] ?? 0;
    shown.forEach((i) => { if (Math.abs(number(pages[i]) - step) < Math.abs(number(pages[best]) - step)) best = i; });
    page = best;
    render(true);
    byId("captions").scrollIntoView();
    byId("detail").focus({ preventScroll: true });
  }

  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["family", "question", "spread"]) byId(id).addEventListener("input", () => render());
  byId("page").addEventListener("change", () => { page = Number(byId("page").value); render(true); });
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("captions").addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
    event.preventDefault();
    if (event.shiftKey) turn(move);
    else if (groups[group + move] !== undefined) choose(group + move);
  });
  document.querySelectorAll(".ask").forEach((button) => button.addEventListener("click", () => {
    byId("question").value = button.textContent;
    render();
    byId("captions").scrollIntoView();
    byId("detail").focus({ preventScroll: true });
  }));
  page = pages.length - 1; // of a run: what the policy writes now
  if (!pages[0].title.startsWith("step ")) page = 0;
  render();
})();
