// The panel that chooses a camera, the screen or a video file.
import { Source } from "./source.js";

export function openSource(page) {
  const panel = page.get("source-panel");
  const source = new Source(panel, {
    onSend: (data, mostWaiting) => page.connection.sendFrame(data, mostWaiting),
    onEnd: () => { if (page.active) page.connection.send({ type: "source_ended" }); },
    onChange: () => page.draw(),
  });
  const on = (id, event, run) => page.get(id).addEventListener(event, run);
  const show = (visible) => {
    panel.hidden = !visible;
    page.get("source").ariaExpanded = String(visible);
  };
  on("source", "click", () => show(panel.hidden));
  on("camera", "click", () => take(page, () => source.camera()));
  on("screen", "click", () => take(page, () => source.screen()));
  on("video-file", "click", () => page.get("video").click());
  on("video", "change", ({ target }) => { if (target.files[0]) take(page, () => source.file(target.files[0])); });
  on("source-off", "click", () => { page.get("video").value = ""; source.drop(); });
  on("source-panel", "keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    show(false);
    page.get("source").focus();
  });
  return source;
}

// Takes a source; `ask` returns when it is there.
export async function take(page, ask) {
  page.say("");
  try {
    await ask();
  } catch (error) {
    page.say(error.message);
  }
  if (page.source.armed && page.active) page.say("The next video follows this source.");
}
