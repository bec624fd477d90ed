// The gallery: a card for each finished clip, with its files and the command that makes it again.
import { copyText } from "./clipboard.js";
import { API } from "./connection.js";

export class Gallery {
  // onAgain(clip) takes over the clip's prompt and seed, onDelete(name) deletes it
  constructor(section, template, { onAgain, onDelete }) {
    this.section = section;
    this.cards = section.querySelector(".clips");
    this.template = template;
    this.onAgain = onAgain;
    this.onDelete = onDelete;
  }

  card(name) {
    return [...this.cards.children].find((card) => card.dataset.name === name);
  }

  remove(name) {
    this.card(name)?.remove();
    this.section.hidden = !this.cards.children.length;
  }

  // Marks clips whose files are not served any more. Their prompts and commands stay readable.
  markAllGone() {
    for (const card of this.cards.querySelectorAll(".clip:not(.gone)")) {
      card.classList.add("gone");
      card.querySelector(".facts").textContent += " · made before the server restarted; the file is in the server's clips folder";
      for (const control of card.querySelectorAll(".mp4, .gif, .delete")) control.remove();
    }
  }

  add(clip) {
    if (this.card(clip.name)) return;
    const card = this.template.content.cloneNode(true).firstElementChild;
    const find = (selector) => card.querySelector(selector);
    const url = (kind) => new URL(`clips/${clip.name}.${kind}`, API).href;
    find("video").src = url("mp4");
    find(".prompt").textContent = clip.prompts.join(" → ");
    find(".prompt").title = clip.prompts.join("\n");
    find(".facts").textContent = facts(clip);
    find(".mp4").href = url("mp4");
    find(".gif").href = url("gif");
    find("code").textContent = clip.command;
    find(".copy").hidden = find("details").hidden = !clip.command; // a live source cannot be made again
    card.dataset.name = clip.name;
    find(".again").addEventListener("click", () => this.onAgain(clip));
    find(".delete").addEventListener("click", () => this.onDelete(clip.name));
    playOnDemand(find("video"));
    const copy = find(".copy");
    copy.addEventListener("click", async () => {
      copy.textContent = (await copyText(clip.command, find("code"))) ? "Copied" : "Copy it below";
      setTimeout(() => { copy.textContent = "Copy command"; }, 1500);
    });
    this.cards.prepend(card);
    this.section.hidden = false;
  }
}

function facts({ frames, fps, width, height, whole, begin }) {
  const part = begin ? ` · from second ${begin.toFixed(1)}` : "";
  return `${(frames / fps).toFixed(1)} s · ${width} × ${height}${part}${whole ? "" : " · only the beginning"}`;
}

// Play a clip while the mouse is over it.
function playOnDemand(video) {
  video.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") video.play().catch(() => {}); });
  video.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") video.pause(); });
}
