// What the network's outputs mean for a noisy sample; `cwm_jax/onnx/prediction.py` has the same as ONNX
// nodes. Samples are in patches, in the order token, row, column, channel.

export class Prediction {
  // about: model.json.
  constructor(about) {
    this.about = about;
    this.sizes = about.network;
    this.patch = this.sizes.patch_size ** 2 * 3;  // numbers of a patch
    this.order = patchOrder(this.sizes);
  }

  // A frame of numbers in patches.
  inPatches(frame) {
    const {order} = this, out = new Float32Array(order.length);
    for (let i = 0; i < out.length; i++) out[i] = frame[order[i]];
    return out;
  }

  // The residual of a frame from the last one, as the network encodes it; without history the frame.
  residual(frame, last) {
    const {order, sizes: {history, residual_scale: scale}} = this;
    if (!history) return this.inPatches(frame);
    const out = new Float32Array(order.length);
    for (let i = 0; i < out.length; i++) out[i] = (frame[order[i]] - last[order[i]]) / scale;
    return out;
  }

  // One denoising step of a sample, in place, from ᾱ = now to after; out: the network's outputs, `columns` a token.
  advance(sample, out, columns, last, now, after) {
    const {tokens, residual_scale: scale, displacement, prediction: predicted} = this.sizes, noise = 1 - now, sigma = Math.sqrt(noise), root = Math.sqrt(now);
    const guess = displacement ? this.#displaced(out, columns, last) : null;
    const [low, high] = this.about.log_variances, back = Math.sqrt(1 / now), less = Math.sqrt(1 / now - 1);
    const keep = Math.sqrt(after), rest = Math.sqrt(1 - after);
    for (let token = 0, i = 0; token < tokens; token++) {
      const from = token * columns;
      const variance = guess ? Math.exp(Math.min(high, Math.max(low, out[from + this.patch]))) : 1;
      const whole = variance * now + noise, mixed = (1 - variance) * root * sigma, unknown = Math.sqrt(variance / whole);
      for (let at = from; at < from + this.patch; at++, i++) {
        let velocity = out[at];
        if (predicted === "clean") velocity = (sample[i] * root - velocity) / sigma;
        if (guess) velocity = (sample[i] * mixed - guess[i] / scale * sigma) / whole + velocity * unknown;
        const clean = sample[i] * root - velocity * sigma;
        sample[i] = clean * keep + (sample[i] * back - clean) / less * rest;
      }
    }
  }

  // How each small patch's copy, by its most likely displacement, differs from the last frame.
  #displaced(out, columns, last) {
    const {image_size: size, patch_size: side, displacement} = this.sizes;
    const {down, across, patch: small, cost} = displacement, inside = side / small, reach = 2 * across + 1;
    const guess = new Float32Array(last.length), edge = (place) => Math.min(size - 1, Math.max(0, place));
    const grid = size / side;
    for (let block = 0; block < (size / small) ** 2; block++) {
      const top = Math.floor(block / (size / small)), left = block % (size / small);
      const token = Math.floor(top / inside) * grid + Math.floor(left / inside);
      const place = top % inside * inside + left % inside;
      const chosen = best(out, token * columns + this.patch + 1 + place * cost.length, cost);
      const dy = Math.floor(chosen / reach) - down, dx = chosen % reach - across;
      for (let y = 0; y < small; y++) for (let x = 0; x < small; x++) {
        const row = top * small + y, column = left * small + x;
        const to = token * this.patch + (row % side * side + column % side) * 3;
        const from = (edge(row + dy) * size + edge(column + dx)) * 3, here = (row * size + column) * 3;
        for (let c = 0; c < 3; c++) guess[to + c] = last[from + c] - last[here + c];
      }
    }
    return guess;
  }

  // The frame of a denoised sample, with what stands still as in the last one; see
  // `cwm_jax/diffusion/stillness.py`.
  finished(sample, last) {
    const frame = this.added(sample, last), {image_size: size, still} = this.sizes;
    if (!still) return frame;
    const {patch, share, threshold} = still;
    const most = (threshold / 127.5) ** 2 * 3 * patch ** 2, small = [];  // most: of the sum of squares
    for (let top = 0; top < size; top += patch) for (let left = 0; left < size; left += patch) {
      const rows = Array.from({length: patch}, (_, y) => ((top + y) * size + left) * 3);
      let sum = 0;
      for (const row of rows) for (let i = row; i < row + 3 * patch; i++) sum += (frame[i] - last[i]) ** 2;
      if (sum < most) small.push(rows);
    }
    if (small.length < share * (size / patch) ** 2) return frame;
    for (const row of small.flat()) frame.set(last.subarray(row, row + 3 * patch), row);
    return frame;
  }

  // The frame of a denoised sample.
  added(sample, last) {
    const {order, sizes: {history, residual_scale: scale}} = this, frame = new Float32Array(sample.length);
    for (let i = 0; i < frame.length; i++) {
      const pixel = order[i];
      frame[pixel] = history ? Math.min(1, Math.max(-1, last[pixel] + scale * sample[i])) : sample[i];
    }
    return frame;
  }
}

// The index of the largest logit less its cost.
function best(logits, start, cost) {
  let found = 0, most = -Infinity;
  for (let i = 0; i < cost.length; i++) {
    const value = logits[start + i] - cost[i];
    if (value > most) { most = value; found = i; }
  }
  return found;
}

// For each number of the patches, in the order token, row, column, channel, its index in the frame.
function patchOrder({image_size: size, patch_size: side}) {
  const grid = size / side, order = new Int32Array(size * size * 3);
  for (let i = 0; i < order.length; i++) {
    const channel = i % 3, column = Math.floor(i / 3) % side, row = Math.floor(i / (3 * side)) % side;
    const token = Math.floor(i / (3 * side * side));
    const y = Math.floor(token / grid) * side + row, x = token % grid * side + column;
    order[i] = (y * size + x) * 3 + channel;
  }
  return order;
}
