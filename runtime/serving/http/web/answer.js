// One message of the conversation; an answer also has its trace: a bar for every token, as high as the layers it ran in.

import { layersInWords, shade } from "./settings.js";

// More bars than this stand side by side without gaps.
const MANY = 150;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Returns a list item with a heading and a text. */
export function message(who, text = "") {
  const item = element("li", "message");
  const content = element("p", "text", text);
  content.dir = "auto";
  item.append(element("h3", "", who), content);
  return item;
}

/** An answer that grows token by token. Its text is only ever inserted as text. */
export class Answer {
  text = "";
  #tokens = [];
  #picked = -1;
  #began = performance.now();
  #first = 0;
  #atFirst = 0;
  #last = 0;
  #counted = 0;
  #depths = { count: 0, sum: 0, least: Infinity, most: -Infinity };

  /** `name` is the heading, `total` the number of the model's layers or undefined, `id` a number for labels. */
  constructor(name, total, id) {
    this.total = total;
    this.item = message(name);
    this.item.classList.add("answer");
    this.paragraph = this.item.querySelector(".text");
    this.item.setAttribute("aria-busy", "true");
    this.trace = element("div", "trace");
    this.trace.hidden = true;
    // What the bars show, the slider below them tells, too.
    const chart = element("div", "chart");
    chart.setAttribute("aria-hidden", "true");
    chart.hidden = !total;
    const scale = element("div", "scale soft");
    scale.append(element("span", "", String(total)), element("span", "", "0"));
    this.bars = element("div", "bars");
    chart.append(scale, this.bars);
    this.slider = element("input");
    Object.assign(this.slider, { type: "range", min: "1", max: "1", value: "1", id: `token-${id}` });
    const label = element("label", "", "Token");
    label.append(element("span", "unseen", ` of answer ${id}`));
    label.htmlFor = this.slider.id;
    const row = element("div", "row");
    this.readout = element("span", "readout");
    row.append(label, this.slider, this.readout);
    this.trace.append(chart, row);
    this.summary = element("p", "summary soft");
    this.item.append(this.trace, this.summary);
    this.slider.addEventListener("input", () => this.#pick(Number(this.slider.value) - 1));
    for (const part of [this.paragraph, this.bars]) {
      for (const kind of ["pointerover", "click"]) part.addEventListener(kind, (event) => this.#point(event.target));
    }
  }

  /** Adds what a chunk brought: text, and the layers of its tokens (a number, a list, or undefined). */
  add(text, layers) {
    const depths = [layers ?? NaN].flat().map(Number);
    this.#last = performance.now();
    if (!this.#tokens.length) {
      this.#first = this.#last;
      this.#atFirst = depths.length;
    }
    this.text += text;
    const span = element("span", "", text);
    span.dataset.token = String(this.#tokens.length);
    this.paragraph.append(span);
    for (const depth of depths) this.#addToken(text, depth, span);
    // Tokens that came together share a text, which has the colour of the deepest.
    const deepest = Math.max(...depths.filter(Number.isFinite));
    if (Number.isFinite(deepest)) {
      span.title = layersInWords(deepest, this.total);
      if (this.total) span.classList.add(`d${shade(deepest, this.total)}`);
    }
    this.trace.hidden = !this.#depths.count;
    this.bars.classList.toggle("many", this.#tokens.length > MANY);
    this.slider.max = String(this.#tokens.length);
    if (this.#picked < 0 && this.#tokens.length) this.#pick(0);
    this.summary.textContent = this.#facts().join(" · ");
  }

  /** Takes the server's count of generated tokens, which may be more than were shown. */
  count(tokens) {
    this.#counted = tokens;
  }

  /** Ends the answer and writes its summary; `ending` says how, or is "". Returns the summary. */
  end(ending) {
    this.item.setAttribute("aria-busy", "false");
    const facts = [...this.#facts(), ...(ending ? [ending] : [])];
    this.summary.textContent = facts.join(" · ");
    return facts.join(", ");
  }

  #facts() {
    const number = this.#counted || this.#tokens.length;
    const facts = [number === 1 ? "1 token" : `${number} tokens`];
    const { count, sum, least, most } = this.#depths;
    if (count) {
      const range = least < most ? ` (${least} to ${most})` : "";
      facts.push(`mean depth ${layersInWords(sum / count, this.total)}${range}`);
    }
    const seconds = (this.#last - this.#first) / 1000;
    if (number > this.#atFirst && seconds > 0) facts.push(`${((number - this.#atFirst) / seconds).toFixed(1)} tokens/s`);
    if (this.#tokens.length) facts.push(`first token after ${((this.#first - this.#began) / 1000).toFixed(2)} s`);
    return facts;
  }

  #addToken(text, depth, span) {
    const bar = element("span");
    bar.dataset.token = String(this.#tokens.length);
    if (Number.isFinite(depth)) {
      const known = this.#depths;
      known.count += 1;
      known.sum += depth;
      known.least = Math.min(known.least, depth);
      known.most = Math.max(known.most, depth);
    }
    bar.style.height = "0";
    if (Number.isFinite(depth) && this.total) {
      bar.classList.add(`d${shade(depth, this.total)}`);
      bar.style.height = `${Math.min(100, (100 * depth) / this.total)}%`;
    }
    this.bars.append(bar);
    this.#tokens.push({ text, depth, span, bar });
  }

  #point(target) {
    const index = target.dataset.token;
    if (index !== undefined) this.#pick(Number(index));
  }

  #pick(index) {
    const before = this.#tokens[this.#picked];
    before?.span.classList.remove("picked");
    before?.bar.classList.remove("picked");
    this.#picked = index;
    const { text, depth, span, bar } = this.#tokens[index];
    span.classList.add("picked");
    bar.classList.add("picked");
    const words = `${index + 1}, “${text.replaceAll("\n", "↵")}”: ${layersInWords(depth, this.total)}`;
    this.readout.textContent = words;
    this.slider.value = String(index + 1);
    this.slider.setAttribute("aria-valuetext", words);
  }
}
