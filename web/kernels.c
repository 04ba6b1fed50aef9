// The network's arithmetic in WebAssembly with 128-bit vectors; `kernel_network.js` calls these functions.
//
//     make install-ziglang kernels     # writes kernels.wasm
//
// Matrix products multiply integers of 16 bits, with one step size for each row of the left and each
// column of the right matrix, and add in 32 bits without overflow: WebAssembly has one instruction
// for eight such products, and only four for floating point. All else is float32. All operations are
// exactly specified, so every device computes the same bits. Each row of a result depends on its row of
// the left side alone, so threads share the work by rows; the functions keep nothing in memory of their own.

#include <wasm_simd128.h>

#define EXPORT(name) __attribute__((export_name(#name)))
#define ROWS 4
#define COLUMNS 8

typedef short i16;
typedef unsigned short u16;

static const float EPSILON = 1e-6f;  // of norms
static const float ROUND = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, in the low bits

static inline v128_t load(const float *x) { return wasm_v128_load(x); }
static inline v128_t all(float x) { return wasm_f32x4_splat(x); }
static inline v128_t add(v128_t a, v128_t b) { return wasm_f32x4_add(a, b); }
static inline v128_t sub(v128_t a, v128_t b) { return wasm_f32x4_sub(a, b); }
static inline v128_t mul(v128_t a, v128_t b) { return wasm_f32x4_mul(a, b); }

static inline float sum(v128_t x) {
  return (wasm_f32x4_extract_lane(x, 0) + wasm_f32x4_extract_lane(x, 1)) +
         (wasm_f32x4_extract_lane(x, 2) + wasm_f32x4_extract_lane(x, 3));
}

static inline float larger(float a, float b) { return a > b ? a : b; }

static inline float largest(v128_t x) {
  return larger(larger(wasm_f32x4_extract_lane(x, 0), wasm_f32x4_extract_lane(x, 1)),
                larger(wasm_f32x4_extract_lane(x, 2), wasm_f32x4_extract_lane(x, 3)));
}

// exp, of numbers clipped to ±87, to 2 units in the last place: 2^n times the polynomial of Cephes.
static inline v128_t exponential(v128_t x) {
  x = wasm_f32x4_pmin(wasm_f32x4_pmax(x, all(-87.0f)), all(87.0f));
  v128_t shifted = add(mul(x, all(1.44269504f)), all(ROUND));
  v128_t n = sub(shifted, all(ROUND));
  v128_t r = sub(sub(x, mul(n, all(0.693359375f))), mul(n, all(-2.12194440e-4f)));
  v128_t y = all(1.9875691500e-4f);
  y = add(mul(y, r), all(1.3981999507e-3f));
  y = add(mul(y, r), all(8.3334519073e-3f));
  y = add(mul(y, r), all(4.1665795894e-2f));
  y = add(mul(y, r), all(1.6666665459e-1f));
  y = add(mul(y, r), all(5.0000001201e-1f));
  y = add(add(mul(mul(y, r), r), r), all(1.0f));
  v128_t power = wasm_i32x4_add(wasm_i32x4_shl(shifted, 23), wasm_i32x4_const_splat(0x3f800000));
  return mul(y, power);
}

// Where the left side of a product has row `row`: rows are in groups of four, whose numbers are in the
// order pair of columns, row, column. So the inner loop of `product` needs one pointer.
static inline i16 *left_row(i16 *left, int row, int size) {
  return left + row / ROWS * ROWS * size + row % ROWS * 2;
}

