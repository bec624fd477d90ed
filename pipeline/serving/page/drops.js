// An image, or a video, that is dropped on the page.
import { take } from "./source_panel.js";

export function listenForDrops(page) {
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  const show = (visible) => {
    page.get("drop").hidden = !visible;
    page.get("drop-text").textContent = `Drop an image here. The ${page.active ? "next " : ""}video will start from it.`;
  };
  page.root.addEventListener("dragover", (event) => { if (hasFile(event)) { event.preventDefault(); show(true); } });
  page.root.addEventListener("dragleave", (event) => { if (!page.root.contains(event.relatedTarget)) show(false); });
  page.root.addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    show(false);
    const file = event.dataTransfer.files[0];
    if (file?.type.startsWith("video/")) take(page, () => page.source.file(file));
    else page.takeImage(file);
  });
}
