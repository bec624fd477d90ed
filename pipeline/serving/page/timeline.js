// The prompts of the video with their times. They can be edited, played again and exported as a storyboard.
import { oneLine } from "./fields.js";

const NEXT_SECONDS = 3; // between the last prompt and one that is added

export class Timeline {
  // onPlay(prompt, style, settings) switches to a planned prompt whose time has come
  constructor(section, template, onPlay) {
    this.section = section;
    this.template = template;
    this.list = section.querySelector("ol");
    this.onPlay = onPlay;
    this.opening = "";
    this.rows = []; // {at, prompt, style, settings, done}, in the order of their times
    this.styles = [];
    this.now = 0;
    const on = (selector, run) => section.querySelector(selector).addEventListener("click", run);
    on(".add", () => this.add());
    on(".export", () => this.save());
    on(".clear", () => { this.rows = []; this.draw(); section.querySelector(".add").focus(); });
    this.draw();
  }

  get replay() {
    return this.section.querySelector(".replay").checked;
  }

  offer(styles) {
    this.styles = styles;
    this.draw();
  }

  // A video begins. Earlier prompts are removed, unless they will be played again.
  begin(prompt) {
    this.opening = oneLine(prompt);
    this.now = 0;
    this.rows = this.replay ? this.rows.map((row) => ({ ...row, done: false, sent: false })) : [];
    this.draw();
  }

  // A switch became part of the video.
  note(at, prompt, style, settings) {
    const planned = this.rows.find((row) => row.sent && !row.done && row.prompt === prompt);
    const noted = { at: round(at), style, settings, done: true };
    if (planned) Object.assign(planned, noted);
    else this.rows.push({ prompt, ...noted });
    this.draw();
  }

  // The video has come to this second.
  advance(seconds) {
    this.now = seconds;
    const next = this.rows.find((row) => !row.done && !row.sent && row.prompt && row.at <= seconds);
    if (!next) return;
    next.sent = true;
    this.onPlay(next.prompt, next.style, next.settings);
  }

  add() {
    const last = Math.max(this.rows.at(-1)?.at ?? 0, this.now);
    this.rows.push({ at: round(last + NEXT_SECONDS), prompt: "", style: this.styles[0] ?? "recache", settings: {}, done: false });
    this.draw();
    this.list.lastElementChild.querySelector(".text").focus();
  }

  draw() {
    this.rows.sort((a, b) => a.at - b.at);
    this.section.querySelector(".opening").textContent = this.opening || "The prompt of the start";
    this.section.querySelector(".export").disabled = !this.rows.some(({ prompt }) => prompt);
    this.section.querySelector(".clear").disabled = !this.rows.length;
    if (this.list.contains(document.activeElement)) return; // somebody types here; drawn when the focus leaves
    this.list.replaceChildren(...this.rows.map((row, number) => this.item(row, number + 1)));
  }

  item(row, number) {
    const item = this.template.content.cloneNode(true).firstElementChild;
    const find = (selector) => item.querySelector(selector);
    const change = (selector, take) => find(selector).addEventListener("change", ({ target }) => { take(target); });
    find("select").replaceChildren(...this.styles.map((name) => new Option(name, name)));
    Object.assign(find(".at"), { value: row.at, ariaLabel: `Time of prompt ${number} in seconds` });
    Object.assign(find("select"), { value: row.style, ariaLabel: `Switch of prompt ${number}` });
    Object.assign(find(".text"), { value: row.prompt, ariaLabel: `Prompt ${number}` });
    find(".remove").ariaLabel = `Remove prompt ${number}`;
    change(".at", (field) => { row.at = round(Math.max(Number(field.value) || 0, 0.1)); field.value = row.at; });
    change("select", (field) => { row.style = field.value; });
    change(".text", (field) => { row.prompt = field.value = oneLine(field.value); this.section.querySelector(".export").disabled = false; });
    find(".remove").addEventListener("click", () => {
      this.rows = this.rows.filter((other) => other !== row);
      document.activeElement.blur();
      this.draw();
    });
    item.addEventListener("focusout", () => setTimeout(() => this.draw()));
    return item;
  }

  // The storyboard that `python inference.py --storyboard FILE` reads.
  storyboard() {
    const rows = this.rows.filter(({ prompt }) => prompt).sort((a, b) => a.at - b.at);
    const lines = ["# python inference.py --storyboard FILE"];
    if (this.opening) lines.push("- at: 0s", `  prompt: ${quoted(this.opening)}`);
    let before = 0;
    for (const { at, prompt, style, settings } of rows) {
      before = at > before ? at : round(before + 0.001); // times must ascend
      lines.push(`- at: ${before}s`, `  prompt: ${quoted(prompt)}`, `  style: ${style}`);
      for (const [name, value] of Object.entries(settings)) if (value !== undefined) lines.push(`  ${name}: ${value}`);
    }
    return `${lines.join("\n")}\n`;
  }

  save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([this.storyboard()], { type: "application/yaml" }));
    link.download = "storyboard.yaml";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

const round = (seconds) => Number(seconds.toFixed(3));

// A double-quoted string of YAML: JSON's, with everything escaped that YAML does not print.
function quoted(text) {
  return JSON.stringify(text).replace(/[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
