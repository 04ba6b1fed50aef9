// Generates frames with a network (`kernel_network.js` or `onnx_network.js`) and the KV caches of a
// world. As in `cwm_jax/sampling/staggered_cache.py`, a player has two, staggered by half a window;
// the next frame attends to the older one.

import {frameNoise} from "./noise.js";

const TO_MODEL = Float32Array.from({length: 256}, (_, u) => Math.fround(Math.fround(u / 255) * 2) - 1);

// Frames as uint8 pixels to float32 in [−1, 1], and back, as in `cwm_jax/coinrun.py`.
export function toModel(pixels) {
  const out = new Float32Array(pixels.length);
  for (let i = 0; i < out.length; i++) out[i] = TO_MODEL[pixels[i]];
  return out;
}

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

export class StaggeredCache {
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
export function firstCached(frames, slots) {
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
  async cacheOf(frames, actions) {
    const cache = new StaggeredCache(this.sizes), start = firstCached(frames.length, this.slots);
    await this.network.append(cache.inUse, frames.slice(start), actions.slice(start));
    const later = start + stride(this.slots);
    if (frames.length > later) await this.network.append(cache.younger, frames.slice(later), actions.slice(later));
    return cache;
  }

  // Appends a frame to a cache.
  async append(cache, frame, action) {
    if (cache.inUse.count === this.slots) {
      cache.inUse.clear();
      cache.old = 1 - cache.old;
    }
    const joins = cache.inUse.count >= stride(this.slots);
    await this.network.append(cache.inUse, [frame], [action]);
    if (joins) await this.network.append(cache.younger, [frame], [action]);
  }

  // The next frame, float32: `steps` denoising steps from the noise of this seed and number.
  frame(cache, action, {seed, number, steps}) {
    return this.network.frame(cache.inUse, action, this.noiseOf(seed, number), steps);
  }

  // Sampled in advance, after a frame was shown.
  noiseOf(seed, number) {
    if (this.noise?.seed !== seed || this.noise.number !== number)
      this.noise = {seed, number, values: frameNoise(seed, number, this.pixels)};
    return this.noise.values;
  }
}
