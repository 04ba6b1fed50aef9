// A session on record: each frame, the action that led into it, the steps it was generated with.
// Old frames are kept compressed, block by block: 18,000 frames raw would be 220 MB.

import {deflate, inflate} from "./bytes.js";

const BLOCK = 64;  // frames
const RAW_BLOCKS = 3;  // the newest stay as they are

export class History {
  constructor(frameBytes) {
    this.frameBytes = frameBytes;
    this.actions = [];
    this.programs = [];  // null: a given frame, of the prompt
    this.given = 0;
    this.blocks = [];  // {raw: Uint8Array} or {packed: Uint8Array}
  }

  get length() { return this.actions.length; }

  append(pixels, action, program) {
    const number = this.length, place = number % BLOCK;
    if (!place) this.blocks.push({raw: new Uint8Array(BLOCK * this.frameBytes)});
    this.blocks.at(-1).raw.set(pixels, place * this.frameBytes);
    this.actions.push(action);
    this.programs.push(program);
    if (program === null) this.given++;
    if (!place) this.#pack(this.blocks.length - 1 - RAW_BLOCKS);
  }

  // Forgets all frames from number `length` on; those of the prompt stay.
  async cut(length) {
    length = Math.max(length, this.given);
    if (length === this.length) return;
    this.actions.length = this.programs.length = length;
    this.blocks.length = Math.ceil(length / BLOCK);
    const last = this.blocks.length - 1;  // a new object: what is being packed of the old one is dropped
    if (last >= 0) this.blocks[last] = {raw: await this.#raw(last)};
  }

  async frame(number) {
    const block = await this.#raw(Math.floor(number / BLOCK)), at = number % BLOCK * this.frameBytes;
    return block.slice(at, at + this.frameBytes);
  }

  async frames(start, stop) {
    const out = [];
    for (let number = start; number < stop; number++) out.push(await this.frame(number));
    return out;
  }

  async #raw(index) {
    const block = this.blocks[index];
    if (block.raw) return block.raw;
    const bytes = await inflate(block.packed);
    for (let i = this.frameBytes; i < bytes.length; i++) bytes[i] += bytes[i - this.frameBytes];
    return bytes;
  }

  // In the background; differences from frame to frame compress best.
  async #pack(index) {
    const block = this.blocks[index];
    if (!block?.raw) return;
    const bytes = block.raw.slice();
    for (let i = bytes.length - 1; i >= this.frameBytes; i--) bytes[i] -= bytes[i - this.frameBytes];
    const packed = await deflate(bytes);
    if (this.blocks[index] === block) this.blocks[index] = {packed};
  }
}
