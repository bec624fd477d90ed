// Prompts that were used in this browser. They never leave it.
const KEY = "self-forcing-history";
const MOST = 50;

export class History {
  // onPick(prompt) takes one over
  constructor(button, panel, onPick) {
    this.button = button;
    this.panel = panel;
    this.list = panel.querySelector("ul");
    this.onPick = onPick;
    button.addEventListener("click", () => this.show(panel.hidden));
    panel.querySelector(".clear").addEventListener("click", () => { this.save([]); this.show(false); button.focus(); });
    panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.show(false);
      button.focus();
    });
    this.draw();
  }

  get prompts() {
    try {
      const kept = JSON.parse(localStorage.getItem(KEY) ?? "[]");
      return Array.isArray(kept) ? kept.filter((prompt) => typeof prompt === "string").slice(0, MOST) : [];
    } catch {
      return [];
    }
  }

  add(prompt) {
    this.save([prompt, ...this.prompts.filter((other) => other !== prompt)].slice(0, MOST));
  }

  save(prompts) {
    try {
      if (prompts.length) localStorage.setItem(KEY, JSON.stringify(prompts));
      else localStorage.removeItem(KEY);
    } catch { /* the browser keeps nothing for this page */ }
    this.draw();
  }

  show(visible) {
    this.draw();
    this.panel.hidden = !visible;
    this.button.setAttribute("aria-expanded", visible);
    if (visible) this.panel.querySelector("button")?.focus();
  }

  draw() {
    const { prompts } = this;
    this.panel.querySelector(".clear").hidden = !prompts.length;
    this.panel.querySelector(".none").hidden = prompts.length > 0;
    this.list.replaceChildren(...prompts.map((prompt) => {
      const [item, button] = [document.createElement("li"), document.createElement("button")];
      Object.assign(button, { type: "button", textContent: prompt });
      button.addEventListener("click", () => { this.show(false); this.onPick(prompt); });
      item.append(button);
      return item;
    }));
  }
}
