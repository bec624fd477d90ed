// The player shows each frame at its own time. A small buffer hides small delays of the network.
const HEADER_BYTES = 28;
const RAW = 0;
const FIRST_BUFFER = 60; // ms from a frame's arrival until it is shown, after a start or a stall
const LONGEST_BUFFER = 400;
const REPORT_MS = 150;
const MOST_RATE = 2; // times the usual speed, for frames before a new prompt
const LATE_MS = 10; // a frame that comes later than this is reported, so that the server starts sooner
const STALL_MS = 1000; // a longer gap comes from the browser (a hidden tab), not from the stream

export class Player {
  // onFrame(frame) is called after each shown frame, onReport(stream, count, late) about every REPORT_MS
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
    this.late = 0; // times that the picture stood still for more than a frame
    this.overdue = 0; // frames that came after their time
    this.dry = false; // no frame was left at the last tick
    this.hurried = null; // the frames before a new prompt must end at `until`; `first` is the first frame of the prompt
    this.jump = null; // frames before this one are not shown any more
    this.ticked = 0;
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

  // Play waiting frames faster, so that they end at the time `until`, when a new prompt follows.
  hurry(until) {
    this.hurried = { until, first: null };
  }

  // Shows the frames from now on at another rate.
  changeRate(fps) {
    if (this.origin !== null) {
      const now = performance.now();
      this.origin = now - ((now - this.origin) * this.fps) / fps;
    }
    this.fps = fps;
  }

  // The new prompt begins with the frame `first`. After a cut nobody waits for the frames before it.
  turn(first, { drop }) {
    if (drop) this.jump = first;
    else if (this.hurried) this.hurried.first = first;
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
    const passed = now - this.ticked;
    this.ticked = now;
    if (this.frames.length === 0) this.dry = true;
    if (this.paused || this.frames.length === 0) return;
    if (this.jump !== null && this.frames.at(-1).index >= this.jump) this.leap(now);
    const first = this.frames[0];
    if (this.origin === null) {
      this.origin = now + this.buffer - (1000 * first.index) / this.fps;
      if (this.shown === 0) this.origin -= this.buffer / 2; // show the very first frame sooner
    }
    if (this.hurried) this.origin -= (this.rate(now) - 1) * passed;
    this.catchUp(now - this.due(first));
    let frame = null;
    while (this.frames.length && this.due(this.frames[0]) <= now) {
      if (frame) {
        frame.image.close?.();
        if (!this.hurried) this.missed += 1;
      }
      frame = this.frames.shift();
    }
    if (frame) this.show(frame, now);
  }

  // If the stream was late and not the display, show every frame, beginning now.
  catchUp(behind) {
    if (behind > STALL_MS || (behind > 0 && this.dry)) {
      if (behind <= STALL_MS && this.shown > 0) {
        if (behind > LATE_MS) this.overdue += 1;
        if (behind > 1000 / this.fps) {
          this.late += 1;
          this.buffer = Math.min(1.5 * this.buffer, LONGEST_BUFFER);
        }
      }
      this.origin += behind;
    }
    this.dry = false;
  }

  leap(now) {
    while (this.frames[0].index < this.jump) this.frames.shift().image.close?.();
    this.origin = now - (1000 * this.frames[0].index) / this.fps;
    this.jump = this.hurried = null;
    this.reported = 0;
  }

  // Return the speed at which the frames before a new prompt end in time. Some are kept until its first frame is here.
  rate(now) {
    const { until, first } = this.hurried;
    const left = (first ?? this.frames.at(-1).index + 1) - ((now - this.origin) * this.fps) / 1000;
    if (first === null && this.frames.length < 3) return 1;
    return Math.min(Math.max((1000 * left) / this.fps / Math.max(until - now, 1), 1), MOST_RATE);
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
    if (this.hurried && this.hurried.first !== null && frame.index >= this.hurried.first) this.hurried = null;
    this.times.push(now);
    if (this.times.length > 240) this.times.splice(0, 120);
    this.onFrame(frame);
    if (now - this.reported > REPORT_MS || this.frames.length === 0) {
      this.reported = now;
      this.onReport(this.stream, this.shown, this.overdue);
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
