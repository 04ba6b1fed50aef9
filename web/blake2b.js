// BLAKE2b (RFC 7693) without a key, for texts of some kilobytes: the checksum of share codes.

const MASK = (1n << 64n) - 1n;
const IV = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const SIGMA = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
  "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((row) => [...row].map((digit) => parseInt(digit, 16)));
const MIXED = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
  [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];

const rotated = (x, bits) => (x >> bits | x << 64n - bits) & MASK;

function compress(h, block, length, isLast) {
  const view = new DataView(block.buffer, block.byteOffset, 128);
  const m = Array.from({length: 16}, (_, i) => view.getBigUint64(8 * i, true));
  const v = [...h, ...IV];
  v[12] ^= BigInt(length);
  if (isLast) v[14] ^= MASK;
  for (let round = 0; round < 12; round++) {
    const order = SIGMA[round % 10];
    MIXED.forEach(([a, b, c, d], i) => {
      v[a] = v[a] + v[b] + m[order[2 * i]] & MASK;
      v[d] = rotated(v[d] ^ v[a], 32n);
      v[c] = v[c] + v[d] & MASK;
      v[b] = rotated(v[b] ^ v[c], 24n);
      v[a] = v[a] + v[b] + m[order[2 * i + 1]] & MASK;
      v[d] = rotated(v[d] ^ v[a], 16n);
      v[c] = v[c] + v[d] & MASK;
      v[b] = rotated(v[b] ^ v[c], 63n);
    });
  }
  return h.map((word, i) => word ^ v[i] ^ v[i + 8]);
}

// The digest of bytes, `size` bytes of it.
export function blake2b(bytes, size) {
  let h = [...IV];
  h[0] ^= 0x01010000n ^ BigInt(size);
  const blocks = Math.max(1, Math.ceil(bytes.length / 128));
  const padded = new Uint8Array(128 * blocks);
  padded.set(bytes);
  for (let i = 0; i < blocks; i++) {
    const isLast = i === blocks - 1;
    const length = isLast ? bytes.length : 128 * (i + 1);
    h = compress(h, padded.subarray(128 * i, 128 * (i + 1)), length, isLast);
  }
  const out = new DataView(new ArrayBuffer(64));
  h.forEach((word, i) => out.setBigUint64(8 * i, word, true));
  return new Uint8Array(out.buffer, 0, size);
}