// Rounds one row to whole multiples of a step, at most `limit`, into its place in a left side; returns the step.
static inline float quantised_row(const float *x, i16 *out, int size, float limit) {
  v128_t most = all(0.0f);
  for (int i = 0; i < size; i += 4) most = wasm_f32x4_pmax(most, wasm_f32x4_abs(load(x + i)));
  float step = larger(largest(most), 1e-20f) / limit;
  v128_t inverse = all(1.0f / step), zero = wasm_i32x4_const_splat(0x4b400000);
  for (int i = 0; i < size; i += 8) {
    v128_t a = wasm_i32x4_sub(add(mul(load(x + i), inverse), all(ROUND)), zero);
    v128_t b = wasm_i32x4_sub(add(mul(load(x + i + 4), inverse), all(ROUND)), zero);
    v128_t pairs = wasm_i16x8_narrow_i32x4(a, b);
    i16 *to = out + i * ROWS;
    wasm_v128_store32_lane(to, pairs, 0);
    wasm_v128_store32_lane(to + 2 * ROWS, pairs, 1);
    wasm_v128_store32_lane(to + 4 * ROWS, pairs, 2);
    wasm_v128_store32_lane(to + 6 * ROWS, pairs, 3);
  }
  return step;
}

// x [rows, size] to a left side of 16 bits, with a step for each row. `size` is a multiple of 8 and `rows`
// of 4, as everywhere.
EXPORT(quantise)
void quantise(const float *x, i16 *out, float *steps, int rows, int size, float limit) {
  for (int row = 0; row < rows; row++)
    steps[row] = quantised_row(x + row * size, left_row(out, row, size), size, limit);
}

// LayerNorm without parameters, then `scale` and `shift` [size], to a left side. Overwrites `scratch` [size].
EXPORT(norm)
void norm(const float *x, const float *shift, const float *scale, i16 *out, float *steps, int rows,
          int size, float limit, float *scratch) {
  for (int row = 0; row < rows; row++, x += size) {
    v128_t total = all(0.0f), squares = all(0.0f);
    for (int i = 0; i < size; i += 4) total = add(total, load(x + i));
    v128_t mean = all(sum(total) / size);
    for (int i = 0; i < size; i += 4) {
      v128_t away = sub(load(x + i), mean);
      squares = add(squares, mul(away, away));
    }
    v128_t inverse = all(1.0f / __builtin_sqrtf(sum(squares) / size + EPSILON));
    for (int i = 0; i < size; i += 4) {
      v128_t unit = mul(sub(load(x + i), mean), inverse);
      wasm_v128_store(scratch + i, add(mul(unit, load(scale + i)), load(shift + i)));
    }
    steps[row] = quantised_row(scratch, left_row(out, row, size), size, limit);
  }
}

// GELU in its tanh form, x · sigmoid(√(8/π) · (x + 0.044715 x³)), of x [rows, size], which it
// overwrites; then to a left side.
EXPORT(gelu)
void gelu(float *x, i16 *out, float *steps, int rows, int size, float limit) {
  for (int row = 0; row < rows; row++, x += size) {
    for (int i = 0; i < size; i += 4) {
      v128_t v = load(x + i);
      v128_t inner = add(mul(mul(mul(v, v), v), all(0.044715f)), v);
      v128_t rest = exponential(mul(inner, all(-1.5957691216f)));
      wasm_v128_store(x + i, wasm_f32x4_div(v, add(rest, all(1.0f))));
    }
    steps[row] = quantised_row(x, left_row(out, row, size), size, limit);
  }
}

static inline float from_half(u16 h) {
  unsigned bits = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
  union { unsigned u; float f; } value = {bits};
  value.f *= 0x1p112f;  // the exponents differ by 112; subnormal numbers too
  value.u |= sign;
  return value.f;
}

// Numbers of float16 or float32 to float32.
EXPORT(widen)
void widen(const void *x, int is_half, int count, float *out) {
  for (int i = 0; i < count; i++) out[i] = is_half ? from_half(((const u16 *)x)[i]) : ((const float *)x)[i];
}

