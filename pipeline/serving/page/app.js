// The page: controls, figures and gallery around the player. It uses only the API of docs/api.md.
import { Connection } from "./connection.js";
import { Gallery } from "./gallery.js";
import { Player } from "./player.js";
import { matchTheme, toggleTheme } from "./theme.js";

const CRISP_PIXELS = 256; // frames up to this width are drawn with sharp pixels
const LENGTHS = [1, 2, 4, 8]; // multiples of the model's own length
const CAPTION_MS = 3000;
const HURRY_MS = 400; // after which a new prompt should be seen
const NARROW = "(max-width: 860px)"; // as in style.css
const PROMPT_KEY = "self-forcing-prompt"; // keeps the prompt when the page is reloaded
const ACTIVE = ["starting", "waiting", "running", "paused"];

export function start(root) {
  matchTheme();
  const page = new Page(root);
  window.selfForcing = page; // lets scripts control the page
}

class Page {
  constructor(root) {
    this.root = root.querySelector(".demo");
    this.state = "loading"; // or lost, ready, starting, waiting, running, paused, failed
    this.eager = false; // whether to start as soon as the model is loaded
    this.options = null;
    this.chunks = [];
    this.asked = null; // the latest requested prompt, its time and the last chunk before it; null once it is visible
    this.switches = 0;
    this.answered = null; // the latest prompt that became visible, with its first chunk
    this.player = new Player(this.get("canvas"), {
      onFrame: (frame) => this.onFrame(frame),
      onReport: (stream, frames, late) => this.connection.send({ type: "shown", stream, frames, late }),
    });
    this.connection = new Connection({
      onMessage: (message) => this[`on_${message.type}`]?.(message),
      onFrame: (data) => this.player.push(data),
      onLost: () => this.onLost(),
    });
    this.gallery = new Gallery(this.get("gallery"), this.get("clip"), {
      onAgain: (clip) => this.useAgain(clip),
      onDelete: (name) => this.connection.deleteClip(name).catch((error) => this.say(error.message)),
    });
    this.listen();
    this.get("settings").open = !matchMedia(NARROW).matches;
    setInterval(() => this.drawFigures(), 500);
  }

  get(id) {
    return this.root.querySelector(`#${id}`);
  }

  get active() {
    return ACTIVE.includes(this.state);
  }

  // What the visitor does.

