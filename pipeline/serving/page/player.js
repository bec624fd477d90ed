// The player shows each frame at its own time. A small buffer hides small delays of the network.
const HEADER_BYTES = 28;
const RAW = 0;
const FIRST_BUFFER = 60; // ms from a frame's arrival until it is shown, after a start or a stall
const LONGEST_BUFFER = 400;
const REPORT_MS = 150;
const STALL_MS = 1000; // a longer gap comes from the browser (a hidden tab), not from the stream

export class Player {
  // onFrame(frame) is called after each shown frame, onReport(stream, count) about every REPORT_MS
  constructor(canvas, { onFrame, onReport }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.onFrame = onFrame;
    this.onReport = onReport;
    this.paused = false;
    this.reset(0, 16);
    const tick = (now) => {
      this.tick(now);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  reset(stream, fps) {
    for (const frame of this.frames ?? []) frame.image?.close?.();
    this.stream = stream;
    this.fps = fps;
    this.frames = [];
    this.decoding = Promise.resolve();
    this.buffer = FIRST_BUFFER;
    this.origin = null; // the time of frame 0, in performance.now()
    this.shown = 0;
    this.missed = 0;
    this.late = 0;
    this.times = [];
    this.reported = 0;
    this.paused = false;
  }

  get waiting() {
    return this.frames.length;
  }

  get shownFps() {
    const recent = this.times.filter((time) => time > performance.now() - 2000);
    if (recent.length < 2) return 0;
    return (1000 * (recent.length - 1)) / (recent.at(-1) - recent[0]);
  }

  pause() {
    this.paused = true;
  }

  resume() {
    this.paused = false;
    this.origin = null;
  }

  push(data) {
    const view = new DataView(data);
    const frame = {
      stream: view.getUint32(4, true),
      index: view.getUint32(8, true),
      chunk: view.getUint32(12, true),
      width: view.getUint16(16, true),
      height: view.getUint16(18, true),
      ready: view.getFloat64(20, true),
    };
    if (frame.stream !== this.stream) return;
    const pixels = new Uint8Array(data, HEADER_BYTES);
    const image = view.getUint8(0) === RAW
      ? rawImage(pixels, frame.width, frame.height)
      : createImageBitmap(new Blob([pixels], { type: "image/jpeg" }));
    this.decoding = this.decoding.then(async () => {
      frame.image = await image;
      if (frame.stream === this.stream) this.frames.push(frame);
    });
  }

  due(frame) {
    return this.origin + (1000 * frame.index) / this.fps;
  }

  tick(now) {
    if (this.paused || this.frames.length === 0) return;
    const period = 1000 / this.fps;
    const first = this.frames[0];
    if (this.origin === null) {
      this.origin = now + this.buffer - (1000 * first.index) / this.fps;
      if (this.shown === 0) this.origin -= this.buffer / 2; // show the very first frame sooner
    }
    const behind = now - this.due(first);
    if (behind > STALL_MS || (behind > period && this.frames.length === 1)) {
      // The stream was late, not the display: continue from here with a larger buffer.
      if (behind <= STALL_MS && this.shown > 0) this.late += 1;
      this.buffer = Math.min(1.5 * this.buffer, LONGEST_BUFFER);
      this.origin += behind;
    }
    let frame = null;
    while (this.frames.length && this.due(this.frames[0]) <= now) {
      if (frame) {
        frame.image.close?.();
        this.missed += 1;
      }
      frame = this.frames.shift();
    }
    if (frame) this.show(frame, now);
  }

  show(frame, now) {
    if (this.canvas.width !== frame.width || this.canvas.height !== frame.height) {
      this.canvas.width = frame.width;
      this.canvas.height = frame.height;
    }
    if (frame.image instanceof ImageData) this.context.putImageData(frame.image, 0, 0);
    else this.context.drawImage(frame.image, 0, 0);
    frame.image.close?.();
    this.shown = frame.index + 1;
    this.times.push(now);
    if (this.times.length > 240) this.times.splice(0, 120);
    this.onFrame(frame);
    if (now - this.reported > REPORT_MS || this.frames.length === 0) {
      this.reported = now;
      this.onReport(this.stream, this.shown);
    }
  }
}

function rawImage(rgb, width, height) {
  const image = new ImageData(width, height);
  const rgba = image.data;
  for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) {
    rgba[to] = rgb[from];
    rgba[to + 1] = rgb[from + 1];
    rgba[to + 2] = rgb[from + 2];
    rgba[to + 3] = 255;
  }
  return image;
}
