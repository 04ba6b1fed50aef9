// Share codes: all it takes to generate a session again, as one line of text.
// The format is that of `cwm_jax/play/session/share_code.py`, whose page reads these codes too.

import {blake2b} from "./blake2b.js";
import {deflate, fromBase64Url, inflate, joined, toBase64Url} from "./bytes.js";
import {UserError} from "./errors.js";

export const MAX_FRAMES = 18_000;  // generated frames of a session: 20 minutes at 15 a second
const PREFIX = "CWM2-";
const CLIP = 0, PICTURE = 1;
const MAX_ACTIONS = 256, MAX_PROGRAMS = 16, MAX_BODY = 256 << 10;

// A recipe: {fingerprint: Uint8Array of 8, seed, source: {clip, frames} or {png}, promptChecksum,
// actions: one for each generated frame, programs: likewise [steps, lanes], lastFrame: a CRC-32}.
export async function encode(recipe) {
  const body = await deflate(bodyOf(recipe));
  return PREFIX + toBase64Url(joined([blake2b(body, 4), body]));
}

// The recipe of a code; throws a UserError for what is none, or is damaged.
export async function decode(code) {
  const text = code.replace(/\s/g, "");
  if (text.startsWith("CWM1-"))
    throw new UserError(`This share code (CWM1-…) is of an earlier version, whose codes are no longer read; today's begin with ${PREFIX}.`);
  if (!text.startsWith(PREFIX)) throw new UserError(`This is no share code: one begins with ${PREFIX}`);
  try {
    const raw = fromBase64Url(text.slice(PREFIX.length)), packed = raw.subarray(4);
    if (String(blake2b(packed, 4)) !== String(raw.subarray(0, 4))) throw new RangeError("checksum");
    return new Reader(await inflate(packed, MAX_BODY)).recipe();
  } catch {
    throw new UserError("This share code is damaged: a letter of it is missing or was changed. Copy it again, all of it.");
  }
}

function bodyOf({fingerprint, seed, source, promptChecksum, actions, programs, lastFrame}) {
  const out = [...fingerprint, seed & 255, seed >>> 8 & 255, seed >>> 16 & 255, seed >>> 24];
  const put = (number) => {
    for (; number > 127; number = Math.floor(number / 128)) out.push(number % 128 | 128);
    out.push(number);
  };
  if (source.png) { out.push(PICTURE); put(source.png.length); for (const byte of source.png) out.push(byte); }
  else { out.push(CLIP); put(source.clip); put(source.frames); }
  const kinds = [...new Set(programs.map(String))];
  if (kinds.length > MAX_PROGRAMS)
    throw new UserError(`This session used ${kinds.length} combinations of steps; a share code holds ${MAX_PROGRAMS}.`);
  put(promptChecksum);
  put(kinds.length);
  for (const kind of kinds) kind.split(",").forEach((number) => put(Number(number)));
  const runs = [];
  actions.forEach((action, i) => {
    const packed = (action + 1) * 16 + kinds.indexOf(String(programs[i]));
    if (runs.at(-1)?.[0] === packed) runs.at(-1)[1]++;
    else runs.push([packed, 1]);
  });
  put(runs.length);
  for (const run of runs) run.forEach(put);
  put(lastFrame);
  return Uint8Array.from(out);
}

class Reader {
  constructor(body) { this.body = body; this.at = 0; }

  recipe() {
    const fingerprint = this.take(8), seed = new DataView(this.take(4).slice().buffer).getUint32(0, true);
    const kind = this.take(1)[0];
    const source = kind === CLIP ? {clip: this.number(), frames: this.number()} : {png: this.take(this.number())};
    const promptChecksum = this.number();
    const kinds = Array.from({length: this.number()}, () => [this.number(), this.number()]);
    const actions = [], programs = [];
    for (let left = this.number(); left > 0; left--) {
      const packed = this.number(), length = this.number();
      const action = Math.floor(packed / 16) - 1, program = kinds[packed % 16];
      if (action >= MAX_ACTIONS || actions.length + length > MAX_FRAMES || !program) throw new RangeError("run");
      for (let i = 0; i < length; i++) { actions.push(action); programs.push(program); }
    }
    const lastFrame = this.number();
    if (this.at !== this.body.length) throw new RangeError("length");
    return {fingerprint, seed, source, promptChecksum, actions, programs, lastFrame};
  }

  take(count) {
    if (this.at + count > this.body.length) throw new RangeError("end");
    this.at += count;
    return this.body.subarray(this.at - count, this.at);
  }

  number() {
    let number = 0;
    for (let factor = 1; factor < 2 ** 35; factor *= 128) {
      const byte = this.take(1)[0];
      number += (byte & 127) * factor;
      if (byte < 128) return number;
    }
    throw new RangeError("number");
  }
}