// Packs a kernel [depth, width] of float16 or float32 for `product`: columns in groups of eight, whose
// numbers are in the order group, pair of rows, column, row. A column's step is as small as
// sums of `depth` products with numbers up to `limit` allow.
EXPORT(pack)
void pack(const void *kernel, int is_half, int depth, int width, float limit, i16 *out, float *steps) {
  for (int column = 0; column < (width + COLUMNS - 1) / COLUMNS * COLUMNS; column++) {
    float most = 0, total = 0;
    for (int k = 0; k < depth && column < width; k++) {
      int at = k * width + column;
      float x = is_half ? from_half(((const u16 *)kernel)[at]) : ((const float *)kernel)[at];
      most = larger(most, __builtin_fabsf(x));
      total += __builtin_fabsf(x);
    }
    float room = 2147000000.0f / limit - 0.5f * depth;
    float step = larger(larger(most / 32767.0f, total / room), 1e-20f);
    steps[column] = step;
    i16 *group = out + column / COLUMNS * COLUMNS * depth + column % COLUMNS * 2;
    for (int k = 0; k < depth; k++) {
      int at = k * width + column;
      float x = 0;
      if (column < width) x = is_half ? from_half(((const u16 *)kernel)[at]) : ((const float *)kernel)[at];
      group[k / 2 * 2 * COLUMNS + k % 2] = (i16)__builtin_rintf(x / step);
    }
  }
}

// A left side [rows, depth] times a packed kernel, plus `bias` [width]. With a `gate` [width], the result times
// the gate is added to `out` [rows, width]; without one it is stored there. V8's inner loop has 22
// instructions for 64 multiplications and 4 for the loop: `-disable-lsr` in the Makefile keeps addresses
// constant. Unrolled loops and larger tiles need more than the 15 registers that V8 allocates.
EXPORT(product)
void product(const i16 *a, const float *row_steps, const i16 *kernel, const float *steps,
             const float *bias, const float *gate, float *out, int rows, int depth, int width) {
  for (int column = 0; column < width; column += COLUMNS) {
    for (int row = 0; row < rows; row += ROWS) {
      v128_t sums[ROWS][2];
      for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = wasm_i32x4_const_splat(0);
      const i16 *left = a + row * depth, *right = kernel + column * depth, *end = right + COLUMNS * depth;
      for (; right != end; left += 2 * ROWS, right += 2 * COLUMNS) {
        v128_t first = wasm_v128_load(right), second = wasm_v128_load(right + COLUMNS);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          v128_t pair = wasm_v128_load32_splat(left + 2 * i);
          sums[i][0] = wasm_i32x4_add(sums[i][0], wasm_i32x4_dot_i16x8(pair, first));
          sums[i][1] = wasm_i32x4_add(sums[i][1], wasm_i32x4_dot_i16x8(pair, second));
        }
      }
      for (int i = 0; i < ROWS; i++) {
        for (int half = 0; half < 2; half++) {
          int at = column + 4 * half;
          v128_t scaled = mul(mul(wasm_f32x4_convert_i32x4(sums[i][half]), all(row_steps[row + i])), load(steps + at));
          v128_t y = add(scaled, load(bias + at));
          float *to = out + (row + i) * width + at;
          if (gate) y = add(load(to), mul(y, load(gate + at)));
          wasm_v128_store(to, y);
        }
      }
    }
  }
}

// Rotates the heads of x [tokens, heads, size], of which a token's are `stride` numbers apart, into
// out [tokens, heads, size]; first to a root mean square of 1 if `unit`. cos, sin: the angles of token t
// begin at t · `turn`; sin has the sign of its half.
EXPORT(rotate)
void rotate(const float *x, int stride, float *out, const float *cos, const float *sin, int turn,
            int tokens, int heads, int size, int unit) {
  int half = size / 2;
  for (int token = 0; token < tokens; token++, x += stride, cos += turn, sin += turn) {
    for (int head = 0; head < heads; head++, out += size) {
      const float *from = x + head * size;
      float scale = 1.0f;
      if (unit) {
        v128_t squares = all(0.0f);
        for (int i = 0; i < size; i += 4) squares = add(squares, mul(load(from + i), load(from + i)));
        scale = 1.0f / __builtin_sqrtf(sum(squares) / size + EPSILON);
      }
      for (int i = 0; i < half; i += 4) {
        v128_t a = mul(load(from + i), all(scale)), b = mul(load(from + half + i), all(scale));
        wasm_v128_store(out + i, add(mul(a, load(cos + i)), mul(b, load(sin + i))));
        wasm_v128_store(out + half + i, add(mul(b, load(cos + half + i)), mul(a, load(sin + half + i))));
      }
    }
  }
}

