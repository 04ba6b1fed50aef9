// The memory of `kernels.wasm`: packed weights, tables, buffers, and the keys and values of two worlds.

const WORLDS = 2;  // whose keys and values are kept
const GROUP = 8;  // columns that the kernels compute together
const PRODUCTS = ["qkv", "out", "mlp_in", "mlp_out"];

const padded = (size, to) => Math.ceil(size / to) * to;
const countOf = ({shape}) => shape.reduce((a, b) => a * b);

// Whether the kernels compute this network: `network` of model.json.
export function supports({tokens, hidden_size: size, num_heads: heads, patch_size: patch, warp_reach: warp}) {
  return !warp && [tokens, size / heads, patch ** 2 * 3].every((count) => count % GROUP === 0);
}

export class KernelMemory {
  // run: the kernels; about: model.json; weights: the bytes of weights.bin.
  constructor(run, about, weights) {
    this.run = run;
    this.sizes = about.network;
    this.entries = about.weights;
    this.each = this.sizes.tokens * this.sizes.hidden_size;
    this.next = padded(run.__heap_base.value, 64);
    this.#reserveWeights();
    this.#reserveBuffers();
    const {memory} = run, pages = Math.ceil(this.next / 65536) - memory.buffer.byteLength / 65536;
    if (pages > 0) memory.grow(pages);
    this.bytes = new Uint8Array(memory.buffer);
    this.worlds = Array(WORLDS).fill(null);  // the last used is the first
    this.#fill(weights);
  }

  floats(address, count) { return new Float32Array(this.bytes.buffer, address, count); }

  // The addresses of a world's keys and values, for each block, with room for one more frame. They are
  // copied there unless the world was one of the last used.
  areaOf(world) {
    const found = this.worlds.indexOf(world), from = found < 0 ? WORLDS - 1 : found, area = this.areas[from];
    for (const list of [this.worlds, this.areas]) list.unshift(...list.splice(from, 1));
    this.worlds[0] = world;
    const count = world.count * this.each;
    if (found < 0) area.forEach((address, i) => this.floats(address, count).set(world.kv[i].subarray(0, count)));
    return area;
  }

  // Copies the newest keys and values of an area to its world.
  copyNewest(world, area) {
    const at = world.count * this.each;
    area.forEach((address, i) => world.kv[i].set(this.floats(address + 4 * at, this.each), at));
  }

  #take(bytes) {
    const at = this.next;
    this.next = padded(at + bytes, 64);
    return at;
  }

  #reserveWeights() {
    const {depth, history} = this.sizes;
    const product = (name) => {
      const [rows, width] = this.entries[`${name}.kernel`].shape, columns = padded(width, GROUP);
      const limit = Math.min(32767, Math.floor(2 ** 16.5 / Math.sqrt(rows)));  // as many bits left as right
      const [kernel, steps, bias] = [2 * rows * columns, 4 * columns, 4 * columns].map((bytes) => this.#take(bytes));
      return {name, depth: rows, width, columns, limit, kernel, steps, bias};
    };
    this.patchIn = product("patch_in");
    this.historyIn = history ? product("history_in") : null;
    this.outputs = product("outputs");
    this.layers = Array.from({length: 2 * depth}, (_, half) => {
      const layer = `blocks.${half >> 1}.${half % 2 ? "temporal" : "spatial"}`;
      return Object.fromEntries(PRODUCTS.map((part) => [part, product(`${layer}.${part}`)]));
    });
    const single = [this.patchIn, this.historyIn, this.outputs].filter(Boolean);
    this.products = [...single, ...this.layers.flatMap(Object.values)];
    const table = (name) => this.#take(4 * countOf(this.entries[name]));
    this.tables = Object.fromEntries(["modulations", "rotation.space.cos", "rotation.space.sin",
      "rotation.time.cos", "rotation.time.sin"].map((name) => [name, table(name)]));
  }

  #reserveBuffers() {
    const {tokens, hidden_size: size, num_heads: heads, depth, max_frames: frames} = this.sizes;
    const most = (key) => Math.max(...this.products.map((product) => product[key]));
    this.left = this.#take(2 * tokens * most("depth"));  // the left side of a product
    this.leftSteps = this.#take(4 * tokens);
    this.wide = this.#take(4 * tokens * Math.max(most("depth"), most("columns")));
    for (const name of ["x", "q", "k", "v", "attended", "fromHistory"]) this[name] = this.#take(4 * this.each);
    this.scratch = this.#take(4 * Math.max(tokens * (tokens + size / heads), size, frames + 3));
    this.ones = this.#take(4 * size);
    this.areas = Array.from({length: WORLDS}, () => Array.from({length: 2 * depth}, () => this.#take(4 * frames * this.each)));
    this.source = this.#take(4 * Math.max(...Object.values(this.entries).map(countOf)));  // of one weight, as stored
  }

  #fill(weights) {
    for (const {name, depth, width, limit, kernel, steps, bias} of this.products) {
      const half = this.#load(`${name}.kernel`, weights);
      this.run.pack(this.source, half, depth, width, limit, kernel, steps);
      if (this.entries[`${name}.bias`]) this.#widen(`${name}.bias`, weights, bias);
    }
    for (const [name, address] of Object.entries(this.tables)) this.#widen(name, weights, address);
    this.floats(this.ones, this.sizes.hidden_size).fill(1);
    this.#addOneToScales();
  }

  #widen(name, weights, address) {
    const half = this.#load(name, weights);
    this.run.widen(this.source, half, countOf(this.entries[name]), address);
  }

  // Copies a weight to `source`; returns 1 if it is float16, else 0.
  #load(name, weights) {
    const entry = this.entries[name], half = entry.dtype === "float16";
    this.bytes.set(weights.subarray(entry.offset, entry.offset + countOf(entry) * (half ? 2 : 4)), this.source);
    return Number(half);
  }

  #addOneToScales() {
    const {hidden_size: size, depth} = this.sizes, [rows] = this.entries.modulations.shape, vectors = 12 * depth + 2;
    const isScale = (i) => (i < 12 * depth ? i % 6 === 1 || i % 6 === 4 : i === vectors - 1);
    for (let i = 0; i < rows * vectors; i++) {
      if (!isScale(i % vectors)) continue;
      const scale = this.floats(this.tables.modulations + 4 * i * size, size);
      for (let at = 0; at < size; at++) scale[at] += 1;
    }
  }
}
