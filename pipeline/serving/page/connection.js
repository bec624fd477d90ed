// The WebSocket: it says hello, reconnects by itself, and keeps the session across reloads and tabs.
export const API = new URL("../api/v1/", import.meta.url); // relative, because a proxy may add a path before it
const KEY = "self-forcing-session";
const RETRY_MS = 1000;

export class Connection {
  // handlers: onMessage(object), onFrame(ArrayBuffer), onLost()
  constructor(handlers) {
    this.handlers = handlers;
    this.session = localStorage.getItem(KEY);
    this.open();
  }

  open() {
    const address = new URL("stream", API);
    address.protocol = address.protocol.replace("http", "ws");
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.send({ type: "hello", session: this.session });
    this.socket.onclose = () => {
      this.handlers.onLost();
      setTimeout(() => this.open(), RETRY_MS);
    };
    this.socket.onmessage = ({ data }) => {
      if (data instanceof ArrayBuffer) return this.handlers.onFrame(data);
      const message = JSON.parse(data);
      if (message.type === "hello") {
        this.session = message.session;
        localStorage.setItem(KEY, this.session);
      }
      this.handlers.onMessage(message);
    };
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  // Sends a frame of a source, unless much still waits to be sent.
  sendFrame(data, mostWaiting) {
    if (this.socket.readyState === WebSocket.OPEN && this.socket.bufferedAmount < mostWaiting) this.socket.send(data);
  }

  async putImage(file) {
    const answer = await fetch(new URL(`sessions/${this.session}/image`, API), { method: "PUT", body: file });
    if (!answer.ok) throw new Error(await reason(answer));
    return answer.json();
  }

  async chooseModel(name) {
    const answer = await fetch(new URL(`model?${new URLSearchParams({ name })}`, API), { method: "PUT" });
    if (!answer.ok) throw new Error(await reason(answer));
  }

  async downloadWeights() {
    const answer = await fetch(new URL("download", API), { method: "POST" });
    if (!answer.ok) throw new Error(await reason(answer));
  }

  async deleteClip(name) {
    const answer = await fetch(new URL(`sessions/${this.session}/clips/${name}`, API), { method: "DELETE" });
    if (!answer.ok) throw new Error(await reason(answer));
    this.handlers.onMessage({ type: "clip_deleted", name });
  }
}

// Return the reason of a refusal. A proxy that refuses sends no JSON, so its status is the reason.
async function reason(answer) {
  try {
    return (await answer.json()).detail;
  } catch {
    return `the server answered ${answer.status} ${answer.statusText}`;
  }
}
