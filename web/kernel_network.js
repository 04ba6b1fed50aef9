// The network of a frame after the cached frames of its world, computed by `kernels.wasm`: what
// `cwm_jax/onnx/network.py` and `cwm_jax/onnx/prediction.py` write as ONNX graphs.
// All operations are exactly specified: every device generates the same bits.

const WORLDS = 2;  // whose keys and values are kept in the kernels' memory
const PRODUCTS = ["qkv", "out", "mlp_in", "mlp_out"];
const GROUP = 8;  // columns that the kernels compute together

const padded = (size, to = GROUP) => Math.ceil(size / to) * to;

// Whether the kernels compute this network: `network` of model.json.
export function supports({tokens, hidden_size: size, num_heads: heads, patch_size: patch, warp_reach: warp}) {
  return !warp && [tokens, size / heads, patch ** 2 * 3].every((count) => count % GROUP === 0);
}

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
    this.slots = this.sizes.max_frames - 1;
    this.headSize = this.sizes.hidden_size / this.sizes.num_heads;
    this.each = this.sizes.tokens * this.sizes.hidden_size;
    this.patch = this.sizes.patch_size ** 2 * 3;  // numbers of a patch
    this.worlds = Array(WORLDS).fill(null);  // the last used is the first
    this.#reserve(weights);
    this.#fill(weights);
    this.order = patchOrder(this.sizes);
    this.contextLevel = about.weights.modulations.shape[0] / (this.sizes.action_values + 1) - 1;
  }

  async release() {}

  // Appends frames, float32 in [−1, 1], and the actions that led into them.
  async append(world, frames, actions) {
    frames.forEach((frame, i) => this.#encode(world, frame, actions[i]));
  }

  // The frame after this world's, from N(0, 1) noise.
  async frame(world, action, noise, steps) {
    const {noise_clip: clip, first_rows: first, table} = this.about;
    const area = this.#area(world), sample = new Float32Array(noise.length);
    this.order.forEach((pixel, i) => { sample[i] = Math.min(clip, Math.max(-clip, noise[pixel])); });
    this.#historyTokens(world.frames);
    for (const [level, now, after] of table.slice(first[steps], first[steps] + steps)) {
      const row = this.#tokens(sample, level, action);
      this.#blocks(row, area, world.count);
      this.#outputs(row);
      this.#advance(sample, world.frames.at(-1), now, after);
    }
    return this.#added(sample, world.frames.at(-1));
  }

  #encode(world, frame, action) {
    const {residual_scale: scale, history} = this.sizes, count = world.count;
    const area = this.#area(world), before = count ? world.frames : [frame];
    const last = before.at(-1), sample = new Float32Array(frame.length);
    this.order.forEach((pixel, i) => { sample[i] = history ? (frame[pixel] - last[pixel]) / scale : frame[pixel]; });
    this.#historyTokens(before);
    this.#blocks(this.#tokens(sample, this.contextLevel, action), area, count, true);
    area.forEach((address, i) => {
      world.kv[i].set(this.#floats(address + 4 * count * this.each, this.each), count * this.each);
    });
    world.frames = [...world.frames, frame];
  }

  // --- memory

  #reserve(weights) {
    const {tokens, hidden_size: size, depth, history, max_frames: frames} = this.sizes;
    let next = padded(this.run.__heap_base.value, 64);
    const take = (bytes) => { const at = next; next = padded(next + bytes, 64); return at; };
    const entry = this.about.weights;
    const product = (name) => {
      const [rows, width] = entry[`${name}.kernel`].shape, columns = padded(width);
      const limit = Math.min(32767, Math.floor(2 ** 16.5 / Math.sqrt(rows)));  // as many bits left as right
      return {name, depth: rows, width, columns, limit, kernel: take(2 * rows * columns), steps: take(4 * columns), bias: take(4 * columns)};
    };
    this.patchIn = product("patch_in");
    this.historyIn = history ? product("history_in") : null;
    this.outputsOut = product("outputs");
    this.layers = Array.from({length: 2 * depth}, (_, half) => {
      const layer = `blocks.${half >> 1}.${half % 2 ? "temporal" : "spatial"}`;
      return Object.fromEntries(PRODUCTS.map((part) => [part, product(`${layer}.${part}`)]));
    });
    this.products = [this.patchIn, this.outputsOut, ...this.layers.flatMap(Object.values)];
    if (history) this.products.push(this.historyIn);
    const table = (name) => ({name, count: entry[name].shape.reduce((a, b) => a * b), at: take(4 * entry[name].shape.reduce((a, b) => a * b))});
    this.tables = ["modulations", ...["space", "time"].flatMap((axis) => [`rotation.${axis}.cos`, `rotation.${axis}.sin`])].map(table);
    [this.modulations, this.spaceCos, this.spaceSin, this.timeCos, this.timeSin] = this.tables.map(({at}) => at);
    const deepest = Math.max(...this.products.map((p) => p.depth)), widest = Math.max(...this.products.map((p) => p.columns));
    this.left = take(2 * tokens * deepest);
    this.rowSteps = take(4 * tokens);
    this.wide = take(4 * tokens * Math.max(deepest, widest));
    [this.x, this.q, this.k, this.v, this.attended, this.fromHistory] = Array.from({length: 6}, () => take(4 * this.each));
    this.scratch = take(4 * Math.max(tokens * (tokens + this.headSize), size, frames + 3));
    this.ones = take(4 * size);
    this.areas = Array.from({length: WORLDS}, () => Array.from({length: 2 * depth}, () => take(4 * frames * this.each)));
    this.source = take(Math.max(...Object.values(entry).map(({shape}) => 4 * shape.reduce((a, b) => a * b))));
    const {memory} = this.run, pages = Math.ceil(next / 65536) - memory.buffer.byteLength / 65536;
    if (pages > 0) memory.grow(pages);
  }

  #fill(weights) {
    const bytes = new Uint8Array(this.run.memory.buffer);
    const numbers = (name) => {
      const {offset, shape, dtype} = this.about.weights[name], half = dtype === "float16";
      const count = shape.reduce((a, b) => a * b), length = count * (half ? 2 : 4);
      return {half, count, data: weights.subarray(offset, offset + length)};
    };
    const floats = (name, at) => {
      const {half, count, data} = numbers(name);
      bytes.set(data, this.source);
      this.run.widen(this.source, Number(half), count, at);
    };
    for (const {name, depth, width, limit, kernel, steps, bias} of this.products) {
      const {half, data} = numbers(`${name}.kernel`);
      bytes.set(data, this.source);
      this.run.pack(this.source, Number(half), depth, width, limit, kernel, steps);
      if (this.about.weights[`${name}.bias`]) floats(`${name}.bias`, bias);
    }
    for (const {name, at} of this.tables) floats(name, at);
    this.#floats(this.ones, this.sizes.hidden_size).fill(1);
    const {hidden_size: size, depth} = this.sizes, vectors = 12 * depth + 2, rows = this.about.weights.modulations.shape[0];
    const isScale = (i) => i === vectors - 1 || (i < 12 * depth && (i % 6 === 1 || i % 6 === 4));
    for (let row = 0; row < rows; row++)
      for (let i = 0; i < vectors; i++)
        if (isScale(i)) {
          const scale = this.#floats(this.modulations + 4 * (row * vectors + i) * size, size);
          scale.forEach((value, at) => { scale[at] = value + 1; });
        }
  }

  #floats(address, count) { return new Float32Array(this.run.memory.buffer, address, count); }

  // The keys and values of a world in the kernels' memory; copied there unless it was one of the last used.
  #area(world) {
    const at = this.worlds.indexOf(world);
    const from = at < 0 ? WORLDS - 1 : at, area = this.areas[from];
    for (const list of [this.worlds, this.areas]) list.unshift(...list.splice(from, 1));
    this.worlds[0] = world;
    if (at < 0) area.forEach((address, i) => {
      const count = world.count * this.each;
      this.#floats(address, count).set(world.kv[i].subarray(0, count));
    });
    return area;
  }

  // --- layers

  // Writes what the tokens of a frame after these get from them to `fromHistory`; the frame is denoised in
  // several steps and then encoded, all with the same.
  #historyTokens(frames) {
    const {history, tokens} = this.sizes;
    if (!history) return;
    const shown = Array.from({length: history}, (_, h) => frames[Math.max(0, frames.length - 1 - h)]);
    if (shown.every((frame, h) => frame === this.shown?.[h])) return;
    this.shown = shown;
    const rows = this.#floats(this.wide, tokens * this.patch * history);
    shown.forEach((frame, h) => {
      for (let i = 0, at = 3 * h; i < this.order.length; i += 3, at += 3 * history)
        for (let c = 0; c < 3; c++) rows[at + c] = frame[this.order[i + c]];
    });
    this.#product(this.historyIn, this.wide, this.fromHistory);
  }

  // Writes the tokens of a sample, in patches, to `x`; returns the address of the modulations.
  #tokens(sample, level, action) {
    const {hidden_size: size, depth, action_values: actions} = this.sizes;
    this.#floats(this.wide, sample.length).set(sample);
    if (this.historyIn) this.#floats(this.x, this.each).set(this.#floats(this.fromHistory, this.each));
    this.#product(this.patchIn, this.wide, this.x, this.historyIn ? this.ones : 0);
    const row = level * (actions + 1) + (action + actions + 1) % (actions + 1);
    return this.modulations + 4 * row * (12 * depth + 2) * size;
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
    const {tokens, num_heads: heads, hidden_size: size} = this.sizes, layer = this.layers[2 * block];
    const vectors = row + 4 * 12 * block * size;
    this.#qkv(layer, vectors, [this.spaceCos, this.spaceSin, this.headSize], this.k, this.v);
    this.run.over_space(this.q, this.k, this.v, this.attended, tokens, heads, this.headSize, this.scratch);
    this.#finish(layer, vectors);
  }

  #time(row, block, area, count, stops) {
    const {tokens, num_heads: heads, hidden_size: size, depth} = this.sizes, layer = this.layers[2 * block + 1];
    const vectors = row + 4 * (12 * block + 6) * size, slot = 4 * count * this.each, turn = 4 * count * this.headSize;
    const keys = area[block], values = area[depth + block];
    this.#qkv(layer, vectors, [this.timeCos + turn, this.timeSin + turn, 0], keys + slot, values + slot);
    if (stops) return;
    this.run.over_time(this.q, keys, values, this.attended, count + 1, tokens, heads, this.headSize, this.scratch);
    this.#finish(layer, vectors);
  }

  // Rotated queries to `q`, rotated keys and values to these addresses.
  #qkv({qkv}, vectors, turn, keys, values) {
    const {tokens, num_heads: heads, hidden_size: size, qk_norm: unit} = this.sizes, stride = 3 * size;
    this.#norm(vectors, qkv);
    this.#multiply(qkv, this.wide);
    this.run.rotate(this.wide, stride, this.q, ...turn, tokens, heads, this.headSize, Number(unit));
    this.run.rotate(this.wide + 4 * size, stride, keys, ...turn, tokens, heads, this.headSize, Number(unit));
    this.run.gather(this.wide + 8 * size, stride, values, tokens, size);
  }

  #finish({out, mlp_in: wider, mlp_out: narrower}, vectors) {
    const {tokens, hidden_size: size} = this.sizes, gate = 4 * 2 * size, second = 4 * 3 * size;
    this.#product(out, this.attended, this.x, vectors + gate);
    this.#norm(vectors + second, wider);
    this.#multiply(wider, this.wide);
    this.run.gelu(this.wide, this.left, this.rowSteps, tokens, wider.width, narrower.limit);
    this.#multiply(narrower, this.x, vectors + second + gate);
  }

  #outputs(row) {
    const {depth, hidden_size: size} = this.sizes;
    this.#norm(row + 4 * 12 * depth * size, this.outputsOut);
    this.#multiply(this.outputsOut, this.wide);
  }

  // Normed and modulated `x` as the left side of a product; shift and scale are at `vectors`.
  #norm(vectors, {limit}) {
    const {tokens, hidden_size: size} = this.sizes;
    this.run.norm(this.x, vectors, vectors + 4 * size, this.left, this.rowSteps, tokens, size, limit, this.scratch);
  }

  #product(product, from, to, gate = 0) {
    this.run.quantise(from, this.left, this.rowSteps, this.sizes.tokens, product.depth, product.limit);
    this.#multiply(product, to, gate);
  }

  #multiply({kernel, steps, bias, depth, columns}, to, gate = 0) {
    this.run.product(this.left, this.rowSteps, kernel, steps, bias, gate, to, this.sizes.tokens, depth, columns);
  }

  // --- what the outputs mean; see `cwm_jax.diffusion.denoiser`

  // One denoising step of a sample in patches, from ᾱ = now to after.
  #advance(sample, last, now, after) {
    const {tokens, residual_scale: scale, displacement} = this.sizes, {columns} = this.outputsOut;
    const out = this.#floats(this.wide, tokens * columns), noise = 1 - now, sigma = Math.sqrt(noise), root = Math.sqrt(now);
    const guess = displacement ? this.#displaced(out, columns, last) : null;
    const [low, high] = this.about.log_variances, back = Math.sqrt(1 / now), less = Math.sqrt(1 / now - 1);
    const keep = Math.sqrt(after), rest = Math.sqrt(1 - after);
    for (let token = 0, i = 0; token < tokens; token++) {
      const from = token * columns;
      const variance = guess ? Math.exp(Math.min(high, Math.max(low, out[from + this.patch]))) : 1;
      const whole = variance * now + noise, mixed = (1 - variance) * root * sigma, unknown = Math.sqrt(variance / whole);
      for (let at = from; at < from + this.patch; at++, i++) {
        let velocity = out[at];
        if (guess) velocity = (sample[i] * mixed - guess[i] / scale * sigma) / whole + velocity * unknown;
        const clean = sample[i] * root - velocity * sigma;
        sample[i] = clean * keep + (sample[i] * back - clean) / less * rest;
      }
    }
  }

  // How each small patch's copy, by its most likely displacement, differs from the last frame.
  #displaced(out, columns, last) {
    const {image_size: size, patch_size: side, displacement} = this.sizes;
    const {down, across, patch: small, cost} = displacement, inside = side / small, reach = 2 * across + 1;
    const guess = new Float32Array(last.length), edge = (place) => Math.min(size - 1, Math.max(0, place));
    const grid = size / side;
    for (let block = 0; block < (size / small) ** 2; block++) {
      const top = Math.floor(block / (size / small)), left = block % (size / small);
      const token = Math.floor(top / inside) * grid + Math.floor(left / inside);
      const place = top % inside * inside + left % inside;
      const chosen = best(out, token * columns + this.patch + 1 + place * cost.length, cost);
      const dy = Math.floor(chosen / reach) - down, dx = chosen % reach - across;
      for (let y = 0; y < small; y++) for (let x = 0; x < small; x++) {
        const row = top * small + y, column = left * small + x;
        const to = token * this.patch + (row % side * side + column % side) * 3;
        const from = (edge(row + dy) * size + edge(column + dx)) * 3, here = (row * size + column) * 3;
        for (let c = 0; c < 3; c++) guess[to + c] = last[from + c] - last[here + c];
      }
    }
    return guess;
  }

  // The frame of a denoised sample.
  #added(sample, last) {
    const {history, residual_scale: scale} = this.sizes, frame = new Float32Array(sample.length);
    this.order.forEach((pixel, i) => {
      frame[pixel] = history ? Math.min(1, Math.max(-1, last[pixel] + scale * sample[i])) : sample[i];
    });
    return frame;
  }
}

// The index of the largest logit less its cost.
function best(logits, start, cost) {
  let found = 0, most = -Infinity;
  for (let i = 0; i < cost.length; i++) {
    const value = logits[start + i] - cost[i];
    if (value > most) { most = value; found = i; }
  }
  return found;
}

// For each number of the patches, in the order token, row, column, channel, its index in the frame.
function patchOrder({image_size: size, patch_size: side}) {
  const grid = size / side, order = new Int32Array(size * size * 3);
  for (let i = 0; i < order.length; i++) {
    const channel = i % 3, column = Math.floor(i / 3) % side, row = Math.floor(i / (3 * side)) % side;
    const token = Math.floor(i / (3 * side * side));
    const y = Math.floor(token / grid) * side + row, x = token % grid * side + column;
    order[i] = (y * size + x) * 3 + channel;
  }
  return order;
}
