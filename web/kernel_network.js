// The network of a frame after the cached frames of its world, computed by `kernels.wasm`: what
// `cwm_jax/onnx/network.py` writes as ONNX graphs.
// All operations are exactly specified: every device generates the same bits.

import {KernelMemory, layoutOf, memoryFor} from "./kernel_memory.js";
import {Team} from "./kernel_team.js";
import {Prediction} from "./prediction.js";

// The file with the kernels for so many threads.
export const kernelsFile = (threads) => threads > 1 ? "kernels-shared.wasm" : "kernels.wasm";

export class KernelNetwork {
  // kernels: the bytes of `kernelsFile(threads)`; about: model.json; weights: the bytes of weights.bin.
  static async create(kernels, about, weights, threads = 1) {
    const layout = layoutOf(about, threads), memory = memoryFor(layout, threads > 1);
    const team = await Team.create(await WebAssembly.compile(kernels), memory, layout, threads);
    const network = new KernelNetwork(team, about);
    network.memory.fill(team.run, about, weights);
    return network;
  }

  constructor(team, about) {
    this.team = team;
    this.about = about;
    this.sizes = about.network;
    this.contextLevel = about.weights.modulations.shape[0] / (this.sizes.action_values + 1) - 1;
    this.memory = new KernelMemory(team.memory, team.layout);
    this.prediction = new Prediction(about);
  }

  get threads() { return this.team.threads; }

  async release() { this.team.release(); }

  // Appends frames, float32 in [−1, 1], and the actions that led into them.
  async append(world, frames, actions) {
    frames.forEach((frame, i) => this.#encode(world, frame, actions[i]));
  }

  // The frame after this world's, from N(0, 1) noise.
  async frame(world, action, noise, steps) {
    const {noise_clip: clip, first_rows: first, table} = this.about, {memory, prediction} = this;
    const area = memory.areaOf(world), last = world.frames.at(-1), {columns} = memory.layout.outputs;
    const sample = prediction.inPatches(noise);
    for (let i = 0; i < sample.length; i++) sample[i] = Math.min(clip, Math.max(-clip, sample[i]));
    let earlier = this.#showEarlier(world.frames);
    for (const [level, now, after] of table.slice(first[steps], first[steps] + steps)) {
      this.#compute(sample, {row: this.#modulations(level, action), area, count: world.count, alone: false, earlier});
      earlier = false;
      const out = memory.floats(memory.layout.found, this.sizes.tokens * columns);
      prediction.advance(sample, out, columns, last, now, after);
    }
    return prediction.finished(sample, last);
  }

  #encode(world, frame, action) {
    const area = this.memory.areaOf(world), before = world.count ? world.frames : [frame];
    const earlier = this.#showEarlier(before), row = this.#modulations(this.contextLevel, action);
    this.#compute(this.prediction.residual(frame, before.at(-1)), {row, area, count: world.count, alone: true, earlier});
    this.memory.copyNewest(world, area);
    world.frames = [...world.frames, frame];
  }

  #compute(sample, job) {
    const {memory, team} = this;
    memory.floats(memory.layout.sample, sample.length).set(sample);
    team.compute(job);
    memory.buffer = team.memory.buffer;  // another one if a thread was lost
  }

  // Writes the last of these frames in patches, newest first, the oldest repeated; returns whether they
  // were not those of the last call.
  #showEarlier(frames) {
    const {history} = this.sizes, {memory} = this, {order} = this.prediction;
    if (!history) return false;
    const shown = Array.from({length: history}, (_, h) => frames[Math.max(0, frames.length - 1 - h)]);
    if (shown.every((frame, h) => frame === this.shown?.[h])) return false;
    this.shown = shown;
    const rows = memory.floats(memory.layout.earlier, order.length * history);
    for (let h = 0; h < history; h++) {
      const frame = shown[h];
      for (let i = 0, at = 3 * h; i < order.length; i += 3, at += 3 * history)
        for (let c = 0; c < 3; c++) rows[at + c] = frame[order[i + c]];
    }
    return true;
  }

  // The address of the modulations by a noise level and an action.
  #modulations(level, action) {
    const {hidden_size: size, depth, action_values: actions} = this.sizes;
    const row = level * (actions + 1) + (action + actions + 1) % (actions + 1);
    return this.memory.layout.tables.modulations + 4 * row * (12 * depth + 2) * size;
  }
}
