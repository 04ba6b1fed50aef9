// One session: generate, rewind, branch, share and replay frames.
// The counterpart of `cwm_jax/play/session/session.py`.

import {crc32, toHex} from "./bytes.js";
import {UserError} from "./errors.js";
import {firstCached, toModel, toPixels} from "./generator.js";
import {History} from "./history.js";
import {MAX_FRAMES} from "./share_code.js";

const LANES = 1;  // frames that are generated together; codes of the Python page may have more

export const promptChecksum = (frames, actions) =>
  crc32(...frames, new Uint8Array(Int32Array.from(actions).buffer));

export class Session {
  // prompt: {frames: Uint8Array each, actions, source}.
  constructor(generator, prompt, seed = crypto.getRandomValues(new Uint32Array(1))[0]) {
    this.generator = generator;
    this.prompt = prompt;
    this.seed = seed;
    this.history = new History(generator.pixels);
    prompt.frames.forEach((frame, i) => this.history.append(frame, prompt.actions[i], null));
    this.at = this.history.length - 1;  // the frame that is shown; the next follows it
    this.cache = null;
    this.cached = 0;  // frames in `cache`
    this.script = [];  // to be replayed: [action, steps]
    this.expected = null;
    this.branches = [];
  }

  get given() { return this.history.given; }
  get length() { return this.history.length; }
  get window() { return this.at + 1 - firstCached(this.at + 1, this.generator.slots); }

  // Generates the frame after the one shown, and returns its pixels. Await `settle`
  // before the next one: it adds the frame to the cache, after the frame was shown.
  async step(action, steps) {
    this.#roomFor(1);
    this.branches = [];
    const cache = await this.#recalled(), number = this.at + 1;
    this.cache = null;
    const pixels = toPixels(await this.generator.frame(cache, action, {seed: this.seed, number, steps}));
    await this.history.cut(number);
    this.history.append(pixels, action, [steps, LANES]);
    this.at = number;
    this.unsettled = {cache, pixels, action};
    return pixels;
  }

  async settle() {
    if (!this.unsettled) return;
    const {cache, pixels, action} = this.unsettled;
    this.unsettled = null;
    await this.generator.append(cache, toModel(pixels), action);
    this.cache = cache;
    this.cached = this.at + 1;
    this.generator.noiseOf(this.seed, this.at + 1);
  }

  // Generates the next frame of a share code; `differs`: it was the last and is not equal.
  async replayStep() {
    const [action, steps] = this.script.shift();
    const script = this.script;
    const pixels = await this.step(action, steps);
    this.script = script;
    const differs = !script.length && this.expected !== null && crc32(pixels) !== this.expected;
    return {pixels, action, steps, over: !script.length, differs};
  }

  // Shows frame `to`; later frames are kept until a frame is generated there.
  async rewind(to) {
    this.script = [];
    this.branches = [];
    this.at = Math.min(Math.max(to, this.given - 1), this.length - 1);
    return this.history.frame(this.at);
  }

  // The next frames under each action; `show(branch, t, pixels)` receives each.
  async whatIf(actions, frames, steps, show) {
    this.#roomFor(frames);
    this.script = [];
    const branches = actions.map((action) => ({action, steps, frames: []}));
    for (const [index, branch] of branches.entries()) {
      const cache = await this.#rebuilt();
      for (let t = 0; t < frames; t++) {
        const number = this.at + 1 + t;
        const frame = await this.generator.frame(cache, branch.action, {seed: this.seed, number, steps});
        const pixels = toPixels(frame);
        branch.frames.push(pixels);
        show(index, t, pixels);
        if (t < frames - 1) await this.generator.append(cache, toModel(pixels), branch.action);
      }
    }
    this.branches = branches;
  }

  // Continues from the end of a branch of the last what-if.
  async choose(index) {
    const branch = this.branches[index];
    if (!branch) throw new UserError("There is no such branch to continue; use what-if first.");
    await this.history.cut(this.at + 1);
    for (const pixels of branch.frames) this.history.append(pixels, branch.action, [branch.steps, LANES]);
    this.at = this.length - 1;
    this.branches = [];
    this.cache = null;
    return this.history.frame(this.at);
  }

  // How to generate this session again, up to the frame that is shown.
  async recipe(fingerprint) {
    const {frames, actions, source} = this.prompt, from = this.given, to = this.at + 1;
    return {
      fingerprint,
      seed: this.seed,
      source,
      promptChecksum: promptChecksum(frames, actions),
      actions: this.history.actions.slice(from, to),
      programs: this.history.programs.slice(from, to),
      lastFrame: crc32(await this.history.frame(this.at)),
    };
  }

  // Replays a recipe from the start.
  follow(recipe) {
    this.script = recipe.actions.map((action, i) => [action, recipe.programs[i][0]]);
    this.expected = recipe.lastFrame;
  }

  #roomFor(frames) {
    if (this.at + 1 - this.given + frames > MAX_FRAMES)
      throw new UserError(`A session has at most ${MAX_FRAMES} frames: rewind or start a new one.`);
  }

  async #recalled() {
    await this.settle();
    return this.cache && this.cached === this.at + 1 ? this.cache : this.#rebuilt();
  }

  // The cache of all frames up to the one shown.
  async #rebuilt() {
    const stop = this.at + 1, start = firstCached(stop, this.generator.slots);
    const frames = await this.history.frames(start, stop);
    return this.generator.cacheOf(frames.map(toModel), this.history.actions.slice(start, stop));
  }
}

// Throws a UserError if a recipe is not for this model, its steps or its controls.
export function checkRecipe(recipe, model) {
  const theirs = toHex(recipe.fingerprint);
  if (theirs !== model.fingerprint)
    throw new UserError(`This share code is of another model (${theirs}); this page has ${model.name} (${model.fingerprint}).`);
  const odd = recipe.programs.find(([steps]) => !model.steps.includes(steps));
  if (odd) throw new UserError(`This share code needs ${odd[0]} denoising steps; this page has ${model.steps.join(", ")}.`);
  const wrong = recipe.actions.find((action) => action < -1 || action >= model.network.action_values);
  if (wrong !== undefined)
    throw new UserError(`This share code has action ${wrong}; valid are 0…${model.network.action_values - 1}.`);
}
