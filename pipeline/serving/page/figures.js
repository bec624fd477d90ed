// The figures beside the video.

// Seconds that the model needed for a chunk.
export function makingSeconds({ timings }) {
  return (timings.denoise ?? 0) + (timings.context ?? 0) + (timings.decode ?? 0);
}

export function drawFigures(page) {
  if (!page.status) return;
  const { memory, viewers, waiting } = page.status;
  const last = page.chunks.at(-1);
  const spent = last && makingSeconds(last);
  const write = (id, text) => { page.get(id).textContent = text; };
  write("generated", spent ? `${(last.frames / spent).toFixed(1)} fps` : "–");
  write("shown", page.state === "running" && page.player.shownFps ? `${page.player.shownFps.toFixed(1)} fps` : "–");
  write("response", page.response ? `${(page.response / 1000).toFixed(2)} s` : "–");
  write("ahead", page.active ? `${page.player.waiting} frames` : "–");
  write("viewers", waiting ? `${viewers} + ${waiting} waiting` : viewers);
  write("memory-label", memory.vram === null ? "RAM" : "VRAM");
  write("memory", memory.vram === null ? `${memory.ram.toFixed(1)} GB` : `${memory.vram.toFixed(1)} of ${memory.vram_total.toFixed(0)} GB`);
}
