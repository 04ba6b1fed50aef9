// The noise of a frame: JAX's threefry2x32 for the session's seed and the frame's number
// (`cwm_jax/runtime/random_numbers.py`), so that a share code gives the same frames in both.

const f32 = Math.fround;
const SQRT_2 = f32(Math.SQRT2);
const LOWEST = -0.99999994039535522461;  // the float32 after −1

let second = 0;  // the second word of the last `mixed`: an array for each call would take half the time

// Threefry of Salmon et al. 2011 with 20 rounds: two words under a key of two words.
export const threefry = ([key0, key1], x0, x1) => [mixed(key0, key1, x0, x1), second];

function mixed(key0, key1, x0, x1) {
  let key2 = key0 ^ key1 ^ 0x1BD11BDA;
  x0 = x0 + key0 | 0;
  x1 = x1 + key1 | 0;
  for (let group = 1; group <= 5; group++) {
    if (group % 2) {
      x0 = x0 + x1 | 0; x1 = (x1 << 13 | x1 >>> 19) ^ x0;
      x0 = x0 + x1 | 0; x1 = (x1 << 15 | x1 >>> 17) ^ x0;
      x0 = x0 + x1 | 0; x1 = (x1 << 26 | x1 >>> 6) ^ x0;
      x0 = x0 + x1 | 0; x1 = (x1 << 6 | x1 >>> 26) ^ x0;
    } else {
      x0 = x0 + x1 | 0; x1 = (x1 << 17 | x1 >>> 15) ^ x0;
      x0 = x0 + x1 | 0; x1 = (x1 << 29 | x1 >>> 3) ^ x0;
      x0 = x0 + x1 | 0; x1 = (x1 << 16 | x1 >>> 16) ^ x0;
      x0 = x0 + x1 | 0; x1 = (x1 << 24 | x1 >>> 8) ^ x0;
    }
    const used = key0;
    key0 = key1;
    key1 = key2;
    key2 = used;
    x0 = x0 + key0 | 0;
    x1 = x1 + key1 + group | 0;
  }
  second = x1;
  return x0;
}

// The initial noise of frame `number` of a session, N(0, 1): float32 [count].
export function frameNoise(seed, number, count) {
  const frameKey = threefry([0, seed | 0], 0, number | 0);  // fold_in
  const startKey = threefry(frameKey, 0, 0);  // the first of split
  return normal(startKey, count);
}

// jax.random.normal of float32.
export function normal(key, count) {
  const [key0, key1] = key, out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const bits = mixed(key0, key1, 0, i) ^ second;
    const unit = f32((bits >>> 9) * 2 ** -23);
    const uniform = Math.max(LOWEST, f32(f32(unit * 2) + LOWEST));
    out[i] = f32(SQRT_2 * inverseErf(uniform));
  }
  return out;
}

// Giles 2010, "Approximating the erfinv function", as XLA computes it in float32.
const NEAR = [2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
  -0.00125372503, -0.00417768164, 0.246640727, 1.50140941].map(f32);
const FAR = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
  -0.0076224613, 0.00943887047, 1.00167406, 2.83297682].map(f32);

function inverseErf(x) {
  const w = f32(-Math.log1p(f32(f32(-x) * x)));
  const near = w < 5;
  const at = near ? f32(w - 2.5) : f32(f32(Math.sqrt(w)) - 3), coefficients = near ? NEAR : FAR;
  let sum = 0;
  for (let i = 0; i < 9; i++) sum = f32(f32(sum * at) + coefficients[i]);
  return f32(sum * x);
}
