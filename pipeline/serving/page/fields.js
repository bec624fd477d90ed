// The settings: what the server offers, what a start asks for, and a link that carries them.
const LENGTHS = [1, 2, 4, 8]; // times the model's own length
const SHARED = ["seed", "length", "size", "fps", "steps", "decoder", "precision", "blend", "strength"];

// One line without control characters, as the server makes it.
export function oneLine(text) {
  return text.replace(/[\p{Cc}\p{Zl}\p{Zp}\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu, " ").split(/\s+/).filter(Boolean).join(" ");
}

export class Fields {
  // onChange(name) is called after the visitor changed one
  constructor(root, onChange) {
    this.root = root;
    this.options = null;
    for (const name of SHARED) this.get(name).addEventListener("change", () => { this.correct(name); onChange(name); });
  }

  get(id) {
    return this.root.querySelector(`#${id}`);
  }

  number(name) {
    return Number(this.get(name).value);
  }

  pixelFrames(latents) {
    return 1 + (latents - 1) * this.options.temporal_scale;
  }

  fill(id, entries) {
    const before = this.get(id).value;
    this.get(id).replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
    if (entries.some(([value]) => String(value) === before)) this.get(id).value = before;
  }

  // Offer what a model can do. Another model brings its own rate and steps.
  offer(options, model) {
    const fresh = this.model !== model;
    this.model = model;
    this.options = options;
    const same = (names) => names.map((name) => [name, name]);
    const seconds = (frames) => `${(this.pixelFrames(frames) / options.fps).toFixed(1)} s`;
    const lengths = LENGTHS.map((times) => times * options.num_frames);
    this.fill("size", options.sizes.map(([height, width]) => [`${height}x${width}`, `${width} × ${height}`]));
    this.fill("decoder", same(options.decoders));
    this.fill("precision", same(options.precisions));
    this.fill("style", same(Object.keys(options.styles)));
    this.fill("length", [["", "endless"], ...lengths.map((frames) => [frames, seconds(frames)])]);
    this.get("decoder-field").hidden = options.decoders.length < 2;
    this.get("precision-field").hidden = options.precisions.length < 2;
    this.get("compile-field").hidden = !options.compile;
    this.get("size").disabled = options.sizes.length < 2;
    Object.assign(this.get("fps"), { max: options.most_fps });
    Object.assign(this.get("steps"), { max: options.most_steps });
    Object.assign(this.get("seed"), { max: options.most_seed });
    if (fresh) for (const name of ["fps", "steps"]) this.get(name).value = options[name];
  }

  // A number outside its range becomes the nearest one that is allowed.
  correct(name) {
    const field = this.get(name);
    if (field.tagName === "SELECT") return;
    const value = Number(field.value), step = Number(field.step) || 1;
    const most = field.max === "" ? Infinity : Number(field.max);
    const nearest = Math.min(Math.max(Math.round(value / step) * step, Number(field.min)), most);
    field.value = field.value !== "" && Number.isFinite(nearest) ? Number(nearest.toFixed(3)) : field.defaultValue || field.min;
  }

  // Return the settings of a start. `given` latent frames come from an image.
  request(given) {
    const [height, width] = this.get("size").value.split("x").map(Number);
    const length = this.get("length").value;
    for (const name of ["seed", "fps", "steps"]) this.correct(name);
    return {
      height, width,
      seed: this.number("seed"),
      fps: this.number("fps"),
      steps: this.number("steps"),
      num_frames: length ? Number(length) + given : null,
      decoder: this.get("decoder").value,
      precision: this.get("precision").value,
      compile: this.get("compile").checked,
    };
  }

  // The page's address with the settings in its fragment, which no server sees.
  link(prompt) {
    const values = new URLSearchParams({ prompt, style: this.get("style").value });
    for (const name of SHARED) values.set(name, this.get(name).value);
    return `${location.origin}${location.pathname}#${values}`;
  }

  // Use the settings of a link that this server offers. Return its prompt.
  takeLink(fragment) {
    const values = new URLSearchParams(fragment.slice(0, 8 * this.options.longest_prompt).replace(/^#/, ""));
    for (const name of [...SHARED, "style"]) {
      const field = this.get(name), value = values.get(name);
      if (value === null) continue;
      if (field.tagName === "SELECT" && [...field.options].some((option) => option.value === value)) field.value = value;
      if (field.tagName === "INPUT" && /^\d+(\.\d+)?$/.test(value)) { field.value = value; this.correct(name); }
    }
    return oneLine(values.get("prompt") ?? "").slice(0, this.options.longest_prompt);
  }
}
