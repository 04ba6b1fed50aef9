// The network of a frame after the cached frames of its world, computed by `kernels.wasm`: what
// `cwm_jax/onnx/network.py` writes as ONNX graphs.
// All operations are exactly specified: every device generates the same bits.

import {KernelMemory} from "./kernel_memory.js";
import {Prediction} from "./prediction.js";

export class KernelNetwork {
  // kernels: the bytes of kernels.wasm; about: model.json; weights: the bytes of weights.bin.
  static async create(kernels, about, weights) {
    const {instance} = await WebAssembly.instantiate(kernels, {});
    return new KernelNetwork(instance.exports, about, weights);
  }

  constructor(run, about, weights) {
    this.run = run;
    this.about = about;
    this.sizes = about.network;
    this.headSize = this.sizes.hidden_size / this.sizes.num_heads;
    this.contextLevel = about.weights.modulations.shape[0] / (this.sizes.action_values + 1) - 1;
    this.memory = new KernelMemory(run, about, weights);
    this.prediction = new Prediction(about);
  }

  async release() {}

  // Appends frames, float32 in [−1, 1], and the actions that led into them.
  async append(world, frames, actions) {
    frames.forEach((frame, i) => this.#encode(world, frame, actions[i]));
  }

  // The frame after this world's, from N(0, 1) noise.
  async frame(world, action, noise, steps) {
    const {noise_clip: clip, first_rows: first, table} = this.about, {memory, prediction} = this;
    const area = memory.areaOf(world), last = world.frames.at(-1), {columns} = memory.outputs;
    const sample = prediction.inPatches(noise).map((value) => Math.min(clip, Math.max(-clip, value)));
    this.#historyTokens(world.frames);
    for (const [level, now, after] of table.slice(first[steps], first[steps] + steps)) {
      const row = this.#tokens(sample, level, action);
      this.#blocks(row, area, world.count);
      this.#outputs(row);
      prediction.advance(sample, memory.floats(memory.wide, this.sizes.tokens * columns), columns, last, now, after);
    }
    return prediction.added(sample, last);
  }

  #encode(world, frame, action) {
    const area = this.memory.areaOf(world), before = world.count ? world.frames : [frame];
    this.#historyTokens(before);
    const row = this.#tokens(this.prediction.residual(frame, before.at(-1)), this.contextLevel, action);
    this.#blocks(row, area, world.count, true);
    this.memory.copyNewest(world, area);
    world.frames = [...world.frames, frame];
  }

