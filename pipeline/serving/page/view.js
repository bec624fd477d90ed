// What the page shows in each of its states.
export function drawState(page) {
  const { model } = page.status ?? { model: { stage: "Connecting", progress: 0 } };
  const texts = {
    loading: ["Loading", page.eager ? `${model.stage}. Your video starts after that …` : `${model.stage} …`],
    ready: ["Ready", "Write what the video should show, then press Enter"],
    waiting: [`Waiting, place ${page.place}`, `All seats are taken. You are number ${page.place} in line.`],
    starting: ["Starting", "Starting …"],
    running: ["Live", "Starting …"],
    paused: ["Paused", "Paused"],
    missing: ["No weights", model.stage],
    failed: ["Failed", model.stage],
    lost: ["Not connected", "The server does not answer. Trying again …"],
  };
  const [status, cover] = texts[page.state];
  page.get("status").textContent = status;
  page.get("cover-text").textContent = cover;
  page.get("cover").hidden = page.player?.shown > 0 && !["waiting", "failed", "loading", "lost", "missing"].includes(page.state);
  page.get("load-bar").parentElement.hidden = page.state !== "loading";
  page.get("load-bar").style.width = `${100 * model.progress}%`;
  page.get("pause").disabled = !["running", "paused"].includes(page.state);
  page.get("pause").title = page.state === "paused" ? "Resume (space)" : "Pause (space)";
  page.get("pause").ariaLabel = page.state === "paused" ? "Resume" : "Pause";
  page.get("stop").disabled = !page.active;
  page.get("start").textContent = page.steering ? "Switch" : "Start";
  const busy = ["failed", "lost", "starting", "waiting", "missing"].includes(page.state) || (page.state === "loading" && page.eager);
  page.get("start").disabled = busy || !page.get("prompt").value.trim();
  page.get("style-field").hidden = page.get("style-text").hidden = !page.steering;
  page.get("record").disabled = !page.steering;
  page.get("record").ariaPressed = String(page.steering && page.recording);
  page.get("record").title = page.recording ? "End the clip here" : "Record a clip from here";
  page.get("source").classList.toggle("on", page.source.armed);
  page.get("source-on").hidden = !page.source.armed;
  page.get("style-text").textContent = `Switch: ${page.options?.styles[page.get("style").value] ?? ""}`;
}
