// Small tools for bytes: CRC-32, zlib, base64, checked SHA-256.

const CRC_TABLE = Uint32Array.from({length: 256}, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xEDB88320 ^ n >>> 1 : n >>> 1;
  return n;
});

export function crc32(...parts) {
  let crc = 0xFFFFFFFF;
  for (const part of parts) for (const byte of part) crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >>> 8;
  return ~crc >>> 0;
}

async function through(stream, bytes, most) {
  const reader = new Blob([bytes]).stream().pipeThrough(stream).getReader();
  const parts = [];
  let length = 0;
  for (;;) {
    const {done, value} = await reader.read();
    if (done) break;
    length += value.length;
    if (length > most) { reader.cancel(); throw new RangeError("too long"); }
    parts.push(value);
  }
  return joined(parts);
}

// zlib's format is called "deflate" here. Rejects for data that is damaged or longer than `most`.
export const inflate = (bytes, most = Infinity) => through(new DecompressionStream("deflate"), bytes, most);
export const deflate = (bytes) => through(new CompressionStream("deflate"), bytes, Infinity);
export const gunzip = (bytes) => through(new DecompressionStream("gzip"), bytes, Infinity);

export function joined(parts) {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { out.set(part, at); at += part.length; }
  return out;
}

export function toBase64Url(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

// Throws for text that is no base64url.
export function fromBase64Url(text) {
  if (/[^\w-]/.test(text)) throw new RangeError("base64");
  const plain = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(plain, (letter) => letter.charCodeAt(0));
}

export const toHex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

// SHA-256 in hex; null where the browser computes none (a page without https).
export async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) return null;
  return toHex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
}

export const fromHex = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
