// The network as ONNX graphs in onnxruntime-web; `cwm_jax/onnx/generator.py` lists their inputs.

export class OnnxNetwork {
  // ort: the module; about: model.json; sessions: {denoise, encode}, which use so many threads and compute so
  // many frames in one run.
  constructor(ort, about, sessions, {threads = 1, lanes = Infinity} = {}) {
    this.threads = threads;
    this.lanes = lanes;
    this.ort = ort;
    this.about = about;
    this.sizes = about.network;
    this.sessions = sessions;
    this.pixels = this.sizes.image_size ** 2 * 3;
    const {tokens, num_heads, hidden_size, depth} = this.sizes;
    this.kvShape = [tokens, num_heads, hidden_size / num_heads];
    this.names = ["keys", "values"].flatMap((part) => Array.from({length: depth}, (_, i) => `${part}_${i}`));
    this.nothing = new Float32Array(tokens * hidden_size);
  }

  async release() {
    for (const session of Object.values(this.sessions)) await session.release();
  }

  // The frame after this world's, from N(0, 1) noise.
  async frame(world, action, noise, steps) {
    const size = this.sizes.image_size, clip = this.about.noise_clip;
    const feeds = this.#lanes(world, [action]);
    if (this.sizes.history) feeds.earlier = this.#earlier([world.frames]);
    let sample = noise.map((x) => Math.min(clip, Math.max(-clip, x)));
    const first = this.about.first_rows[steps];
    for (let row = first; row < first + steps; row++) {
      feeds.sample = this.#tensor("float32", sample, [1, size, size, 3]);
      feeds.row = this.#tensor("int32", Int32Array.of(row), []);
      const found = await this.#run("denoise", feeds);
      sample = found[row === first + steps - 1 ? "frame" : "denoised"].data;
    }
    return sample;
  }

  // Appends frames, float32 in [−1, 1], and the actions that led into them.
  async append(world, frames, actions) {
    for (let at = 0; at < frames.length; at += this.lanes)
      await this.#append(world, frames.slice(at, at + this.lanes), actions.slice(at, at + this.lanes));
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
