// The models of the server: the visitor may choose another one, which is loaded in place of the first.
export class Models {
  constructor(page) {
    this.page = page;
    this.field = page.get("models-field");
    this.select = page.get("models");
    this.problem = "";
    this.select.addEventListener("change", () => this.choose(this.select.value));
  }

  async choose(name) {
    this.show(this.status); // until the server says that it loads the other one
    const others = this.status.viewers + this.status.waiting - Number(this.page.active);
    if (others > 0 && !confirm(`Another model ends ${others} videos of other visitors. Load it?`)) return;
    try {
      await this.page.connection.chooseModel(name);
    } catch (error) {
      this.page.say(error.message);
    }
  }

  show(status) {
    const { models, chosen, may_choose, problem, model } = this.status = status;
    if (models.join("\n") !== [...this.select.options].map(({ value }) => value).join("\n")) {
      this.select.replaceChildren(...models.map((name) => new Option(name, name)));
    }
    this.select.value = chosen;
    this.field.hidden = models.length < 2;
    this.select.disabled = !may_choose || model.state === "loading";
    if (problem && problem !== this.problem) this.page.say(problem);
    this.problem = problem;
    if (model.state === "loading" && !["loading", "lost"].includes(this.page.state)) this.wait();
  }

  // Nothing can be made until the other model is loaded.
  wait() {
    this.page.player.pause();
    this.page.source.end(false);
    this.page.get("model").textContent = "";
    this.page.setState("loading");
  }
}
