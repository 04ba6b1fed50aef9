// Fetches the page's files and checks each against the SHA-256 that the build wrote down.

import {gunzip, sha256} from "./bytes.js";
import {UserError} from "./errors.js";

const mega = (bytes) => (bytes / 1e6).toFixed(1);

export class Files {
  // list: by name {path, bytes, sha256, packed}, as in index.html; base: the page's address.
  constructor(list, base) {
    this.list = list;
    this.base = base;
  }

  url(name) {
    return new URL(this.list[name].path, this.base).href;
  }

  // The bytes of a file, unpacked. A file that arrives damaged or cut short is fetched once more.
  // `progress(bytes)` hears how many more have arrived; negative numbers take some back.
  async fetch(name, progress = () => {}) {
    const {bytes, sha256: wanted, packed} = this.list[name];
    let problem = "";
    for (const cache of ["default", "reload"]) {
      let arrived = 0;
      try {
        const body = await this.#body(name, cache, (more) => { arrived += more; progress(more); });
        const found = await sha256(body);
        if (body.length === bytes && (found === null || found === wanted)) return packed ? await gunzip(body) : body;
        problem = body.length === bytes ? "its checksum is wrong" : `${mega(body.length)} of ${mega(bytes)} MB arrived`;
      } catch (error) {
        problem = error instanceof UserError ? error.message : `${mega(arrived)} of ${mega(bytes)} MB arrived`;
      }
      progress(-arrived);
    }
    throw new UserError(`The file ${this.list[name].path} could not be loaded, tried twice: ${problem}. `
      + "Check the connection and load the page again.");
  }

  async #body(name, cache, progress) {
    const answer = await fetch(this.url(name), {cache});
    if (!answer.ok) throw new UserError(`the server answered ${answer.status}`);
    const reader = answer.body.getReader(), parts = [];
    let length = 0;
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      parts.push(value);
      length += value.length;
      progress(value.length);
    }
    const whole = new Uint8Array(length);
    let at = 0;
    for (const part of parts) { whole.set(part, at); at += part.length; }
    return whole;
  }

  async json(name) {
    return JSON.parse(new TextDecoder().decode(await this.fetch(name)));
  }
}
