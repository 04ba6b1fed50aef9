// PNG without a canvas, whose pixels some browsers change on purpose: 8-bit RGB and RGBA.

import {crc32, deflate, inflate, joined} from "./bytes.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CHANNELS = {2: 3, 6: 4};
const MOST_BYTES = 1 << 26;

export class PngError extends Error {}

// {width, height, pixels}: the RGB of a PNG. Throws a PngError for what is none, or of another kind.
export async function decode(bytes) {
  if (SIGNATURE.some((byte, i) => bytes[i] !== byte)) throw new PngError("no PNG");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const data = [];
  let header = null;
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at), name = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const body = bytes.subarray(at + 8, at + 8 + length);
    if (name === "IHDR") header = new DataView(body.buffer, body.byteOffset, length);
    if (name === "IDAT") data.push(body);
    at += 12 + length;
  }
  const channels = header && CHANNELS[header.getUint8(9)];
  if (!channels || header.getUint8(8) !== 8 || header.getUint8(12)) throw new PngError("another kind of PNG");
  const width = header.getUint32(0), height = header.getUint32(4);
  const raw = await inflate(joined(data), MOST_BYTES).catch(() => null);
  if (raw?.length !== height * (width * channels + 1)) throw new PngError("damaged PNG");
  return {width, height, pixels: withoutAlpha(unfiltered(raw, width * channels, height, channels), channels)};
}

function unfiltered(raw, stride, height, channels) {
  const out = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (stride + 1)], from = y * (stride + 1) + 1, to = y * stride;
    if (filter === 0) { out.set(raw.subarray(from, from + stride), to); continue; }
    for (let x = 0; x < stride; x++) {
      const left = x >= channels ? out[to + x - channels] : 0;
      const up = y ? out[to + x - stride] : 0;
      const corner = y && x >= channels ? out[to + x - stride - channels] : 0;
      out[to + x] = raw[from + x] + guess(filter, left, up, corner);
    }
  }
  return out;
}

function guess(filter, left, up, corner) {
  if (filter === 1) return left;
  if (filter === 2) return up;
  if (filter === 3) return left + up >> 1;
  const sum = left + up - corner;
  const [a, b, c] = [left, up, corner].map((value) => Math.abs(sum - value));
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

function withoutAlpha(pixels, channels) {
  if (channels === 3) return pixels;
  const out = new Uint8Array(pixels.length / 4 * 3);
  for (let i = 0, to = 0; i < pixels.length; i += 4) {
    out[to++] = pixels[i]; out[to++] = pixels[i + 1]; out[to++] = pixels[i + 2];
  }
  return out;
}

// The PNG of RGB pixels.
export async function encode(pixels, width, height) {
  const raw = new Uint8Array(height * (3 * width + 1));
  for (let y = 0; y < height; y++) raw.set(pixels.subarray(3 * width * y, 3 * width * (y + 1)), y * (3 * width + 1) + 1);
  const header = new Uint8Array(13), view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header.set([8, 2, 0, 0, 0], 8);
  const parts = [["IHDR", header], ["IDAT", await deflate(raw)], ["IEND", new Uint8Array()]];
  return joined([Uint8Array.from(SIGNATURE), ...parts.map(([name, body]) => chunk(name, body))]);
}

function chunk(name, body) {
  const out = new Uint8Array(body.length + 12), view = new DataView(out.buffer);
  view.setUint32(0, body.length);
  out.set(Array.from(name, (letter) => letter.charCodeAt(0)), 4);
  out.set(body, 8);
  view.setUint32(body.length + 8, crc32(out.subarray(4, body.length + 8)));
  return out;
}
