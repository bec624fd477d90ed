// The page: controls, figures and gallery around the player. It uses only the API of docs/api.md.
import { copyText } from "./clipboard.js";
import { Connection } from "./connection.js";
import { Fields, oneLine } from "./fields.js";
import { listenForDrops } from "./drops.js";
import { drawFigures, makingSeconds } from "./figures.js";
import { Gallery } from "./gallery.js";
import { History } from "./history.js";
import { Models } from "./models.js";
import { Player } from "./player.js";
import { openSource } from "./source_panel.js";
import { matchTheme, toggleTheme } from "./theme.js";
import { Timeline } from "./timeline.js";
import { drawState } from "./view.js";

const CRISP_PIXELS = 256; // frames up to this width are drawn with sharp pixels
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
    this.state = "loading"; // or missing, lost, ready, starting, waiting, running, paused, failed
    this.eager = false; // whether to start as soon as the model is loaded
    this.options = null;
    this.chunks = [];
    this.asked = null; // the latest requested prompt, its time and the last chunk before it; null once it is visible
    this.switches = 0;
    this.total = null; // frames of the video once all are made
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
    this.fields = new Fields(this.root, (name) => this.changed(name));
    this.history = new History(this.get("history-open"), this.get("history"), (prompt) => this.takePrompt(prompt));
    this.timeline = new Timeline(this.get("timeline"), this.get("timeline-row"), (...row) => this.switchTo(...row));
    this.source = openSource(this);
    this.models = new Models(this);
    this.listen();
    this.get("settings").open = !matchMedia(NARROW).matches;
    setInterval(() => drawFigures(this), 500);
  }

  get(id) {
    return this.root.querySelector(`#${id}`);
  }

  get steering() {
    return ["running", "paused"].includes(this.state) && this.total === null; // not while the last frames are shown
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
    on("dice", "click", () => { this.get("seed").value = Math.floor(Math.random() * 1e6); this.changed("seed"); });
    on("record", "click", () => this.toggleRecord());
    on("link", "click", () => this.copyLink());
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
    listenForDrops(this);
  }

  submit() {
    const prompt = this.get("prompt").value.trim();
    if (!prompt || this.get("start").disabled) return;
    const longest = this.options?.longest_prompt ?? Infinity;
    if (prompt.length > longest) return this.say(`The prompt has ${prompt.length} characters. At most ${longest} are allowed: make it shorter.`);
    if (this.state === "loading") { this.eager = true; this.draw(); return; }
    this.say("");
    if (this.steering) this.switchTo(prompt);
    else this.begin(prompt);
  }

  begin(prompt) {
    const source = this.source.armed, image = Boolean(this.image) && !source;
    this.request = {
      type: "start", prompt, image, source,
      ...this.fields.request(image ? 1 : 0),
      strength: this.fields.number("strength"),
      record: this.get("record-all").checked,
    };
    this.asked = { at: performance.now(), prompt, first: 0 };
    this.stream = this.total = null;
    this.player.reset(0, this.request.fps);
    this.remember(prompt);
    this.timeline.begin(prompt);
    this.setState("starting");
    this.connection.send(this.request);
  }

  switchTo(prompt, style = this.get("style").value, settings = {}) {
    const last = this.chunks.at(-1);
    this.asked = { at: performance.now(), prompt, after: last?.chunk, first: null, id: ++this.switches };
    if (style === "blend") settings = { blend_chunks: this.fields.number("blend"), ...settings };
    this.connection.send({ type: "switch", prompt, style, id: this.switches, ...settings });
    if (last && style !== "cut") this.player.hurry(this.asked.at + Math.max(HURRY_MS, 1500 * makingSeconds(last) + 100));
    this.remember(prompt);
    if (this.state === "paused") this.togglePause();
  }

  remember(prompt) {
    this.history.add(oneLine(prompt));
  }

  // A setting was changed. Some take effect while the video runs.
  changed(name) {
    if (!this.steering) return;
    const value = this.fields.number(name);
    if (["seed", "steps", "strength"].includes(name)) this.connection.send({ type: "switch", [name]: value });
    if (name !== "fps") return;
    this.connection.send({ type: "rate", fps: value });
    this.player.changeRate(value);
    this.source.rate(value);
  }

  toggleRecord() {
    this.recording = !this.recording;
    this.connection.send({ type: "record", on: this.recording });
    this.draw();
  }

  async copyLink() {
    const text = this.get("link-text");
    text.textContent = this.fields.link(oneLine(this.get("prompt").value));
    text.hidden = await copyText(text.textContent, text);
    this.get("link").textContent = text.hidden ? "Copied" : "Copy it below";
    setTimeout(() => { this.get("link").textContent = "Copy a link to these settings"; }, 1500);
  }

  togglePause() {
    if (this.state === "running") {
      this.player.pause();
      this.source.pause(true);
      this.connection.send({ type: "pause" });
      this.setState("paused");
    } else if (this.state === "paused") {
      this.player.resume();
      this.source.pause(false);
      this.connection.send({ type: "resume" });
      this.setState("running");
    }
  }

  stop() {
    if (!this.active) return;
    this.connection.send({ type: "stop" });
    this.source.end(false);
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

  on_hello({ clips, session, image }) {
    const anew = this.session && this.session !== session; // a restarted server knows only sessions with clips
    if (!image) this.dropImage();
    this.session = session;
    if (this.state === "lost") this.setState("loading");
    if (anew) this.gallery.markAllGone();
    for (const clip of clips.reverse()) this.gallery.add(clip);
  }

  on_status(status) {
    this.status = status;
    this.models.show(status);
    if (status.options) this.offer(status.options);
    if (status.model.state === "ready" && ["loading", "missing"].includes(this.state)) {
      this.setState("ready");
      if (this.eager) this.submit();
      this.eager = false;
    }
    if (["failed", "missing"].includes(status.model.state)) this.setState(status.model.state);
    this.draw();
  }

  on_waiting({ stream, place }) {
    this.place = place;
    this.stream = stream;
    this.setState("waiting");
  }

  on_seated({ stream }) {
    this.stream = stream;
    [this.chunks, this.total] = [[], null];
    this.get("caption").textContent = "";
    this.player.reset(stream, this.request.fps);
    this.recording = this.request.record;
    this.setState("running");
    if (this.request.source) this.source.begin({ stream, ...this.request, mostBytes: this.options.source_bytes });
  }

  on_chunk(chunk) {
    if (chunk.stream === this.stream) this.chunks.push({ ...chunk, at: performance.now() });
    if (this.chunks.length > 64) this.chunks.shift();
  }

  on_switched({ stream, first_frame, prompt, style, id, blend_chunks, seed, steps }) {
    if (stream !== this.stream) return;
    this.timeline.note(first_frame / this.request.fps, prompt, style, { blend_chunks, seed, steps });
    if (this.asked?.id === id) this.asked.first = first_frame;
    this.player.turn(first_frame, { drop: style === "cut" });
  }

  on_ended({ stream, frames }) {
    if (stream === this.stream) {
      this.total = frames;
      this.source.end(false);
      this.draw();
    }
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
    this.source.end(false);
    this.asked = null;
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
    this.timeline.advance(frame.index / this.request.fps);
    const all = this.request.num_frames && this.fields.pixelFrames(this.request.num_frames);
    this.get("progress").style.width = all ? `${(100 * (frame.index + 1)) / all}%` : "0";
    this.finishIfShown();
  }

  finishIfShown() {
    if (this.total !== null && this.player.shown >= this.total && this.active) this.setState("ready");
  }

  takePrompt(prompt) {
    this.get("prompt").value = prompt;
    this.get("prompt").focus();
    this.draw();
  }

  useAgain(clip) {
    this.get("seed").value = clip.seed;
    this.takePrompt(clip.prompts[0]);
  }

  // What is seen.

  setState(state) {
    this.state = state;
    this.root.dataset.state = state;
    this.draw();
  }

  offer(options) {
    const another = this.fields.model !== this.status.chosen;
    if (another && this.options?.examples.includes(this.get("prompt").value)) this.get("prompt").value = "";
    this.options = options;
    const focus = this.get("prompt").value === "" || document.activeElement === document.body;
    this.fields.offer(options, this.status.chosen);
    this.timeline.offer(Object.keys(options.styles));
    this.get("model").textContent = options.model;
    this.get("styles").replaceChildren(...Object.entries(options.styles).flatMap(([name, text]) => {
      const [term, meaning] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      meaning.textContent = text;
      return [term, meaning];
    }));
    this.get("examples").replaceChildren(...options.examples.map((text) => this.example(text)));
    if (location.hash.includes("=")) {
      const prompt = this.fields.takeLink(location.hash);
      if (prompt) this.get("prompt").value = prompt;
      history.replaceState(null, "", location.pathname + location.search);
    }
    if (!this.get("prompt").value) this.get("prompt").value = options.examples[0];
    if (focus && matchMedia("(pointer: fine)").matches) this.get("prompt").focus({ preventScroll: true });
  }

  example(text) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: text, title: text });
    button.addEventListener("click", () => { this.get("prompt").value = text; this.submit(); });
    return button;
  }

  draw() {
    drawState(this);
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
}
