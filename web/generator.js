// The model: graphs in onnxruntime-web, and what a world remembers.
// `cwm_jax/onnx/generator.py` says what the graphs take; `cwm_jax/play/inference/staggered_cache.py`
// what a memory is: two worlds, staggered by half a window, of which the next frame sees the older.

import {frameNoise} from "./noise.js";

const TO_MODEL = Float32Array.from({length: 256}, (_, u) => Math.fround(Math.fround(u / 255) * 2) - 1);

// Frames as uint8 pixels to float32 in [−1, 1], and back, as `cwm_jax/coinrun.py` does both.
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

// One temporal cache: frames, and the keys and values of each, block after block.
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

// The number of the oldest frame still in use when a session has so many frames.
export function firstRemembered(frames, slots) {
  return Math.ceil(Math.max(0, frames - slots) / stride(slots)) * stride(slots);
}

export class Generator {
  // ort: the module; about: model.json; sessions: {denoise, encode}.
  constructor(ort, about, sessions) {
    this.ort = ort;
    this.about = about;
    this.sizes = about.network;
    this.sessions = sessions;
    this.slots = this.sizes.max_frames - 1;
    this.pixels = this.sizes.image_size ** 2 * 3;
    this.noise = null;
    const {tokens, num_heads, hidden_size, depth} = this.sizes;
    this.kvShape = [tokens, num_heads, hidden_size / num_heads];
    this.names = ["keys", "values"].flatMap((part) => Array.from({length: depth}, (_, i) => `${part}_${i}`));
    this.nothing = new Float32Array(tokens * hidden_size);
  }

  // A memory of these frames, float32 each, and the actions that led into them.
  async remembered(frames, actions) {
    const memory = new Memory(this.sizes), start = firstRemembered(frames.length, this.slots);
    await this.#append(memory.inUse, frames.slice(start), actions.slice(start));
    const later = start + stride(this.slots);
    if (frames.length > later) await this.#append(memory.younger, frames.slice(later), actions.slice(later));
    return memory;
  }

  // Takes one more frame into a memory.
  async remember(memory, frame, action) {
    if (memory.inUse.count === this.slots) {
      memory.inUse.clear();
      memory.old = 1 - memory.old;
    }
    const joins = memory.inUse.count >= stride(this.slots);
    await this.#append(memory.inUse, [frame], [action]);
    if (joins) await this.#append(memory.younger, [frame], [action]);
  }

  // The next frame, float32: `steps` denoising steps from the noise of this seed and number.
  async frame(memory, action, {seed, number, steps}) {
    const world = memory.inUse, size = this.sizes.image_size, clip = this.about.noise_clip;
    const feeds = this.#lanes(world, [action]);
    if (this.sizes.history) feeds.earlier = this.#earlier([world.frames]);
    let sample = this.noiseOf(seed, number).map((x) => Math.min(clip, Math.max(-clip, x)));
    const first = this.about.first_rows[steps];
    for (let row = first; row < first + steps; row++) {
      feeds.sample = this.#tensor("float32", sample, [1, size, size, 3]);
      feeds.row = this.#tensor("int32", Int32Array.of(row), []);
      const found = await this.#run("denoise", feeds);
      sample = found[row === first + steps - 1 ? "frame" : "denoised"].data;
    }
    return sample;
  }

  // Made in advance, while nobody waits.
  noiseOf(seed, number) {
    if (this.noise?.seed !== seed || this.noise.number !== number)
      this.noise = {seed, number, values: frameNoise(seed, number, this.pixels)};
    return this.noise.values;
  }

  async #append(world, frames, actions) {
    const size = this.sizes.image_size, past = world.count;
    const feeds = this.#lanes(world, actions);
    const all = new Float32Array(frames.length * this.pixels);
    frames.forEach((frame, i) => all.set(frame, i * this.pixels));
    feeds.frames = this.#tensor("float32", all, [frames.length, size, size, 3]);
    const every = [...world.frames, ...frames];
    if (this.sizes.history)
      feeds.earlier = this.#earlier(frames.map((_, i) => every.slice(0, Math.max(1, past + i))));
    const found = await this.#run("encode", feeds);
    this.names.forEach((name, i) => world.kv[i].set(found[`new_${name}`].data, past * world.each));
    world.frames = every;
  }

  // The last frames before each lane, newest first, the oldest repeated.
  #earlier(befores) {
    const {history, image_size: size} = this.sizes;
    const out = new Float32Array(befores.length * history * this.pixels);
    befores.forEach((frames, lane) => {
      for (let h = 0; h < history; h++)
        out.set(frames[Math.max(0, frames.length - 1 - h)], (lane * history + h) * this.pixels);
    });
    return this.#tensor("float32", out, [befores.length, history, size, size, 3]);
  }

  // Each new frame attends to the past and to those before it; without a past, not to the blank one.
  #lanes(world, actions) {
    const past = Math.max(1, world.count), lanes = actions.length, row = past + lanes;
    const attends = new Float32Array(lanes * row);
    for (let lane = 0; lane < lanes; lane++)
      for (let to = world.count ? 0 : 1; to <= past + lane; to++) attends[lane * row + to] = 1;
    const feeds = {
      action: this.#tensor("int32", Int32Array.from(actions), [lanes]),
      place: this.#tensor("int32", Int32Array.from(actions, (_, i) => world.count + i), [lanes]),
      attends: this.#tensor("float32", attends, [lanes, row]),
    };
    this.names.forEach((name, i) => {
      const data = world.count ? world.kv[i].subarray(0, past * world.each) : this.nothing;
      feeds[name] = this.#tensor("float32", data, [past, ...this.kvShape]);
    });
    return feeds;
  }

  #tensor(type, data, shape) {
    return new this.ort.Tensor(type, data, shape);
  }

  #run(graph, feeds) {
    return this.sessions[graph].run(feeds);
  }
}
