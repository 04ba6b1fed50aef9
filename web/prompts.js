// What a session starts from: the first frames of a clip of the repository, or one's own picture.

import {UserError} from "./errors.js";
import * as png from "./png.js";
import {promptChecksum} from "./session.js";

const NO_ACTION = -1;
export const MAX_PROMPT = 32;

export class Prompts {
  // files: `Files`; index: clips.json, with the records' strips and where each clip lies.
  constructor(files, index, size) {
    this.files = files;
    this.index = index;
    this.size = size;
    this.strips = new Map();
  }

  get count() { return this.index.clips.length; }

  // {frames, actions, source} of {clip, frames} or {png}. Throws a UserError for what there is not.
  async load(source) {
    return source.png ? this.#picture(source) : this.#clip(source);
  }

  // The prompt of a recipe, which must be the one that it was made with.
  async ofRecipe({source, promptChecksum: wanted}) {
    const prompt = await this.load(source);
    if (promptChecksum(prompt.frames, prompt.actions) !== wanted)
      throw new UserError(`This share code starts from another clip ${source.clip} than this page's: it was made with other data.`);
    return prompt;
  }

  async #clip({clip, frames}) {
    if (!(clip >= 0 && clip < this.count)) throw new UserError(`There is no clip ${clip} on this page: they count 0…${this.count - 1}.`);
    if (!(frames >= 1 && frames <= MAX_PROMPT)) throw new UserError(`${frames} prompt frames: choose 1…${MAX_PROMPT}.`);
    const [record, start] = this.index.clips[clip];
    const strip = await this.#strip(record), each = this.size ** 2 * 3;
    const pressed = this.index.records[record].actions;
    const cut = (i) => strip.pixels.slice((start + i) * each, (start + i + 1) * each);
    const numbers = Array.from({length: frames}, (_, i) => i);
    return {
      frames: numbers.map(cut),
      actions: numbers.map((i) => i ? pressed[start + i - 1] : NO_ACTION),
      source: {clip, frames},
    };
  }

  #strip(record) {
    if (!this.strips.has(record)) {
      const loading = this.files.fetch(this.index.records[record].file).then(png.decode);
      loading.catch(() => this.strips.delete(record));
      this.strips.set(record, loading);
    }
    return this.strips.get(record);
  }

  async #picture(source) {
    const found = await png.decode(source.png).catch(() => null);
    if (!found) throw new UserError("The picture in this share code cannot be read.");
    if (found.width !== this.size || found.height !== this.size)
      throw new UserError(`The picture has ${found.width}×${found.height} pixels, not ${this.size}×${this.size}.`);
    return {frames: [found.pixels], actions: [NO_ACTION], source};
  }
}