// Copies x [rows, size], of which rows are `stride` numbers apart.
EXPORT(gather)
void gather(const float *x, int stride, float *out, int rows, int size) {
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < size; i += 4) wasm_v128_store(out + row * size + i, load(x + row * stride + i));
}

// In place; `size` is a multiple of 4. The sum is at least 1.
static inline void softmax(float *x, int size) {
  v128_t most = load(x), total = all(0.0f);
  for (int i = 4; i < size; i += 4) most = wasm_f32x4_pmax(most, load(x + i));
  v128_t top = all(largest(most));
  for (int i = 0; i < size; i += 4) {
    v128_t y = exponential(sub(load(x + i), top));
    wasm_v128_store(x + i, y);
    total = add(total, y);
  }
  v128_t inverse = all(1.0f / sum(total));
  for (int i = 0; i < size; i += 4) wasm_v128_store(x + i, mul(load(x + i), inverse));
}

// a [rows, depth] times b [depth, width], of rows that are a_stride, b_stride and out_stride apart.
static void product32(const float *a, int a_stride, const float *b, int b_stride, float *out,
                      int out_stride, int rows, int depth, int width) {
  for (int column = 0; column < width; column += COLUMNS) {
    for (int row = 0; row < rows; row += ROWS) {
      v128_t sums[ROWS][2];
      for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = all(0.0f);
      const float *left = a + row * a_stride, *right = b + column;
      for (int k = 0; k < depth; k++, right += b_stride) {
        v128_t first = load(right), second = load(right + 4);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          v128_t x = wasm_v128_load32_splat(left + i * a_stride + k);
          sums[i][0] = add(sums[i][0], mul(x, first));
          sums[i][1] = add(sums[i][1], mul(x, second));
        }
      }
      for (int i = 0; i < ROWS; i++) {
        wasm_v128_store(out + (row + i) * out_stride + column, sums[i][0]);
        wasm_v128_store(out + (row + i) * out_stride + column + 4, sums[i][1]);
      }
    }
  }
}

// Attention of `rows` tokens of a frame to all its `tokens`; k and v are [tokens, heads, size], q and out
// [rows, heads, size]. Overwrites `scratch` [tokens · (rows + size)].
EXPORT(over_space)
void over_space(const float *q, const float *k, const float *v, float *out, int rows, int tokens, int heads,
                int size, float *scratch) {
  int stride = heads * size;
  float *turned = scratch + rows * tokens;  // the keys of a head, [size, tokens]
  for (int head = 0; head < heads; head++) {
    for (int token = 0; token < tokens; token++)
      for (int i = 0; i < size; i++) turned[i * tokens + token] = k[token * stride + head * size + i];
    product32(q + head * size, stride, turned, tokens, scratch, tokens, rows, size, tokens);
    for (int row = 0; row < rows; row++) softmax(scratch + row * tokens, tokens);
    product32(scratch, tokens, v + head * size, stride, out + head * size, stride, rows, tokens, size);
  }
}

// Attention of `rows` tokens, each to the same token of `frames` frames; keys and values of a frame are
// `each` numbers after those of the frame before, q and out [rows, heads, size]. Overwrites `scratch`
// [frames + 3].
EXPORT(over_time)
void over_time(const float *q, const float *keys, const float *values, float *out, int frames, int each,
               int rows, int heads, int size, float *scratch) {
  int padded = (frames + 3) / 4 * 4;
  for (int place = 0; place < rows * heads * size; place += size) {
    for (int frame = 0; frame < padded; frame++) {
      v128_t dot = all(0.0f);
      const float *key = keys + frame * each + place;
      for (int i = 0; i < size && frame < frames; i += 4) dot = add(dot, mul(load(q + place + i), load(key + i)));
      scratch[frame] = frame < frames ? sum(dot) : -1e30f;
    }
    softmax(scratch, padded);
    for (int i = 0; i < size; i += 4) {
      v128_t mixed = all(0.0f);
      for (int frame = 0; frame < frames; frame++)
        mixed = add(mixed, mul(all(scratch[frame]), load(values + frame * each + place + i)));
      wasm_v128_store(out + place + i, mixed);
    }
  }
}
