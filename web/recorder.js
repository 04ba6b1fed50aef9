// Records what is played as a WebM video: the picture, and below it the keys that led to it.

import {UserError} from "./errors.js";

const SCALE = 8, PANEL = 64;
const TYPES = ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm", "video/mp4"];
const CAPS = [["←", -1, 0], ["↓", 0, -1], ["↑", 0, 1], ["→", 1, 0]];

export class Recorder {
  constructor(size) {
    this.canvas = document.createElement("canvas");
    this.canvas.width = size * SCALE;
    this.canvas.height = size * SCALE + PANEL;
    this.context = this.canvas.getContext("2d", {alpha: false});
    this.recorder = null;
  }

  get on() { return this.recorder !== null; }

  start() {
    const type = globalThis.MediaRecorder && TYPES.find((one) => MediaRecorder.isTypeSupported(one));
    if (!type || !this.canvas.captureStream) throw new UserError("This browser cannot record videos.");
    this.parts = [];
    this.recorder = new MediaRecorder(this.canvas.captureStream(30), {mimeType: type, videoBitsPerSecond: 4e6});
    this.recorder.ondataavailable = ({data}) => data.size && this.parts.push(data);
    this.recorder.start(1000);
  }

  // Adds a frame: the canvas that shows it, and the action that led to it.
  add(screen, action) {
    const {context, canvas} = this;
    context.imageSmoothingEnabled = false;
    context.drawImage(screen, 0, 0, canvas.width, canvas.height - PANEL);
    context.fillStyle = "#12141a";
    context.fillRect(0, canvas.height - PANEL, canvas.width, PANEL);
    const x = Math.floor(action / 3) - 1, y = action % 3 - 1, isArrow = action >= 0 && action < 9;
    context.font = "24px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    CAPS.forEach(([cap, dx, dy], i) => {
      const held = isArrow && (dx ? x === dx : y === dy);
      const left = canvas.width / 2 + (i - 1.5) * 56, top = canvas.height - PANEL / 2;
      context.fillStyle = held ? "#f7b942" : "#2c313c";
      context.beginPath();
      context.roundRect(left - 24, top - 20, 48, 40, 8);
      context.fill();
      context.fillStyle = held ? "#12141a" : "#8d96a8";
      context.fillText(cap, left, top + 1);
    });
  }

  // {blob, name} of what was recorded.
  stop() {
    const {recorder} = this;
    this.recorder = null;
    return new Promise((resolve) => {
      recorder.onstop = () => {
        const type = recorder.mimeType.split(";")[0];
        resolve({blob: new Blob(this.parts, {type}), name: `cwm_jax.${type.split("/")[1]}`});
      };
      recorder.stop();
    });
  }
}
