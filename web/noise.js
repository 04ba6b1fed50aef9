// The noise of a frame: what JAX's threefry2x32 gives for the session's seed and the frame's number
// (`cwm_jax/runtime/random_numbers.py`), so that a share code means the same frames here and there.

const ROTATIONS = [[13, 15, 26, 6], [17, 29, 16, 24]];
const f32 = Math.fround;
const SQRT_2 = f32(Math.SQRT2);
const LOWEST = -0.99999994039535522461;  // the float32 after −1

// Threefry of Salmon et al. 2011 with 20 rounds: two words under a key of two words.
export function threefry(key, x0, x1) {
  const keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA];
  x0 = x0 + keys[0] | 0;
  x1 = x1 + keys[1] | 0;
  for (let group = 0; group < 5; group++) {
    for (const rotation of ROTATIONS[group % 2]) {
      x0 = x0 + x1 | 0;
      x1 = (x1 << rotation | x1 >>> 32 - rotation) ^ x0;
    }
    x0 = x0 + keys[(group + 1) % 3] | 0;
    x1 = x1 + keys[(group + 2) % 3] + group + 1 | 0;
  }
  return [x0, x1];
}

// The noise that frame `number` of a session begins from, N(0, 1): float32 [count].
export function frameNoise(seed, number, count) {
  const frameKey = threefry([0, seed | 0], 0, number | 0);  // fold_in
  const startKey = threefry(frameKey, 0, 0);  // the first of split
  return normal(startKey, count);
}

// jax.random.normal of float32.
export function normal(key, count) {
  const out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const [high, low] = threefry(key, 0, i);
    const unit = f32(((high ^ low) >>> 9) * 2 ** -23);
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
  const at = near ? f32(w - 2.5) : f32(f32(Math.sqrt(w)) - 3);
  let sum = 0;
  for (const coefficient of near ? NEAR : FAR) sum = f32(f32(sum * at) + coefficient);
  return f32(sum * x);
}
