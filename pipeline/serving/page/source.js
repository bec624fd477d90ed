// A camera, the screen or a video file as the source of a video: its frames go to the server in the stream's size.
const HEADER_BYTES = 8;
const RAW = 0;
const JPEG = 1;
const MOST_RAW_PIXELS = 128 * 128; // as the server sends frames
const QUALITIES = [0.85, 0.6, 0.35, 0.15]; // the first whose file is small enough
const MOST_WAITING = 512 * 1024; // bytes that wait for the network; beyond that, frames are skipped
const HTTPS = "Browsers give a camera or the screen only to pages on https or on localhost. A video file works everywhere.";

export class Source {
  // onSend(data, waiting) sends a message, onEnd() says that no frames follow, onChange() that there is another source
  constructor(panel, { onSend, onEnd, onChange }) {
    this.panel = panel;
    this.video = panel.querySelector("video");
    this.onSend = onSend;
    this.onEnd = onEnd;
    this.onChange = onChange;
    this.armed = false;
    this.canvas = document.createElement("canvas");
    this.context = this.canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    this.video.addEventListener("ended", () => { if (this.timer) this.end(true); });
  }

  async camera() {
    await this.take(() => navigator.mediaDevices.getUserMedia({ video: true, audio: false }));
  }

  async screen() {
    await this.take(() => navigator.mediaDevices.getDisplayMedia({ video: true, audio: false }));
  }

  async take(ask) {
    if (!navigator.mediaDevices) throw new Error(HTTPS);
    const stream = await ask().catch((error) => { throw new Error(`The browser gives no picture: ${error.message}`); });
    this.drop();
    stream.getVideoTracks()[0].addEventListener("ended", () => { if (this.video.srcObject === stream) this.drop(); });
    this.video.srcObject = stream;
    await this.arm();
  }

  async file(file) {
    this.drop();
    this.url = URL.createObjectURL(file);
    this.video.src = this.url;
    await this.arm();
  }

  async arm() {
    try {
      await this.video.play();
    } catch {
      this.drop();
      throw new Error("The browser cannot play this video. Try an mp4 or a WebM file.");
    }
    this.armed = true;
    this.onChange();
  }

  // Release the camera, the screen or the file.
  drop() {
    const was = this.armed;
    if (this.timer) this.end(true);
    for (const track of this.video.srcObject?.getTracks() ?? []) track.stop();
    this.video.srcObject = null;
    this.video.removeAttribute("src");
    this.video.load();
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = null;
    this.armed = false;
    if (was) this.onChange();
  }

  // Sends frames from now on. A file is played from its beginning.
  begin({ stream, width, height, fps, mostBytes }) {
    this.end(false);
    Object.assign(this.canvas, { width, height });
    Object.assign(this, { stream, mostBytes, sent: 0 });
    if (this.url) this.video.currentTime = 0;
    this.video.play().catch(() => {});
    this.rate(fps);
  }

  rate(fps) {
    clearInterval(this.timer);
    this.timer = setInterval(() => this.send(), 1000 / fps);
  }

  pause(paused) {
    if (!this.timer) return;
    this.paused = paused;
    if (paused) this.video.pause();
    else this.video.play().catch(() => {});
  }

  end(say) {
    clearInterval(this.timer);
    this.timer = null;
    this.paused = false;
    if (say) this.onEnd();
  }

  async send() {
    if (this.paused || this.busy || this.video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return;
    this.busy = true;
    try {
      const { stream } = this;
      cover(this.context, this.video, this.canvas);
      const data = await this.packed();
      if (this.timer && stream === this.stream) {
        this.onSend(data, MOST_WAITING);
        this.sent += 1;
      }
    } finally {
      this.busy = false;
    }
  }

  async packed() {
    const { width, height } = this.canvas;
    if (width * height <= MOST_RAW_PIXELS) return this.message(RAW, rgb(this.context.getImageData(0, 0, width, height).data));
    let file;
    for (const quality of QUALITIES) {
      file = await new Promise((resolve) => this.canvas.toBlob(resolve, "image/jpeg", quality));
      if (file.size <= this.mostBytes) break;
    }
    return this.message(JPEG, new Uint8Array(await file.arrayBuffer()));
  }

  message(kind, pixels) {
    const data = new Uint8Array(HEADER_BYTES + pixels.length);
    const view = new DataView(data.buffer);
    view.setUint8(0, kind);
    view.setUint32(4, this.stream, true);
    data.set(pixels, HEADER_BYTES);
    return data.buffer;
  }
}

// Draws the middle of a video so that it fills the canvas.
function cover(context, video, { width, height }) {
  const scale = Math.max(width / video.videoWidth, height / video.videoHeight);
  const [w, h] = [width / scale, height / scale];
  context.drawImage(video, (video.videoWidth - w) / 2, (video.videoHeight - h) / 2, w, h, 0, 0, width, height);
}

function rgb(rgba) {
  const pixels = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    pixels[to] = rgba[from];
    pixels[to + 1] = rgba[from + 1];
    pixels[to + 2] = rgba[from + 2];
  }
  return pixels;
}
