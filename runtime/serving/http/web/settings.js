// What the form at the side says: the model, its depth, and the sampling options.

const SHADES = 6;
const byId = (id) => document.getElementById(id);

/** Returns the number of layers in words, such as "16 of 30 layers". */
export function layersInWords(layers, total) {
  if (!Number.isFinite(layers)) return "unknown number of layers";
  const number = Number.isInteger(layers) ? String(layers) : layers.toFixed(1);
  return total ? `${number} of ${total} layers` : `${number} layers`;
}

/** Returns the shade, 0 to 5, of a token that ran in `layers` of `total` layers. */
export function shade(layers, total) {
  return Math.min(SHADES - 1, Math.max(0, Math.ceil((layers / total) * SHADES) - 1));
}

/** Returns the depths of a model of /v1/models, shallowest first; [] if the server does not tell them. */
function depthsOf(model) {
  const listed = Array.isArray(model.depths) ? model.depths : [];
  const depths = listed.map(({ name, ratio, layers }) => ({
    name: String(name), ratio, layers: Array.isArray(layers) ? layers.length : Number(layers),
  }));
  if (depths.length && model.layers && !depths.some(({ name }) => name === "full")) {
    depths.push({ name: "full", ratio: 1, layers: model.layers });
  }
  return depths.sort((a, b) => a.layers - b.layers);
}

function labelOf({ name, ratio }) {
  if (name === "full") return "full depth";
  return String(ratio) === name ? `ratio ${name}` : `depth ${name}`;
}

/** The settings form. */
export class Settings {
  #models = [];
  #depths = [];

  constructor() {
    byId("model").addEventListener("change", () => this.#showModel());
    byId("depth").addEventListener("input", () => this.#showDepth());
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
  }

  /** Offers the models of the server's list. */
  offer(models) {
    // A name such as "smollm2@2" is a model's name and a depth, which the slider chooses.
    const ids = new Set(models.map(({ id }) => id));
    this.#models = models.filter(({ id }) => !ids.has(id.slice(0, Math.max(0, id.lastIndexOf("@")))));
    byId("model").replaceChildren(...this.#models.map(({ id }) => new Option(id, id)));
    this.#showModel();
  }

  /** The chosen model of the list, or undefined before there is a list. */
  get model() {
    return this.#models[byId("model").selectedIndex];
  }

  /** Number of the model's layers, or undefined if the server does not tell it. */
  get layers() {
    return this.model?.layers;
  }

  /** The model and its depth in words, such as "smollm2, ratio 2". */
  get label() {
    const model = this.model?.id ?? "Answer";
    return this.#chosen ? `${model}, ${labelOf(this.#chosen)}` : model;
  }

  /** The chosen depth, or undefined if the model has no choice. */
  get #chosen() {
    return this.#depths.length > 1 ? this.#depths[Number(byId("depth").value)] : undefined;
  }

  /** The fields of a request that the form decides; null after it has shown what is wrong with one. */
  fields() {
    const invalid = byId("settings").querySelector("input:invalid");
    if (invalid) {
      invalid.closest("details").open = true;
      invalid.reportValidity();
      return null;
    }
    const fields = { model: this.model?.id, depth: this.#chosen?.name };
    for (const [name, id] of [["temperature", "temperature"], ["top_p", "top-p"], ["max_tokens", "max-tokens"]]) {
      if (byId(id).value !== "") fields[name] = Number(byId(id).value);
    }
    return fields;
  }

  #showModel() {
    this.#depths = this.model ? depthsOf(this.model) : [];
    const slider = byId("depth");
    const last = Math.max(0, this.#depths.length - 1);
    slider.max = String(last);
    // The server's own choice: the first depth that the checkpoint was trained for, or all layers.
    const chosen = (this.model?.depths ?? []).find(({ name, trained }) => trained && name !== "full");
    const index = this.#depths.findIndex(({ name }) => name === chosen?.name);
    slider.value = String(index < 0 ? last : index);
    byId("depth-field").hidden = this.#depths.length < 2;
    const number = this.#depths.length;
    const depths = ["", ", one depth"][number] ?? `, ${number} depths`;
    byId("model-note").textContent = this.layers ? `${this.layers} layers${depths}` : "";
    this.#showDepth();
    this.#showLegend();
  }

  #showDepth() {
    const chosen = this.#chosen;
    const words = chosen ? `${labelOf(chosen)}, up to ${layersInWords(chosen.layers, this.layers)}` : "";
    byId("depth-text").textContent = words;
    byId("depth").setAttribute("aria-valuetext", words);
  }

  #showLegend() {
    const total = this.layers;
    byId("legend").hidden = !total;
    const items = [];
    for (let step = 0, first = 0; total && step < SHADES; step++) {
      const last = Math.floor(((step + 1) * total) / SHADES);
      if (last < first) continue;
      const item = document.createElement("li");
      const swatch = document.createElement("span");
      swatch.className = `swatch d${shade(last, total)}`;
      item.append(swatch, first === last ? `${last}` : `${first}–${last}`);
      items.push(item);
      first = last + 1;
    }
    byId("shades").replaceChildren(...items);
  }
}
