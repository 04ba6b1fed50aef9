// The network on one thread's part of a frame's tokens. All of it is a function of one token, except
// attention over space, which reads the keys and values of all tokens: there threads wait for each other.

const ROWS = 4;  // tokens that the kernels compute together

export class Part {
  // run: the kernels; layout: of kernel_memory.js; wait: returns when all threads have called it.
  constructor(run, layout, {thread, threads, wait}) {
    const {tokens, hidden_size: size, num_heads: heads, patch_size: patch, history} = layout.sizes;
    const begin = (number) => ROWS * Math.floor(tokens / ROWS * number / threads);
    this.run = run;
    this.layout = layout;
    this.wait = wait;
    this.headSize = size / heads;
    this.first = begin(thread);
    this.rows = begin(thread + 1) - this.first;
    const mine = (address, numbers, bytes = 4) => address + bytes * numbers * this.first;
    for (const name of ["x", "q", "attended", "fromHistory"]) this[name] = mine(layout[name], size);
    this.sample = mine(layout.sample, patch ** 2 * 3);
    this.earlier = mine(layout.earlier, history * patch ** 2 * 3);
    this.found = mine(layout.found, layout.outputs.columns);
    this.left = mine(layout.left, layout.depth, 2);
    this.leftSteps = mine(layout.leftSteps, 1);
    this.wide = mine(layout.wide, layout.columns);
    this.scratch = layout.scratch[thread];
  }

  // From a sample and the earlier frames, in patches, to the network's outputs. Writes keys and values to slot
  // `count` of an area; with `alone`, nothing else is of use.
  compute({row, area, count, alone, earlier}) {
    const {depth} = this.layout.sizes;
    this.#tokens(earlier);
    for (let block = 0; block < depth; block++) {
      this.#space(row, block);
      this.#time(row, block, this.layout.areas[area], count, alone && block === depth - 1);
    }
    if (!alone) this.#outputs(row);
  }

  // What earlier frames add is computed anew if they are: a frame is denoised in several steps and
  // then encoded, all with the same.
  #tokens(earlier) {
    const {patchIn, historyIn, ones, sizes: {hidden_size: size}} = this.layout;
    if (historyIn && earlier) this.#product(historyIn, this.earlier, this.fromHistory);
    if (historyIn) this.run.gather(this.fromHistory, size, this.x, this.rows, size);
    this.#product(patchIn, this.sample, this.x, historyIn ? ones : 0);
  }

  #space(row, block) {
    const {layers, tables, keys, values, sizes: {tokens, num_heads: heads, hidden_size: size}} = this.layout;
    const vectors = row + 4 * 12 * block * size, parity = block % 2;  // others may still read the last block's
    const [cos, sin] = ["cos", "sin"].map((name) => tables[`rotation.space.${name}`] + 4 * this.first * this.headSize);
    this.#qkv(layers[2 * block], vectors, [cos, sin, this.headSize], keys[parity], values[parity]);
    this.wait();
    this.run.over_space(this.q, keys[parity], values[parity], this.attended, this.rows, tokens, heads, this.headSize, this.scratch);
    this.#finish(layers[2 * block], vectors);
  }

  #time(row, block, area, count, stops) {
    const {layers, tables, sizes: {tokens, num_heads: heads, hidden_size: size, depth}} = this.layout, each = tokens * size;
    const vectors = row + 4 * (12 * block + 6) * size, mine = 4 * this.first * size, slot = 4 * count * each;
    const keys = area[block], values = area[depth + block], turn = 4 * count * this.headSize;
    this.#qkv(layers[2 * block + 1], vectors, [tables["rotation.time.cos"] + turn, tables["rotation.time.sin"] + turn, 0], keys + slot, values + slot);
    if (stops) return;
    this.run.over_time(this.q, keys + mine, values + mine, this.attended, count + 1, each, this.rows, heads, this.headSize, this.scratch);
    this.#finish(layers[2 * block + 1], vectors);
  }

  // Rotated queries to `q`, rotated keys and values to this part of a frame's, which are at these addresses.
  #qkv({qkv}, vectors, turn, keys, values) {
    const {num_heads: heads, hidden_size: size, qk_norm: unit} = this.layout.sizes, {run, rows, headSize, wide} = this;
    const stride = 3 * size, mine = 4 * this.first * size;
    this.#norm(vectors, qkv);
    this.#multiply(qkv, wide);
    run.rotate(wide, stride, this.q, ...turn, rows, heads, headSize, Number(unit));
    run.rotate(wide + 4 * size, stride, keys + mine, ...turn, rows, heads, headSize, Number(unit));
    run.gather(wide + 8 * size, stride, values + mine, rows, size);
  }

  #finish({out, mlp_in: wider, mlp_out: narrower}, vectors) {
    const {hidden_size: size} = this.layout.sizes, gate = 4 * 2 * size, second = 4 * 3 * size;
    this.#product(out, this.attended, this.x, vectors + gate);
    this.#norm(vectors + second, wider);
    this.#multiply(wider, this.wide);
    this.run.gelu(this.wide, this.left, this.leftSteps, this.rows, wider.width, narrower.limit);
    this.#multiply(narrower, this.x, vectors + second + gate);
  }

  #outputs(row) {
    const {outputs, sizes: {depth, hidden_size: size}} = this.layout;
    this.#norm(row + 4 * 12 * depth * size, outputs);
    this.#multiply(outputs, this.found);
  }

  // Normed and modulated `x` as the left side of a product; shift and scale are at `vectors`.
  #norm(vectors, {limit}) {
    const {hidden_size: size} = this.layout.sizes;
    this.run.norm(this.x, vectors, vectors + 4 * size, this.left, this.leftSteps, this.rows, size, limit, this.scratch);
  }

  #product(product, from, to, gate = 0) {
    this.run.quantise(from, this.left, this.leftSteps, this.rows, product.depth, product.limit);
    this.#multiply(product, to, gate);
  }

  #multiply({kernel, steps, bias, depth, columns}, to, gate = 0) {
    this.run.product(this.left, this.leftSteps, kernel, steps, bias, gate, to, this.rows, depth, columns);
  }
}
