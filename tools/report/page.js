"use strict";
// What moves on the report page. `state` says what is looked at. It is read from the address and
// written to it, so that the address is a link. `render` draws the page as `state` says.
(() => {
  const byId = (id) => document.getElementById(id);
  const parsed = (id) => JSON.parse(byId(id).textContent);
  const isNumber = (value) => value !== null && value !== undefined;
  const show = (value, digits = 2) => (isNumber(value) ? value.toFixed(digits) : "–");
  const signed = (value) => (value > 0 ? "+" : "") + show(value);

  // An element with attributes and children. Texts are set as texts: nothing that a model wrote is
  // read as markup.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "click") element.addEventListener("click", value);
      else if (isNumber(value)) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // ------------------------------------------------------------------------------------- state

  const NOTHING = {
    step: "", image: "", question: "", search: "", family: "", sort: "", spread: "0", cut: "",
    flat: "", wrong: "", abstained: "", all: "", whole: "", smooth: "0", hours: "",
  };
  const PLACE = ["step", "image", "question", "search"]; // an address with one of these opens there
  const state = { ...NOTHING };
  const controls = [...document.querySelectorAll("[name]:not(meta)")]; // each named as its state is

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(NOTHING)) state[name] = given.get(name) ?? NOTHING[name];
    for (const { name, options } of controls) { // what this page does not have to choose from
      const isKnown = !options || [...options].some((option) => option.value === state[name]);
      if (!isKnown && name !== "step") state[name] = NOTHING[name];
    }
    return PLACE.some((name) => state[name]);
  }

  function writeAddress() {
    const told = Object.entries(state).filter(([name, value]) => value !== NOTHING[name]);
    history.replaceState(null, "", `#${new URLSearchParams(told)}`);
  }

  let writing = 0;
  function go(changes) {
    Object.assign(state, changes);
    clearTimeout(writing); // a browser refuses many in a second, as of a key that is held down
    writing = setTimeout(writeAddress, 100);
    return render();
  }

  controls.forEach((control) => control.addEventListener("input", () => {
    const value = control.type === "checkbox" ? (control.checked ? "yes" : "") : control.value;
    const leaves = control.name === "step" ? { image: "", question: "", all: "" } : {};
    go({ [control.name]: value, ...leaves });
  }));
  document.querySelectorAll("form:not([method])").forEach((form) =>
    form.addEventListener("submit", (event) => event.preventDefault()));

  // ------------------------------------------------------------------------------------ curves

  const { panels, hours, left, right } = parsed("curves-data");
  const figures = [...document.querySelectorAll(".curve")];
  byId("more-curves")?.addEventListener("toggle", drawCurves);

  // Where a step of a run lies: by steps as it was drawn, or by hours.
  function along(panel, source, step) {
    const [first, last] = [panel.steps[0], panel.steps.at(-1)];
    if (!state.hours) return left + ((right - left) * (step - first)) / Math.max(last - first, 1);
    const [from, to] = panel.hours;
    return left + ((right - left) * (hoursAt(source, step) - from)) / (to - from || 1);
  }

  function hoursAt(source, step) {
    const [before, after] = [Math.floor(step), Math.ceil(step)].map(
      (at) => hours[source][Math.min(at, hours[source].length - 1)]);
    return before + (after - before) * (step % 1);
  }

  const asDrawn = new WeakMap(); // the points of a shape as the file has them: by steps
  function drawCurves() {
    const wanted = `${state.smooth} ${state.hours}`;
    const weight = Number(state.smooth);
    if (byId("smooth-value")) byId("smooth-value").textContent = weight ? show(weight) : "none";
    for (const figure of figures) {
      // Those that are folded away are drawn when they are unfolded.
      if (figure.dataset.drawn === wanted || !figure.checkVisibility()) continue;
      figure.dataset.drawn = wanted;
      const panel = panels[figure.dataset.place];
      const span = Math.max(panel.steps.at(-1) - panel.steps[0], 1);
      const move = (source, x) => (state.hours
        ? along(panel, source, panel.steps[0] + ((x - left) * span) / (right - left)) : x);
      for (const name of ["steps", "hours"]) {
        const isShown = (name === "hours") === Boolean(state.hours);
        figure.querySelector(`.axis.${name}`).toggleAttribute("hidden", !isShown);
      }
      figure.querySelectorAll(".smoothed").forEach((line) => line.remove());
      for (const shape of figure.querySelectorAll(":scope > svg :is(polyline, polygon, circle)")) {
        const { source } = shape.closest("[data-source]").dataset;
        const name = shape.tagName === "circle" ? "cx" : "points";
        if (!asDrawn.has(shape)) {
          asDrawn.set(shape, shape.getAttribute(name).split(" ")
            .map((point) => point.split(",").map(Number)));
        }
        const points = asDrawn.get(shape).map(([x, ...y]) => [move(source, x), ...y]);
        shape.setAttribute(name, points.join(" "));
        if (shape.tagName !== "polyline") continue;
        shape.classList.toggle("measured", weight > 0);
        if (weight) shape.after(smoothed(shape, points, weight));
      }
    }
  }

  // The mean of the points so far, each one's weight `weight` times that of the next: Adam's
  // first moment, its bias taken away.
  function smoothed(line, points, weight) {
    const copy = line.cloneNode();
    let [sum, mass] = [0, 0];
    const means = points.map(([x, y]) => {
      sum = weight * sum + (1 - weight) * y;
      mass = weight * mass + (1 - weight);
      return `${x},${Math.round(100 * (sum / mass)) / 100}`;
    });
    copy.setAttribute("class", "smoothed");
    copy.setAttribute("points", means.join(" "));
    return copy;
  }

  for (const figure of figures) {
    const panel = panels[figure.dataset.place];
    const { steps, lines } = panel;
    const svg = figure.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const values = figure.querySelectorAll(".value");
    let place = null; // among the steps

    const sourceAt = (at) => (lines.find((line) => isNumber(line.values[at])) ?? lines[0]).source;
    const closest = (x, source, places) => places.reduce((best, i) => {
      const distance = (at) => Math.abs(along(panel, source ?? sourceAt(at), steps[at]) - x);
      return best === null || distance(i) < distance(best) ? i : best;
    }, null);

    function point(at) {
      place = at;
      cursor.style.visibility = at === null ? "hidden" : "visible";
      const x = at === null ? 0 : along(panel, sourceAt(at), steps[at]);
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
      const time = () => (state.hours ? `, ${show(hoursAt(sourceAt(at), steps[at]))} h` : "");
      figure.querySelector(".at").textContent = at === null ? "" : `step ${steps[at]}${time()}`;
      lines.forEach((line, i) => {
        const measured = steps.flatMap((_, j) => (isNumber(line.values[j]) ? [j] : []));
        // By hours two runs are at different steps at one time.
        const there = state.hours && at !== null ? closest(x, line.source, measured) : at;
        const value = there === null ? null : line.values[there];
        values[i].textContent = isNumber(value) ? String(value) : "";
      });
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      return closest(x, null, steps.map((_, i) => i));
    }

    svg.addEventListener("pointermove", (event) => point(nearest(event)));
    svg.addEventListener("pointerleave", () => point(null));
    svg.addEventListener("blur", () => point(null));
    svg.addEventListener("click", (event) => goToStep(steps[nearest(event)]));
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const end = steps.length - 1;
      if (move && place === null) point(move > 0 ? 0 : end);
      else if (move) point(Math.min(Math.max(place + move, 0), end));
      else if (event.key === "Home") point(0);
      else if (event.key === "End") point(end);
      else if (event.key === "Enter" && place !== null) goToStep(steps[place]);
      else return;
      event.preventDefault();
    });
  }

  // --------------------------------------------------------------------------- groups and filters

  const index = parsed("index-data");
  const numPages = index.pages.length;
  const isRun = numPages > 0 && index.pages[0].step !== null;
  const lowered = index.questions.map((text) => text.toLowerCase());
  const WINDOW = 60; // groups in the strip at a time
  const known = (items, key) => items.map((item) => item[key]).filter(isNumber);
  const mean = (values) =>
    (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

  // A group is an image with its captions of each side; `texts` are there once a search wants them.
  const groups = index.pages.flatMap(({ step, groups: entries }, page) =>
    entries.map((entry, place) => {
      const sides = entry.sides.map((side) => side && side.captions.map(
        ([reward, advantage, length, cut, outcomes], i) =>
          ({ number: i + 1, reward, advantage, length, cut, outcomes: outcomes.split(" ") })));
      const rewards = sides.map((side) => known(side ?? [], "reward"));
      const means = rewards.map(mean);
      const spreads = rewards.map((values) => Math.max(...values) - Math.min(...values));
      sides.forEach((side, s) => side?.forEach((caption) => {
        const { reward } = caption;
        caption.disagreement = isNumber(reward) ? Math.abs(reward - means[s]) : null;
      }));
      return {
        ...entry, page, place, step, sides, means, texts: null,
        sideSteps: entry.sides.map((side) => side && side.step),
        spread: Math.max(0, ...spreads),
        isFlat: spreads.some((spread, s) => spread === 0 && rewards[s].length > 1),
        difference: means[1] !== undefined && means.every(isNumber)
          ? Math.abs(means[1] - means[0]) : null,
      };
    }));

  async function unpack(page) {
    const packed = atob(byId(`page-${page}`).textContent);
    const bytes = new Uint8Array(packed.length); // a loop: Uint8Array.from takes ten times as long
    for (let i = 0; i < bytes.length; i += 1) bytes[i] = packed.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")))
      .json();
  }

  const unpacked = new Map();
  function packedSides(group) {
    if (unpacked.size > 20) unpacked.clear();
    if (!unpacked.has(group.page)) unpacked.set(group.page, unpack(group.page));
    return unpacked.get(group.page).then((page) => page[group.place]);
  }

  let reading = null;
  async function readTexts() {
    for (let page = 0; page < numPages; page += 1) {
      if (page % 10 === 0) byId("count").textContent = `reading captions: ${page} of ${numPages}`;
      const sides = await unpack(page);
      for (const group of groups.filter((entry) => entry.page === page)) {
        group.texts = sides[group.place].map((side) =>
          side && side.captions.map((caption) => caption.text.toLowerCase()));
      }
    }
  }

  // Which captions of each side pass; null where none does.
  function passing(group, words) {
    if (state.family && group.family !== state.family) return null;
    if (group.spread < Number(state.spread) - 1e-9 || (state.flat && !group.isFlat)) return null;
    const named = group.questions.map((text) => Boolean(words) && lowered[text].includes(words));
    const isNamed = named.some(Boolean);
    const isWhole = !words || isNamed || group.id.toLowerCase().includes(words);
    const passes = group.sides.map((side, s) => (side ?? []).map((caption, i) => {
      const has = (letter) => caption.outcomes.some(
        (outcome, number) => outcome.includes(letter) && (!isNamed || named[number]));
      return (!state.cut || caption.cut === 1) && (!state.wrong || has("w"))
        && (!state.abstained || has("a")) && (isWhole || group.texts[s][i].includes(words));
    }));
    return passes.flat().some(Boolean) ? passes : null;
  }

  const FILTERS = ["search", "family", "spread", "cut", "flat", "wrong", "abstained"];
  let filtered = ""; // what the groups were filtered by last
  function filter() {
    const wanted = JSON.stringify(FILTERS.map((name) => state[name]));
    if (wanted === filtered) return;
    filtered = wanted;
    const words = state.search.trim().toLowerCase();
    for (const group of groups) group.passes = passing(group, words);
  }

  // The items by a value, as `state.sort` says; those without it come last, equal ones stay.
  function sorted(items, valueOf) {
    const [key, way] = state.sort.replace("accuracy", "reward").split("-");
    if (!way) return items;
    const sign = way === "high" ? -1 : 1;
    const value = new Map(
      items.map((item) => [item, valueOf(item, key, way) ?? sign * Infinity]));
    return [...items].sort((a, b) => sign * (value.get(a) - value.get(b)) || 0);
  }

  function groupValue(group, key, way) {
    if (key === "disagreement") return group.spread;
    if (key === "difference") return group.difference;
    const values = known(group.sides.flatMap((side) => side ?? []), key);
    return way === "high" ? Math.max(...values) : Math.min(...values);
  }

  // What there is to look at: the groups that pass, those listed in the strip, and the one chosen.
  function view() {
    const passed = groups.filter((group) => group.passes);
    const steps = [...new Set(passed.map((group) => group.step))];
    const isList = !isRun || Boolean(state.all);
    const wanted = state.step === "" ? Infinity : Number(state.step);
    const step = isRun ? nearestStep(steps, wanted) : null;
    const list = listed(passed, isList ? null : step);
    const named = list.filter((group) => group.id === state.image);
    const chosen = named.find((group) => group.step === step) ?? named[0] ?? list[0] ?? null;
    return { passed, steps, isList, list, chosen, step: chosen && chosen.step };
  }

  const listed = (passed, step) =>
    sorted(step === null ? passed : passed.filter((group) => group.step === step), groupValue);
  const nearestStep = (steps, wanted) => steps.reduce((best, step) =>
    (best === null || Math.abs(step - wanted) <= Math.abs(best - wanted) ? step : best), null);

  // ------------------------------------------------------------------------------------ drawing

  let current = null; // the view that is drawn, or about to be
  let turn = 0;
  async function render() {
    turn += 1;
    const mine = turn;
    for (const control of controls) {
      if (control.type === "checkbox") control.checked = state[control.name] === "yes";
      else if (control.value !== state[control.name]) control.value = state[control.name];
    }
    drawCurves();
    if (!numPages) return;
    if (state.search.trim()) {
      reading ??= readTexts();
      await reading;
      if (mine !== turn) return; // something else was asked for meanwhile
    }
    filter();
    current = view(); // now: the next key goes on from here
    const sides = current.chosen && await packedSides(current.chosen);
    if (mine !== turn) return;
    const focused = document.activeElement?.dataset.key;
    drawPager();
    drawStrip();
    drawDetail(sides);
    if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus({ preventScroll: true });
    markSearch();
    byId("captions").dataset.drawn = mine; // for a test to wait for
  }

  function drawPager() {
    const { passed, steps, isList, list, chosen, step } = current;
    byId("spread-value").textContent = show(Number(state.spread));
    const captions = passed.flatMap((group) => group.passes.flat()).filter(Boolean).length;
    byId("count").textContent = `${passed.length} of ${groups.length} groups, ${captions} captions`;
    const place = list.indexOf(chosen);
    const [start, end] = span(place);
    if (isRun) {
      const select = document.querySelector("[name=step]");
      const [some, every] = [tally(passed), tally(groups)];
      select.replaceChildren(...steps.map((value) => make("option", { value },
        `step ${value}${some.get(value) < every.get(value) ? ` (${some.get(value)})` : ""}`)));
      select.value = step ?? "";
    }
    byId("previous").disabled = isList ? start === 0 : !list.length || step === steps[0];
    byId("next").disabled = isList ? end >= list.length : !list.length || step === steps.at(-1);
    const isOther = chosen && ((state.image && chosen.id !== state.image)
      || (state.step && !isList && state.step !== String(step)));
    byId("position").textContent = chosen ? `image ${place + 1} of ${list.length}`
      + (isOther ? ", the nearest to what was asked for" : "") : "";
  }

  const tally = (list) => list.reduce(
    (counts, { step }) => counts.set(step, (counts.get(step) ?? 0) + 1), new Map());

  // Which part of the list the strip shows.
  function span(place) {
    const start = Math.floor(Math.max(place, 0) / WINDOW) * WINDOW;
    return [start, start + WINDOW];
  }

  function drawStrip() {
    const strip = byId("strip");
    const { list, chosen } = current;
    strip.replaceChildren(...list.slice(...span(list.indexOf(chosen))).map((group, i) =>
      make("button", {
        type: "button", title: group.id, "aria-pressed": String(group === chosen),
        "data-key": `strip-${i}`, click: () => choose(group),
      }, picture(group), make("span", { dir: "auto" }, group.id),
      make("span", {}, `mean ${group.means.map((mean) => show(mean)).join(" | ")}`),
      make("span", {}, `spread ${show(group.spread)}`),
      current.isList && isRun ? make("span", {}, `step ${group.step}`) : null)));
    const button = strip.querySelector("[aria-pressed=true]");
    // Within the strip only: scrollIntoView would move the page too.
    const middle = (element) => element.offsetLeft + element.offsetWidth / 2;
    if (button) strip.scrollLeft = middle(button) - middle(strip);
  }

  function picture(group) {
    if (group.picture === null) return make("div", { class: "blank" });
    const source = byId(`picture-${group.picture}`).textContent;
    return make("img", { src: source, alt: `image ${group.id}` });
  }

  function drawDetail(packed) {
    const group = current.chosen;
    if (!group) {
      byId("detail").replaceChildren(make("p", {}, "No group passes the filters."));
      return;
    }
    const facts = make("dl", { class: "facts" });
    const rows = [["image", group.id], ["family", group.family],
      [`${index.earned} spread`, show(group.spread)]];
    if (isRun) rows.push(["step", String(group.step)]);
    index.names.slice(0, group.sides.length).forEach((name, s) => {
      const mean = `mean ${index.earned}`;
      rows.push([group.sides.length > 1 ? `${mean}, ${name}` : mean, show(group.means[s], 3)]);
    });
    rows.forEach(([name, value]) =>
      facts.append(make("dt", {}, name), make("dd", { dir: "auto" }, value)));
    const large = group.picture === null ? null : make("button", {
      type: "button", class: "picture", title: "large", "data-key": "picture",
      click: () => openPicture(),
    }, picture(group));
    const sides = packed.map((side, s) => drawSide(group, side, s));
    byId("detail").replaceChildren(make("div", { class: "head" }, large, facts),
      make("div", { class: sides.length > 1 ? "sides" : "sides single" }, ...sides));
    byId("detail").classList.toggle("whole", Boolean(state.whole));
  }

  function drawSide(group, packed, s) {
    const isTwo = group.sides.length > 1;
    const element = make("div", { class: "side" });
    const step = packed && group.sideSteps[s] !== null ? `, step ${group.sideSteps[s]}` : "";
    if (isTwo) element.append(make("h3", {}, index.names[s] + step));
    if (!packed) {
      element.append(make("p", {}, "no captions of this image"));
      return element;
    }
    const given = group.sides[s].map((caption, i) =>
      ({ ...caption, ...packed.captions[i], passes: group.passes[s][i] }));
    const captions = sorted(given, (caption, key) => caption[key]);
    const bound = Math.max(1, ...captions.map((caption) => Math.abs(caption.advantage ?? 0)));
    const isPart = group.passes.flat().includes(false);
    const cards = captions.map((caption) => drawCaption(caption, packed.asked, bound, isPart));
    if (packed.asked.length) element.append(drawMatrix(captions, packed.asked));
    element.append(make("div", { class: "captions" }, ...cards));
    return element;
  }

  const OUTCOMES = {
    r: ["right", "✓"], w: ["wrong", "✗"], a: ["abstain", "–"], u: ["unparsed", "?"],
    f: ["failed", "!"], s: ["rating", ""],
  };
  const isActive = (number) => state.question === String(number + 1);

  // The verifier's answer to a question: its sign, and what it chose, in words.
  function drawAnswer(caption, { place, chosen, score, outcome }, asked) {
    const [kind, sign] = OUTCOMES[outcome];
    const option = isNumber(chosen) ? asked[place].options[chosen] ?? "" : "";
    const said = `caption ${caption.number}: ${kind}${option === "" ? "" : `, ${option}`}`;
    return [make("span", { class: `cell ${kind}`, title: said, "aria-label": said, role: "img" },
      sign || show(score)), option];
  }

  function drawCaption(caption, asked, bound, isPart) {
    const { advantage, length } = caption;
    const parts = Object.entries(caption.parts).map(([name, value]) => `${name} ${show(value)}`);
    const card = make("article", { class: "caption" }, make("header", {},
      make("b", {}, String(caption.number)),
      make("span", { title: parts.join(", ") }, `${index.earned} ${show(caption.reward)}`),
      isNumber(advantage) ? make("span", {}, `advantage ${signed(advantage)}`) : null,
      isNumber(length) ? make("span", {}, `${length} tokens`) : null,
      caption.cut ? make("span", { class: "cut" }, "cut off") : null,
      isPart && caption.passes ? make("span", { class: "passes" }, "passes the filters") : null));
    if (isNumber(advantage)) {
      const width = (50 * Math.abs(advantage)) / bound;
      const bar = make("i", { class: advantage < 0 ? "down" : "up" });
      bar.style.width = `${width}%`;
      bar.style.left = advantage < 0 ? `${50 - width}%` : "50%";
      card.append(make("div", { class: "bar", "aria-hidden": "true" }, bar));
    }
    for (const answer of caption.answers.filter(({ place }) => isActive(asked[place].number))) {
      const [sign, option] = drawAnswer(caption, answer, asked);
      const words = option || answer.failure || answer.reply || "no words";
      card.append(make("div", { class: "answer" }, sign, " ", make("bdi", {}, words)));
    }
    card.append(make("p", { dir: "auto" }, ...marked(caption, asked)));
    if (caption.claims) {
      card.append(make("ul", { class: "claims" }, ...caption.claims.map(drawClaim)));
    }
    return card;
  }

  // A claim and how likely the checker holds it: as a right answer from 0.5, as a wrong one below.
  function drawClaim({ claim, score, failure }) {
    const kind = !isNumber(score) ? "failed" : score < 0.5 ? "wrong" : "right";
    const said = { right: "likely true", wrong: "likely not true", failed: failure }[kind];
    return make("li", {}, make("span", { class: `cell ${kind}`, title: said }, show(score)), " ",
      make("bdi", {}, claim));
  }

  // The caption in pieces, option texts that answered a question marked; where two overlap, that
  // of the question that is looked at.
  function marked(caption, asked) {
    const spans = [];
    for (const { place, chosen, outcome } of caption.answers) {
      if (outcome !== "r" && outcome !== "w") continue;
      const { number, question, options } = asked[place];
      const words = wordsOf(String(options[chosen] ?? ""), caption.text, question);
      if (words) spans.push({ ...words, outcome, number, question });
    }
    spans.sort((a, b) => isActive(b.number) - isActive(a.number) || a.start - b.start
      || b.stop - a.stop);
    const kept = [];
    for (const span of spans) {
      const isFree = kept.every(({ start, stop }) => span.stop <= start || span.start >= stop);
      if (isFree) kept.push(span);
    }
    const pieces = [];
    let end = 0;
    for (const { start, stop, ...span } of kept.sort((a, b) => a.start - b.start)) {
      const kind = OUTCOMES[span.outcome][0] + (isActive(span.number) ? " active" : "");
      pieces.push(caption.text.slice(end, start),
        make("mark", { class: kind, title: span.question, "data-number": span.number },
          caption.text.slice(start, stop), make("sup", {}, String(span.number + 1))));
      end = stop;
    }
    return [...pieces, caption.text.slice(end)];
  }

  const literal = (words) => words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

  // Where the words of an option stand in a caption: in the sentence that has most words of the
  // question.
  function wordsOf(option, text, question) {
    if (!option.trim()) return null;
    const isSpaced = !/[\u3040-\u30ff\u3400-\u9fff]/.test(option);
    const edges = isSpaced ? ["(?<![\\p{L}\\p{N}])", "(?![\\p{L}\\p{N}])"] : ["", ""];
    const plain = literal(option.trim()).replace(/\s+/g, "\\s+");
    const split = (words) => words.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
    const asked = new Set(split(question));
    let best = null;
    for (const match of text.matchAll(new RegExp(edges[0] + plain + edges[1], "giu"))) {
      const [start, stop] = [match.index, match.index + match[0].length];
      const ends = [".", "!", "?", "\n", "。"].map((end) => text.lastIndexOf(end, start - 1));
      const rest = text.slice(start).search(/[.!?\n。]/);
      const sentence = text.slice(Math.max(...ends) + 1, rest < 0 ? text.length : start + rest);
      const shared = split(sentence).filter((word) => asked.has(word)).length;
      if (best === null || shared > best.shared) best = { start, stop, shared };
    }
    return best;
  }

  function drawMatrix(captions, asked) {
    const columns = captions.map(({ number }) => make("th", { scope: "col" }, String(number)));
    const body = make("tbody");
    for (const [number, question] of new Map(asked.map((item) => [item.number, item.question]))) {
      const cells = captions.map((caption) => make("td", {}, ...caption.answers
        .filter(({ place }) => asked[place].number === number)
        .map((answer) => drawAnswer(caption, answer, asked)[0])));
      const button = make("button", {
        type: "button", class: "text", "aria-expanded": String(isActive(number)), dir: "auto",
        "data-key": `question-${number}`, click: () => ask(isActive(number) ? null : number),
      }, `${number + 1}  ${question}`);
      body.append(make("tr", {}, make("th", { scope: "row" }, button), ...cells));
      if (isActive(number)) {
        body.append(make("tr", { class: "options" },
          make("td", { colspan: columns.length + 1 }, ...drawOptions(captions, asked, number))));
      }
    }
    const head = make("tr", {}, make("th", { scope: "col" }, "question \\ caption"), ...columns);
    return make("div", { class: "questions" },
      make("table", { class: "matrix" }, make("thead", {}, head), body));
  }

  // A question as it was asked, once for each order of its options: who chose what, and how sure
  // the verifier was.
  function drawOptions(captions, asked, number) {
    return asked.flatMap(({ number: of, options, gold, abstain }, place) => {
      if (of !== number) return [];
      const given = captions.flatMap((caption) => caption.answers
        .filter((answer) => answer.place === place)
        .map((answer) => ({ ...answer, by: caption.number })));
      const lines = options.map((text, option) => {
        const by = known(given.filter(({ chosen }) => chosen === option), "by").join(", ");
        const probs = known(given.map((answer) => answer.probs), option);
        const sure = probs.length ? ` · mean probability ${show(mean(probs))}` : "";
        const kind = option === gold ? " ✓" : option === abstain ? " (abstains)" : "";
        return make("li", {},
          make("span", { class: option === gold ? "gold" : "" },
            `${String.fromCharCode(65 + option)}) `, make("bdi", {}, text), kind),
          make("span", { class: "by" }, `${by ? ` · chosen by ${by}` : ""}${sure}`));
      });
      const rest = given
        .filter(({ chosen, reply, failure }) => !isNumber(chosen) || reply || failure)
        .map(({ by, reply, failure }) => make("li", { class: "by" }, `caption ${by}: `,
          make("bdi", {}, failure || reply || "no words")));
      return [make("ol", {}, ...lines, ...rest)];
    });
  }

  // What the search found, marked over the captions without changing them.
  function markSearch() {
    if (!CSS.highlights) return;
    CSS.highlights.delete("search");
    const words = state.search.trim();
    if (!words) return;
    const ranges = [];
    for (const text of document.querySelectorAll(".caption p, .matrix button, #detail dd")) {
      const before = ranges.length;
      const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const node = walker.currentNode;
        if (node.parentNode.tagName === "SUP") continue;
        for (const match of node.data.matchAll(new RegExp(literal(words), "giu"))) {
          const range = new Range();
          range.setStart(node, match.index);
          range.setEnd(node, match.index + match[0].length);
          ranges.push(range);
        }
      }
      const isFree = text.tagName === "P" && !state.question;
      if (isFree && ranges.length > before) scrollWithin(text, ranges[before]);
    }
    CSS.highlights.set("search", new Highlight(...ranges));
  }

  function scrollWithin(text, words) {
    const top = words.getBoundingClientRect().top - text.getBoundingClientRect().top;
    text.scrollTop += top - text.clientHeight / 3;
  }

  // ---------------------------------------------------------------------------- moving about

  const choose = (group) => go({ step: isRun ? String(group.step) : "", image: group.id,
    question: "" });

  // Opens a question, or none, and brings its words into sight: within each long caption, and then
  // the first of them on the page.
  async function ask(number) {
    await go({ ...here(), question: number === null ? "" : String(number + 1) });
    showWords();
  }

  const here = () => (current.chosen
    ? { step: isRun ? String(current.chosen.step) : "", image: current.chosen.id } : {});

  function showWords() {
    const marks = [...document.querySelectorAll("mark.active")];
    for (const mark of [...marks].reverse()) scrollWithin(mark.closest("p"), mark);
    (marks[0] ?? document.querySelector(".answer"))?.scrollIntoView({ block: "nearest" });
  }

  function turnImage(by) {
    const next = current.list[current.list.indexOf(current.chosen) + by];
    if (next) choose(next);
  }

  // Another step, the same place in it; of a list over all steps, the next part of the list.
  function turnPage(by) {
    const { passed, steps, isList, list, chosen, step } = current;
    if (!chosen) return;
    const i = list.indexOf(chosen);
    if (isList) {
      const next = list[span(i)[0] + by * WINDOW];
      if (next) choose(next);
      return;
    }
    const other = steps[steps.indexOf(step) + by];
    if (other === undefined) return;
    const there = listed(passed, other);
    choose(there[Math.min(i, there.length - 1)]);
  }

  function toCaptions() {
    byId("captions").scrollIntoView({ behavior: "instant" }); // what follows may scroll on
    byId("detail").focus({ preventScroll: true });
  }

  async function goToStep(step) {
    if (!numPages) return;
    await go({ step: String(step), image: "", question: "", all: "" });
    toCaptions();
  }

  function turnQuestion(by) {
    const numbers = current.chosen ? current.chosen.questions.map((_, number) => number) : [];
    const next = numbers.indexOf(Number(state.question) - 1) + by;
    if (numbers.length) ask(numbers[(next + numbers.length) % numbers.length]);
  }

  const KEYS = {
    ArrowLeft: (shift) => (shift ? turnPage(-1) : turnImage(-1)),
    ArrowRight: (shift) => (shift ? turnPage(1) : turnImage(1)),
    q: (shift) => turnQuestion(shift ? -1 : 1),
    z: () => openPicture(),
    "/": () => document.querySelector("[name=search]").focus(),
    Escape: () => state.question && ask(null),
  };

  function onKey(event) {
    const isTyping = ["INPUT", "SELECT"].includes(event.target.tagName)
      && event.target.type !== "checkbox";
    const act = KEYS[event.key.length > 1 ? event.key : event.key.toLowerCase()];
    if (!act || isTyping || event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey
      || !current || byId("zoom").open) return;
    event.preventDefault();
    act(event.shiftKey);
  }

  // ------------------------------------------------------------------------- the picture, large

  const zoom = byId("zoom");
  const image = make("img", { click: () => zoomTo(size === null ? 1 : null) });
  zoom.querySelector(".frame").append(image);
  let size = null; // times the picture's own pixels, null: as the window has room for

  function openPicture() {
    const group = current.chosen;
    if (!group || group.picture === null) return;
    const full = index.full.indexOf(group.id);
    image.alt = `image ${group.id}`;
    image.onload = () => zoomTo(null);
    image.src = byId(full < 0 ? `picture-${group.picture}` : `full-${full}`).textContent;
    image.dataset.kept = full < 0 ? "a small copy; --full-mb keeps whole ones" : "full size";
    zoom.showModal();
  }

  function zoomTo(next) {
    const room = image.parentElement;
    const fit = Math.min(room.clientWidth / image.naturalWidth,
      room.clientHeight / image.naturalHeight);
    size = next === null ? null : Math.min(Math.max(next, 0.1), 16);
    image.style.width = `${Math.round(image.naturalWidth * (size ?? fit))}px`;
    const pixels = `${image.naturalWidth} × ${image.naturalHeight} pixels`;
    const percent = Math.round(100 * (size ?? fit));
    zoom.querySelector("output").textContent = `${percent} % of ${pixels}, ${image.dataset.kept}`;
    return size ?? fit;
  }

  const times = (factor) => zoomTo((size ?? zoomTo(null)) * factor);
  zoom.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
    if (button.dataset.zoom === "fit") zoomTo(null);
    else times(button.dataset.zoom === "in" ? 1.5 : 1 / 1.5);
  }));
  zoom.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") times(1.5);
    if (event.key === "-") times(1 / 1.5);
  });

  // ----------------------------------------------------------------------- copies and downloads

  // Rows as the run's own files have them, of one image or of all captions that pass.
  async function takenRows() {
    const isImage = byId("what").value === "image";
    const rows = [];
    for (const group of isImage ? [current.chosen].filter(Boolean) : current.passed) {
      const packed = await packedSides(group);
      group.sides.forEach((side, s) => side?.forEach((caption, i) => {
        if (!isImage && !group.passes[s][i]) return;
        const { text, parts, answers, claims } = packed[s].captions[i];
        rows.push({
          captioner: index.names[s], step: group.sideSteps[s], id: group.id, family: group.family,
          number: caption.number, caption: text, length: caption.length,
          truncated: caption.cut === 1, [index.earned]: caption.reward,
          advantage: caption.advantage, parts,
          ...(claims && { claims }),
          questions: answers.map(({ place, outcome, ...answer }) => {
            const { number, ...question } = packed[s].asked[place];
            const correct = "rwau".includes(outcome) ? outcome === "r" : null;
            return { ...question, ...answer, correct };
          }),
        });
      }));
    }
    return rows;
  }

  function csv(rows) {
    const names = ["captioner", "step", "id", "family", "number", index.earned, "advantage",
      "length", "truncated", "right", "asked", "caption"];
    const cell = (value) => {
      const text = isNumber(value) ? String(value) : "";
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = rows.map((row) => {
      const asked = row.questions.filter((question) => question.correct !== null);
      const right = asked.filter((question) => question.correct).length;
      return names.map((name) => cell({ ...row, right, asked: asked.length }[name]));
    });
    return [names, ...lines].map((line) => `${line.join(",")}\r\n`).join("");
  }

  async function take(give) {
    const format = byId("format").value;
    const rows = await takenRows();
    const text = format === "CSV" ? csv(rows)
      : rows.map((row) => `${JSON.stringify(row)}\n`).join("");
    byId("taken").textContent = await give(text, `captions.${format.toLowerCase()}`)
      ?? `${rows.length} captions`;
  }

  async function toClipboard(text) {
    try {
      return await navigator.clipboard.writeText(text) ?? null;
    } catch {
      return "this browser does not let the page copy";
    }
  }

  function toFile(text, name) {
    const address = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    make("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  }

  // --------------------------------------------------------------------------------- beginning

  if (numPages) {
    const families = [...new Set(groups.map((group) => group.family))].sort();
    document.querySelector("[name=family]").append(
      ...families.map((family) => make("option", { value: family }, family)));
    const largest = Math.max(...groups.map((group) => group.spread));
    document.querySelector("[name=spread]").max = Math.max(0.05, Math.ceil(largest * 20) / 20);
    byId("previous").addEventListener("click", () => turnPage(-1));
    byId("next").addEventListener("click", () => turnPage(1));
    byId("copy").addEventListener("click", () => take(toClipboard));
    byId("download").addEventListener("click", () => take(toFile));
    byId("link").addEventListener("click", async () => {
      await go(here());
      writeAddress();
      byId("taken").textContent = await toClipboard(location.href) ?? "the link is copied";
    });
    document.addEventListener("keydown", onKey);
    document.querySelectorAll(".ask").forEach((button) => button.addEventListener("click", () =>
      go({ search: button.textContent, image: "", question: "" }).then(toCaptions)));
  }

  // An address that was opened, typed or gone back to. One without "=" names a section only.
  async function open(event) {
    if (location.hash && !location.hash.includes("=")) {
      if (event) return; // the browser moves there
      await render(); // only now the page is as long as it will be
      byId(location.hash.slice(1))?.scrollIntoView({ behavior: "instant" });
      return;
    }
    const isPlace = readAddress();
    await render();
    if (isPlace && numPages) toCaptions();
    if (state.question) showWords();
  }
  window.addEventListener("hashchange", open);
  open();
})();
