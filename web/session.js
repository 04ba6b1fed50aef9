// One session: generated frame by frame, rewound, branched, shared, generated again.
// The counterpart of `cwm_jax/play/session/session.py`.

import {crc32, toHex} from "./bytes.js";
import {UserError} from "./errors.js";
import {firstRemembered, toModel, toPixels} from "./generator.js";
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
    this.at = this.history.length - 1;  // the frame that is shown; the next comes after it
    this.memory = null;
    this.remembered = 0;  // frames in `memory`
    this.script = [];  // still to be generated again: [action, steps]
    this.expected = null;
    this.branches = [];
  }

  get given() { return this.history.given; }
  get length() { return this.history.length; }
  get window() { return this.at + 1 - firstRemembered(this.at + 1, this.generator.slots); }

  // Generates the frame after the one shown, and returns its pixels. `settle` has to be awaited
  // before the next one: it takes the frame into the memory, when it has been shown already.
  async step(action, steps) {
    this.#roomFor(1);
    this.branches = [];
    const memory = await this.#recalled(), number = this.at + 1;
    this.memory = null;
    const pixels = toPixels(await this.generator.frame(memory, action, {seed: this.seed, number, steps}));
    await this.history.cut(number);
    this.history.append(pixels, action, [steps, LANES]);
    this.at = number;
    this.unsettled = {memory, pixels, action};
    return pixels;
  }

  async settle() {
    if (!this.unsettled) return;
    const {memory, pixels, action} = this.unsettled;
    this.unsettled = null;
    await this.generator.remember(memory, toModel(pixels), action);
    this.memory = memory;
    this.remembered = this.at + 1;
    this.generator.noiseOf(this.seed, this.at + 1);
  }

  // Generates the next frame of a share code; `differs` when it was the last and is another.
  async replayStep() {
    const [action, steps] = this.script.shift();
    const script = this.script;
    const pixels = await this.step(action, steps);
    this.script = script;
    const differs = !script.length && this.expected !== null && crc32(pixels) !== this.expected;
    return {pixels, action, steps, over: !script.length, differs};
  }

  // Shows frame `to`; nothing is forgotten until a frame is generated there.
  async rewind(to) {
    this.script = [];
    this.branches = [];
    this.at = Math.min(Math.max(to, this.given - 1), this.length - 1);
    return this.history.frame(this.at);
  }

  // The next frames under each action; `show(branch, t, pixels)` sees them as they come.
  async whatIf(actions, frames, steps, show) {
    this.#roomFor(frames);
    this.script = [];
    const branches = actions.map((action) => ({action, steps, frames: []}));
    for (const [index, branch] of branches.entries()) {
      const memory = await this.#rebuilt();
      for (let t = 0; t < frames; t++) {
        const number = this.at + 1 + t;
        const frame = await this.generator.frame(memory, branch.action, {seed: this.seed, number, steps});
        const pixels = toPixels(frame);
        branch.frames.push(pixels);
        show(index, t, pixels);
        if (t < frames - 1) await this.generator.remember(memory, toModel(pixels), branch.action);
      }
    }
    this.branches = branches;
  }

  // Goes on where a branch of the last what-if ended.
  async choose(index) {
    const branch = this.branches[index];
    if (!branch) throw new UserError("There is no such branch to go on with; ask what-if first.");
    await this.history.cut(this.at + 1);
    for (const pixels of branch.frames) this.history.append(pixels, branch.action, [branch.steps, LANES]);
    this.at = this.length - 1;
    this.branches = [];
    this.memory = null;
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

  // Goes through a recipe from the start.
  follow(recipe) {
    this.script = recipe.actions.map((action, i) => [action, recipe.programs[i][0]]);
    this.expected = recipe.lastFrame;
  }

  #roomFor(frames) {
    if (this.at + 1 - this.given + frames > MAX_FRAMES)
      throw new UserError(`A session has at most ${MAX_FRAMES} frames: rewind or start anew.`);
  }

  async #recalled() {
    await this.settle();
    return this.memory && this.remembered === this.at + 1 ? this.memory : this.#rebuilt();
  }

  // The memory of all frames up to the one shown.
  async #rebuilt() {
    const stop = this.at + 1, start = firstRemembered(stop, this.generator.slots);
    const frames = await this.history.frames(start, stop);
    return this.generator.remembered(frames.map(toModel), this.history.actions.slice(start, stop));
  }
}

// Throws a UserError where a recipe is not for this model, its steps or its controls.
export function checkRecipe(recipe, model) {
  const theirs = toHex(recipe.fingerprint);
  if (theirs !== model.fingerprint)
    throw new UserError(`This share code is of another model (${theirs}); this page has ${model.name} (${model.fingerprint}).`);
  const odd = recipe.programs.find(([steps]) => !model.steps.includes(steps));
  if (odd) throw new UserError(`This share code wants ${odd[0]} denoising steps; this page has ${model.steps.join(", ")}.`);
  const wrong = recipe.actions.find((action) => action < -1 || action >= model.network.action_values);
  if (wrong !== undefined)
    throw new UserError(`This share code has action ${wrong}; there are 0…${model.network.action_values - 1}.`);
}
