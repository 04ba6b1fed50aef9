// Generates frames with a network (`kernel_network.js` or `onnx_network.js`) and the KV caches of a
// world. As in `cwm_jax/sampling/staggered_cache.py`, a memory is two caches, staggered by half a
// window; the next frame attends to the older one.

import {frameNoise} from "./noise.js";

const TO_MODEL = Float32Array.from({length: 256}, (_, u) => Math.fround(Math.fround(u / 255) * 2) - 1);

// Frames as uint8 pixels to float32 in [−1, 1], and back, as in `cwm_jax/coinrun.py`.
export const toModel = (pixels) => Float32Array.from(pixels, (u) => TO_MODEL[u]);

export function toPixels(frame) {
  const out = new Uint8Array(frame.length);
  for (let i = 0; i < out.length; i++) {
    const value = Math.fround((Math.min(1, Math.max(-1, frame[i])) + 1) * 127.5);
    const down = Math.floor(value), rest = value - down;
    out[i] = rest > .5 || (rest === .5 && down % 2) ? down + 1 : down;
  }
  return out;
}

// One temporal cache: frames, and the keys of each, then the values, block after block. A network writes
// to it.
class World {
  constructor(sizes, room) {
    this.each = sizes.tokens * sizes.hidden_size;
    this.kv = Array.from({length: 2 * sizes.depth}, () => new Float32Array(room * this.each));
    this.frames = [];
  }

  get count() { return this.frames.length; }
  clear() { this.frames = []; }
}

export class Memory {
  constructor(sizes) {
    const slots = sizes.max_frames - 1;
    this.worlds = [new World(sizes, slots), new World(sizes, slots)];
    this.old = 0;
  }

  get inUse() { return this.worlds[this.old]; }
  get younger() { return this.worlds[1 - this.old]; }
}

export const stride = (slots) => Math.floor(slots / 2) + 1;

// The number of the oldest cached frame of a session with so many frames.
export function firstRemembered(frames, slots) {
  return Math.ceil(Math.max(0, frames - slots) / stride(slots)) * stride(slots);
}

export class Generator {
  // about: model.json; network: what computes frames, and keys and values.
  constructor(about, network) {
    this.about = about;
    this.sizes = about.network;
    this.network = network;
    this.slots = this.sizes.max_frames - 1;
    this.pixels = this.sizes.image_size ** 2 * 3;
    this.noise = null;
  }

  // The KV caches of these frames, float32 each, and the actions that led into them.
  async remembered(frames, actions) {
    const memory = new Memory(this.sizes), start = firstRemembered(frames.length, this.slots);
    await this.network.append(memory.inUse, frames.slice(start), actions.slice(start));
    const later = start + stride(this.slots);
    if (frames.length > later) await this.network.append(memory.younger, frames.slice(later), actions.slice(later));
    return memory;
  }

  // Adds a frame to a memory.
  async remember(memory, frame, action) {
    if (memory.inUse.count === this.slots) {
      memory.inUse.clear();
      memory.old = 1 - memory.old;
    }
    const joins = memory.inUse.count >= stride(this.slots);
    await this.network.append(memory.inUse, [frame], [action]);
    if (joins) await this.network.append(memory.younger, [frame], [action]);
  }

  // The next frame, float32: `steps` denoising steps from the noise of this seed and number.
  frame(memory, action, {seed, number, steps}) {
    return this.network.frame(memory.inUse, action, this.noiseOf(seed, number), steps);
  }

  // Sampled in advance, after a frame was shown.
  noiseOf(seed, number) {
    if (this.noise?.seed !== seed || this.noise.number !== number)
      this.noise = {seed, number, values: frameNoise(seed, number, this.pixels)};
    return this.noise.values;
  }
}