  // Writes what the tokens of a frame after these get from them to `fromHistory`; the frame is denoised in
  // several steps and then encoded, all with the same.
  #historyTokens(frames) {
    const {history, tokens} = this.sizes, {memory} = this, {order, patch} = this.prediction;
    if (!history) return;
    const shown = Array.from({length: history}, (_, h) => frames[Math.max(0, frames.length - 1 - h)]);
    if (shown.every((frame, h) => frame === this.shown?.[h])) return;
    this.shown = shown;
    const rows = memory.floats(memory.wide, tokens * patch * history);
    shown.forEach((frame, h) => {
      for (let i = 0, at = 3 * h; i < order.length; i += 3, at += 3 * history)
        for (let c = 0; c < 3; c++) rows[at + c] = frame[order[i + c]];
    });
    this.#product(memory.historyIn, memory.wide, memory.fromHistory);
  }

  // Writes the tokens of a sample, in patches, to `x`; returns the address of the modulations.
  #tokens(sample, level, action) {
    const {hidden_size: size, depth, action_values: actions} = this.sizes, {memory} = this;
    memory.floats(memory.wide, sample.length).set(sample);
    if (memory.historyIn) memory.floats(memory.x, memory.each).set(memory.floats(memory.fromHistory, memory.each));
    this.#product(memory.patchIn, memory.wide, memory.x, memory.historyIn ? memory.ones : 0);
    const row = level * (actions + 1) + (action + actions + 1) % (actions + 1);
    return memory.tables.modulations + 4 * row * (12 * depth + 2) * size;
  }

  // All blocks: `x` to the stream after the last. Writes keys and values to the area's slot `count`; with
  // `alone`, nothing else is of use.
  #blocks(row, area, count, alone = false) {
    const {depth} = this.sizes;
    for (let block = 0; block < depth; block++) {
      this.#space(row, block);
      this.#time(row, block, area, count, alone && block === depth - 1);
    }
  }

  #space(row, block) {
    const {tokens, num_heads: heads, hidden_size: size} = this.sizes, {memory} = this, {tables} = memory;
    const layer = memory.layers[2 * block], vectors = row + 4 * 12 * block * size;
    this.#qkv(layer, vectors, [tables["rotation.space.cos"], tables["rotation.space.sin"], this.headSize], memory.k, memory.v);
    this.run.over_space(memory.q, memory.k, memory.v, memory.attended, tokens, heads, this.headSize, memory.scratch);
    this.#finish(layer, vectors);
  }

  #time(row, block, area, count, stops) {
    const {tokens, num_heads: heads, hidden_size: size, depth} = this.sizes, {memory} = this, {tables} = memory;
    const layer = memory.layers[2 * block + 1], vectors = row + 4 * (12 * block + 6) * size, slot = 4 * count * memory.each, turn = 4 * count * this.headSize;
    const keys = area[block], values = area[depth + block];
    this.#qkv(layer, vectors, [tables["rotation.time.cos"] + turn, tables["rotation.time.sin"] + turn, 0], keys + slot, values + slot);
    if (stops) return;
    this.run.over_time(memory.q, keys, values, memory.attended, count + 1, tokens, heads, this.headSize, memory.scratch);
    this.#finish(layer, vectors);
  }

  // Rotated queries to `q`, rotated keys and values to these addresses.
  #qkv({qkv}, vectors, turn, keys, values) {
    const {tokens, num_heads: heads, hidden_size: size, qk_norm: unit} = this.sizes, {memory} = this, stride = 3 * size;
    this.#norm(vectors, qkv);
    this.#multiply(qkv, memory.wide);
    this.run.rotate(memory.wide, stride, memory.q, ...turn, tokens, heads, this.headSize, Number(unit));
    this.run.rotate(memory.wide + 4 * size, stride, keys, ...turn, tokens, heads, this.headSize, Number(unit));
    this.run.gather(memory.wide + 8 * size, stride, values, tokens, size);
  }

  #finish({out, mlp_in: wider, mlp_out: narrower}, vectors) {
    const {tokens, hidden_size: size} = this.sizes, {memory} = this, gate = 4 * 2 * size, second = 4 * 3 * size;
    this.#product(out, memory.attended, memory.x, vectors + gate);
    this.#norm(vectors + second, wider);
    this.#multiply(wider, memory.wide);
    this.run.gelu(memory.wide, memory.left, memory.leftSteps, tokens, wider.width, narrower.limit);
    this.#multiply(narrower, memory.x, vectors + second + gate);
  }

  #outputs(row) {
    const {depth, hidden_size: size} = this.sizes, {memory} = this;
    this.#norm(row + 4 * 12 * depth * size, memory.outputs);
    this.#multiply(memory.outputs, memory.wide);
  }

  // Normed and modulated `x` as the left side of a product; shift and scale are at `vectors`.
  #norm(vectors, {limit}) {
    const {tokens, hidden_size: size} = this.sizes, {memory} = this;
    this.run.norm(memory.x, vectors, vectors + 4 * size, memory.left, memory.leftSteps, tokens, size, limit, memory.scratch);
  }

  #product(product, from, to, gate = 0) {
    const {memory} = this;
    this.run.quantise(from, memory.left, memory.leftSteps, this.sizes.tokens, product.depth, product.limit);
    this.#multiply(product, to, gate);
  }

  #multiply({kernel, steps, bias, depth, columns}, to, gate = 0) {
    const {memory} = this;
    this.run.product(memory.left, memory.leftSteps, kernel, steps, bias, gate, to, this.sizes.tokens, depth, columns);
  }
}
