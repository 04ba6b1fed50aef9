// The memory of the kernels: packed weights, tables, buffers, and the keys and values of two worlds.

const WORLDS = 2;  // whose keys and values are kept
const GROUP = 8;  // columns that the kernels compute together
const PRODUCTS = ["qkv", "out", "mlp_in", "mlp_out"];
const PAGE = 65536;
export const CONTROL = 64;  // integers by which threads communicate

const padded = (size, to) => Math.ceil(size / to) * to;
const countOf = ({shape}) => shape.reduce((a, b) => a * b);

// Whether the kernels compute this network: `network` of model.json.
export function supports({tokens, hidden_size: size, num_heads: heads, patch_size: patch, warp_reach: warp}) {
  return !warp && [tokens, size / heads, patch ** 2 * 3].every((count) => count % GROUP === 0);
}

// Where everything is, as plain data that threads exchange: addresses in bytes. about: model.json.
export function layoutOf(about, threads) {
  const {network: sizes, weights: entries} = about, {tokens, hidden_size: size, num_heads: heads, depth, max_frames: frames, history} = sizes;
  const each = tokens * size, pixels = sizes.image_size ** 2 * 3;
  let next = 64;
  const take = (bytes) => { const at = next; next = padded(at + bytes, 64); return at; };
  const product = (name) => {
    const [rows, width] = entries[`${name}.kernel`].shape, columns = padded(width, GROUP);
    const limit = Math.min(32767, Math.floor(2 ** 16.5 / Math.sqrt(rows)));  // as many bits left as right
    const [kernel, steps, bias] = [2 * rows * columns, 4 * columns, 4 * columns].map(take);
    return {name, depth: rows, width, columns, limit, kernel, steps, bias};
  };
  const patchIn = product("patch_in"), historyIn = history ? product("history_in") : null, outputs = product("outputs");
  const layers = Array.from({length: 2 * depth}, (_, half) => {
    const layer = `blocks.${half >> 1}.${half % 2 ? "temporal" : "spatial"}`;
    return Object.fromEntries(PRODUCTS.map((part) => [part, product(`${layer}.${part}`)]));
  });
  const products = [patchIn, historyIn, outputs, ...layers.flatMap(Object.values)].filter(Boolean);
  const most = (key) => Math.max(...products.map((one) => one[key]));
  const tables = Object.fromEntries(["modulations", "rotation.space.cos", "rotation.space.sin",
    "rotation.time.cos", "rotation.time.sin"].map((name) => [name, take(4 * countOf(entries[name]))]));
  const floats = (count) => take(4 * count), streams = (count) => Array.from({length: count}, () => floats(each));
  const [x, q, attended, fromHistory] = streams(4);
  return {
    sizes, patchIn, historyIn, outputs, layers, products, tables, x, q, attended, fromHistory,
    keys: streams(2), values: streams(2),  // of space, of even and of odd blocks
    sample: floats(pixels), earlier: floats(Math.max(1, history) * pixels), found: floats(tokens * outputs.columns),
    depth: most("depth"), columns: most("columns"),  // of a row of the two following
    left: take(2 * tokens * most("depth")), leftSteps: floats(tokens), wide: floats(tokens * most("columns")),
    scratch: Array.from({length: threads}, () => floats(Math.max(tokens * (tokens + size / heads), size, frames + 3))),
    ones: floats(size),
    areas: Array.from({length: WORLDS}, () => Array.from({length: 2 * depth}, () => floats(frames * each))),
    source: floats(Math.max(...Object.values(entries).map(countOf))),  // one weight, as stored
    control: take(4 * CONTROL), bytes: next,
  };
}

// A memory for a layout; `shared` by threads.
export function memoryFor({bytes}, shared) {
  const pages = Math.ceil(bytes / PAGE);
  return new WebAssembly.Memory(shared ? {initial: pages, maximum: pages, shared} : {initial: pages});
}

export class KernelMemory {
  constructor(memory, layout) {
    this.layout = layout;
    this.buffer = memory.buffer;
    this.each = layout.sizes.tokens * layout.sizes.hidden_size;
    this.worlds = layout.areas.map((_, area) => ({area, world: null}));  // the last used is the first
  }

  floats(address, count) { return new Float32Array(this.buffer, address, count); }

  // The number of the area with a world's keys and values, which has room for one more frame. They are
  // copied there unless the world was one of the last used.
  areaOf(world) {
    const found = this.worlds.findIndex((one) => one.world === world);
    const [{area}] = this.worlds.splice(found, 1);  // the last, if it was not found
    this.worlds.unshift({area, world});
    const count = world.count * this.each;
    if (found < 0) this.layout.areas[area].forEach((address, i) => this.floats(address, count).set(world.kv[i].subarray(0, count)));
    return area;
  }

  // Copies the newest keys and values of an area to its world.
  copyNewest(world, area) {
    const at = world.count * this.each;
    this.layout.areas[area].forEach((address, i) => world.kv[i].set(this.floats(address + 4 * at, this.each), at));
  }

  // Packs the weights; run: the kernels; weights: the bytes of weights.bin.
  fill(run, {weights: entries}, weights) {
    const {layout} = this, bytes = new Uint8Array(this.buffer);
    const load = (name) => {  // to `source`; returns 1 if it is float16, else 0
      const entry = entries[name], half = entry.dtype === "float16";
      bytes.set(weights.subarray(entry.offset, entry.offset + countOf(entry) * (half ? 2 : 4)), layout.source);
      return Number(half);
    };
    const widen = (name, address) => run.widen(layout.source, load(name), countOf(entries[name]), address);
    for (const {name, depth, width, limit, kernel, steps, bias} of layout.products) {
      run.pack(layout.source, load(`${name}.kernel`), depth, width, limit, kernel, steps);
      if (entries[`${name}.bias`]) widen(`${name}.bias`, bias);
    }
    for (const [name, address] of Object.entries(layout.tables)) widen(name, address);
    this.floats(layout.ones, layout.sizes.hidden_size).fill(1);
    this.#addOneToScales(entries.modulations.shape[0]);
  }

  #addOneToScales(rows) {
    const {hidden_size: size, depth} = this.layout.sizes, vectors = 12 * depth + 2;
    const isScale = (i) => (i < 12 * depth ? i % 6 === 1 || i % 6 === 4 : i === vectors - 1);
    for (let i = 0; i < rows * vectors; i++) {
      if (!isScale(i % vectors)) continue;
      const scale = this.floats(this.layout.tables.modulations + 4 * i * size, size);
      for (let at = 0; at < size; at++) scale[at] += 1;
    }
  }
}