  listen() {
    const on = (id, event, run) => this.get(id).addEventListener(event, run);
    on("composer", "submit", (event) => { event.preventDefault(); this.submit(); });
    on("prompt", "keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.submit(); }
    });
    on("prompt", "input", () => { sessionStorage.setItem(PROMPT_KEY, this.get("prompt").value); this.draw(); });
    on("style", "change", () => this.draw());
    on("fullscreen", "click", () => this.toggleFullscreen());
    this.get("prompt").value = sessionStorage.getItem(PROMPT_KEY) ?? "";
    on("pause", "click", () => this.togglePause());
    on("stop", "click", () => this.stop());
    on("dice", "click", () => { this.get("seed").value = Math.floor(Math.random() * 1e6); });
    on("theme", "click", toggleTheme);
    on("image", "click", () => this.get("file").click());
    on("file", "change", () => this.takeImage(this.get("file").files[0]));
    on("thumbnail", "click", (event) => { if (event.target.tagName === "BUTTON") this.dropImage(); });
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest?.("input, textarea, select, button, a, summary, video");
      if (event.key === "Escape" && this.root.contains(document.activeElement)) document.activeElement.blur();
      if (event.key === "f" && !typing && !event.ctrlKey && !event.metaKey) this.toggleFullscreen();
      if (event.key === " " && !typing && this.active) { event.preventDefault(); this.togglePause(); }
    });
    this.listenForDrops();
  }

  listenForDrops() {
    const hasFile = (event) => event.dataTransfer?.types.includes("Files");
    const show = (visible) => {
      this.get("drop").hidden = !visible;
      this.get("drop-text").textContent = `Drop an image here. The ${this.active ? "next " : ""}video will start from it.`;
    };
    this.root.addEventListener("dragover", (event) => { if (hasFile(event)) { event.preventDefault(); show(true); } });
    this.root.addEventListener("dragleave", (event) => { if (!this.root.contains(event.relatedTarget)) show(false); });
    this.root.addEventListener("drop", (event) => {
      if (!hasFile(event)) return;
      event.preventDefault();
      show(false);
      this.takeImage(event.dataTransfer.files[0]);
    });
  }

  submit() {
    const prompt = this.get("prompt").value.trim();
    if (!prompt || this.get("start").disabled) return;
    const longest = this.options?.longest_prompt ?? Infinity;
    if (prompt.length > longest) return this.say(`The prompt has ${prompt.length} characters. At most ${longest} are allowed: make it shorter.`);
    if (this.state === "loading") { this.eager = true; this.draw(); return; }
    this.say("");
    if (["running", "paused"].includes(this.state)) this.switchTo(prompt);
    else if (!this.active) this.begin(prompt);
  }

  begin(prompt) {
    const [height, width] = this.get("size").value.split("x").map(Number);
    const length = this.get("length").value;
    this.request = {
      type: "start", prompt, height, width,
      seed: Number(this.get("seed").value),
      fps: Number(this.get("fps").value),
      steps: Number(this.get("steps").value),
      num_frames: length ? Number(length) + (this.image ? 1 : 0) : null,
      decoder: this.get("decoder").value,
      precision: this.get("precision").value,
      compile: this.get("compile").checked,
      image: Boolean(this.image),
    };
    this.asked = { at: performance.now(), prompt, first: 0 };
    this.stream = null;
    this.player.reset(0, this.request.fps);
    this.setState("starting");
    this.connection.send(this.request);
  }

  switchTo(prompt) {
    const last = this.chunks.at(-1);
    const style = this.get("style").value;
    this.asked = { at: performance.now(), prompt, after: last?.chunk, first: null, id: ++this.switches };
    this.connection.send({ type: "switch", prompt, style, id: this.switches });
    if (last && style !== "cut") this.player.hurry(this.asked.at + Math.max(HURRY_MS, 1500 * makingSeconds(last) + 100));
    if (this.state === "paused") this.togglePause();
  }

  togglePause() {
    if (this.state === "running") {
      this.player.pause();
      this.connection.send({ type: "pause" });
      this.setState("paused");
    } else if (this.state === "paused") {
      this.player.resume();
      this.connection.send({ type: "resume" });
      this.setState("running");
    }
  }

  stop() {
    if (!this.active) return;
    this.connection.send({ type: "stop" });
    this.player.pause();
    this.setState("ready");
  }

  async takeImage(file) {
    if (!file) return;
    this.say("");
    try {
      await this.connection.putImage(file);
    } catch (error) {
      if (this.image) this.dropImage(); // the visitor wanted the new image, so the earlier one must not be used
      this.say(error.message);
      return;
    }
    if (this.active) this.say("The next video starts from this image.");
    this.image = URL.createObjectURL(file);
    this.get("thumbnail").hidden = false;
    this.get("thumbnail").querySelector("img").src = this.image;
  }

  dropImage() {
    URL.revokeObjectURL(this.image);
    this.image = null;
    this.get("file").value = "";
    this.get("thumbnail").hidden = true;
  }

  // What the server says.

  on_hello({ clips, session }) {
    const anew = this.session && this.session !== session; // a restarted server has forgotten every session
    if (this.session !== session) this.dropImage();
    this.session = session;
    if (this.state === "lost") this.setState("loading");
    if (anew) this.gallery.markAllGone();
    for (const clip of clips.reverse()) this.gallery.add(clip);
  }

  on_status(status) {
    this.status = status;
    if (status.options) this.offer(status.options);
    if (status.model.state === "ready" && this.state === "loading") {
      this.setState("ready");
      if (this.eager) this.submit();
      this.eager = false;
    }
    if (status.model.state === "failed") this.setState("failed");
    this.draw();
  }

  on_waiting({ stream, place }) {
    this.place = place;
    this.stream = stream;
    this.setState("waiting");
  }

  on_seated({ stream }) {
    this.stream = stream;
    this.chunks = [];
    this.total = null;
    this.get("caption").textContent = "";
    this.player.reset(stream, this.request.fps);
    this.setState("running");
  }

  on_chunk(chunk) {
    if (chunk.stream === this.stream) this.chunks.push({ ...chunk, at: performance.now() });
    if (this.chunks.length > 64) this.chunks.shift();
  }

  on_switched({ stream, first_frame, style, id }) {
    if (stream !== this.stream) return;
    if (this.asked?.id === id) this.asked.first = first_frame;
    this.player.turn(first_frame, { drop: style === "cut" });
  }

  on_ended({ stream, frames }) {
    if (stream === this.stream) this.total = frames;
    this.finishIfShown();
  }

  on_clip({ clip }) {
    this.gallery.add(clip);
  }

  on_clip_deleted({ name }) {
    this.gallery.remove(name);
  }

  on_notice({ message }) {
    this.say(message);
  }

  on_error({ message }) {
    this.say(message);
    if (this.state === "starting") this.setState("ready"); // the server refused the start
  }

  onLost() {
    if (this.state === "lost") return;
    this.player.pause();
    this.setState("lost");
  }

  onFrame(frame) {
    const chunk = this.chunks.find(({ chunk }) => chunk === frame.chunk);
    if (this.asked && this.asked.first !== null && frame.index >= this.asked.first) {
      this.response = performance.now() - this.asked.at;
      this.answered = { ...this.asked, chunk: frame.chunk };
      this.asked = null;
    }
    if (frame.index === 0) {
      this.firstFrame = { shown: Date.now() / 1000, ready: frame.ready };
      delete this.root.dataset.blank;
      this.get("canvas").classList.toggle("crisp", frame.width <= CRISP_PIXELS);
      this.draw();
    }
    if (chunk) this.caption(chunk.prompt);
    const all = this.request.num_frames && this.pixelFrames(this.request.num_frames);
    this.get("progress").style.width = all ? `${(100 * (frame.index + 1)) / all}%` : "0";
    this.finishIfShown();
  }

  finishIfShown() {
    if (this.total !== null && this.player.shown >= this.total && this.active) this.setState("ready");
  }

  useAgain(clip) {
    this.get("prompt").value = clip.prompts[0];
    this.get("seed").value = clip.seed;
    this.get("prompt").focus();
    this.draw();
  }

  // What is seen.

  setState(state) {
    this.state = state;
    this.root.dataset.state = state;
    this.draw();
  }

  offer(options) {
    this.options = options;
    const focus = this.get("prompt").value === "" || document.activeElement === document.body;
    const fill = (id, entries) => this.get(id).replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
    this.get("model").textContent = options.model;
    fill("size", options.sizes.map(([height, width]) => [`${height}x${width}`, `${width} × ${height}`]));
    fill("decoder", options.decoders.map((name) => [name, name]));
    fill("precision", options.precisions.map((name) => [name, name]));
    fill("style", Object.keys(options.styles).map((name) => [name, name]));
    this.get("styles").replaceChildren(...Object.entries(options.styles).flatMap(([name, text]) => {
      const [term, meaning] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      meaning.textContent = text;
      return [term, meaning];
    }));
    this.get("decoder-field").hidden = options.decoders.length < 2;
    this.get("precision-field").hidden = options.precisions.length < 2;
    this.get("compile-field").hidden = !options.compile;
    this.get("size").disabled = options.sizes.length < 2;
    Object.assign(this.get("fps"), { value: options.fps, max: options.most_fps });
    Object.assign(this.get("steps"), { value: options.steps, max: options.most_steps });
    Object.assign(this.get("seed"), { max: options.most_seed });
    const lengths = LENGTHS.map((times) => times * options.num_frames);
    const seconds = (frames) => `${(this.pixelFrames(frames) / options.fps).toFixed(1)} s`;
    fill("length", [["", "endless"], ...lengths.map((frames) => [frames, seconds(frames)])]);
    this.get("examples").replaceChildren(...options.examples.map((text) => this.example(text)));
    if (!this.get("prompt").value) this.get("prompt").value = options.examples[0];
    if (focus && matchMedia("(pointer: fine)").matches) this.get("prompt").focus({ preventScroll: true });
  }

  example(text) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: text, title: text });
    button.addEventListener("click", () => { this.get("prompt").value = text; this.submit(); });
    return button;
  }

  pixelFrames(latents) {
    return 1 + (latents - 1) * this.options.temporal_scale;
  }

  draw() {
    const { model } = this.status ?? { model: { stage: "Connecting", progress: 0 } };
    const texts = {
      loading: ["Loading", this.eager ? `${model.stage}. Your video starts after that …` : `${model.stage} …`],
      ready: ["Ready", "Write what the video should show, then press Enter"],
      waiting: [`Waiting, place ${this.place}`, `All seats are taken. You are number ${this.place} in line.`],
      starting: ["Starting", "Starting …"],
      running: ["Live", "Starting …"],
      paused: ["Paused", "Paused"],
      failed: ["Failed", model.stage],
      lost: ["Not connected", "The server does not answer. Trying again …"],
    };
    const [status, cover] = texts[this.state];
    this.get("status").textContent = status;
    this.get("cover-text").textContent = cover;
    this.get("cover").hidden = this.player?.shown > 0 && !["waiting", "failed", "loading", "lost"].includes(this.state);
    this.get("load-bar").parentElement.hidden = this.state !== "loading";
    this.get("load-bar").style.width = `${100 * model.progress}%`;
    this.get("pause").disabled = !["running", "paused"].includes(this.state);
    this.get("pause").title = this.state === "paused" ? "Resume (space)" : "Pause (space)";
    this.get("pause").ariaLabel = this.state === "paused" ? "Resume" : "Pause";
    this.get("stop").disabled = !this.active;
    this.get("start").textContent = ["running", "paused"].includes(this.state) ? "Switch" : "Start";
    const busy = ["failed", "lost", "starting", "waiting"].includes(this.state) || (this.state === "loading" && this.eager);
    this.get("start").disabled = busy || !this.get("prompt").value.trim();
    const steering = ["running", "paused"].includes(this.state);
    this.get("style-field").hidden = this.get("style-text").hidden = !steering;
    this.get("style-text").textContent = `Switch: ${this.options?.styles[this.get("style").value] ?? ""}`;
  }

  toggleFullscreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else if (!("blank" in this.root.dataset)) this.get("stage").requestFullscreen?.();
  }

  // Show the prompt of the visible frame for a moment when it changes.
  caption(prompt) {
    const caption = this.get("caption");
    if (caption.textContent === prompt) return;
    caption.textContent = prompt;
    caption.classList.add("visible");
    clearTimeout(this.captionTimer);
    this.captionTimer = setTimeout(() => caption.classList.remove("visible"), CAPTION_MS);
  }

  say(text) {
    this.get("notice").textContent = text;
    this.get("notice").hidden = !text;
  }

  drawFigures() {
    if (!this.status) return;
    const { memory, viewers, waiting } = this.status;
    const last = this.chunks.at(-1);
    const spent = last && makingSeconds(last);
    const write = (id, text) => { this.get(id).textContent = text; };
    write("generated", spent ? `${(last.frames / spent).toFixed(1)} fps` : "–");
    write("shown", this.state === "running" && this.player.shownFps ? `${this.player.shownFps.toFixed(1)} fps` : "–");
    write("response", this.response ? `${(this.response / 1000).toFixed(2)} s` : "–");
    write("ahead", this.active ? `${this.player.waiting} frames` : "–");
    write("viewers", waiting ? `${viewers} + ${waiting} waiting` : viewers);
    write("memory-label", memory.vram === null ? "RAM" : "VRAM");
    write("memory", memory.vram === null ? `${memory.ram.toFixed(1)} GB` : `${memory.vram.toFixed(1)} of ${memory.vram_total.toFixed(0)} GB`);
  }
}

// Seconds that the model needed for a chunk.
function makingSeconds({ timings }) {
  return (timings.denoise ?? 0) + (timings.context ?? 0) + (timings.decode ?? 0);
}
