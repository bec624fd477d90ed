// The models of the server: the visitor may choose another one, which is loaded in place of the first. If weights are
// missing, the person at the server's machine may download them.
const MEGABYTE = 1e6;

export class Models {
  constructor(page) {
    this.page = page;
    this.field = page.get("models-field");
    this.select = page.get("models");
    this.problem = "";
    this.select.addEventListener("change", () => this.choose(this.select.value));
    page.get("download").addEventListener("click", () => this.ask(() => page.connection.downloadWeights()));
  }

  async choose(name) {
    this.show(this.status); // until the server says that it loads the other one
    const others = this.status.viewers + this.status.waiting - Number(this.page.active);
    if (others > 0 && !confirm(`Another model ends ${others} videos of other visitors. Load it?`)) return;
    await this.ask(() => this.page.connection.chooseModel(name));
  }

  async ask(request) {
    this.page.say("");
    try {
      await request();
    } catch (error) {
      this.page.say(error.message);
    }
  }

  show(status) {
    const { models, chosen, may_choose, problem, model, missing } = this.status = status;
    if (models.join("\n") !== [...this.select.options].map(({ value }) => value).join("\n")) {
      this.select.replaceChildren(...models.map((name) => new Option(name, name)));
    }
    this.select.value = chosen;
    this.field.hidden = models.length < 2;
    this.select.disabled = !may_choose || model.state === "loading";
    if (problem && problem !== this.problem) this.page.say(problem);
    this.problem = problem;
    this.offer(missing);
    if (model.state === "loading" && !["loading", "lost"].includes(this.page.state)) this.wait();
  }

  // Say which files are missing and how large they are.
  offer(missing) {
    const files = missing?.files ?? [];
    this.page.get("missing").hidden = !files.length;
    this.page.get("download").hidden = !missing;
    this.page.get("download").textContent = missing?.bytes ? `Download ${size(missing.bytes)}` : "Try to download";
    this.page.get("missing").querySelector("ul").replaceChildren(...files.map(({ path, bytes }) => {
      const line = document.createElement("li");
      line.textContent = `${path}: ${size(bytes)}`;
      return line;
    }));
  }

  // Nothing can be made until the other model is loaded.
  wait() {
    this.page.player.pause();
    this.page.source.end(false);
    this.page.get("model").textContent = "";
    this.page.setState("loading");
  }
}

function size(bytes) {
  const megabytes = bytes / MEGABYTE;
  return megabytes < 100 ? `${megabytes.toFixed(megabytes < 1 ? 2 : 0)} MB` : `${(megabytes / 1000).toFixed(2)} GB`;
}
