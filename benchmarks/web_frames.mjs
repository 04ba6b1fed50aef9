// The time of a frame of the page's kernels, by its parts, in Node.js:
//
//     node benchmarks/web_frames.mjs FOLDER [--frames 60] [--steps 1,2,4] [--threads 1,2]
//
// FOLDER is an ONNX export (`cwm_jax.tools.export --format onnx --dtype float16 --ddim-steps 1,2,4`).
// Prints medians in ms, and the least, of the noise, of the S denoising steps, of the encoding into the
// caches that the frame joins, and of the whole. `node --cpu-prof` adds the share of each function.

import fs from "node:fs";
import {parseArgs} from "node:util";
import "./node_workers.mjs";
import {Generator, toModel, toPixels} from "../web/generator.js";
import {kernelsFile, KernelNetwork} from "../web/kernel_network.js";

const {values: given, positionals: [folder]} = parseArgs({allowPositionals: true, options: {
  frames: {type: "string", default: "60"}, steps: {type: "string", default: "1,2,4"},
  threads: {type: "string", default: "1,2"},
}});
const about = JSON.parse(fs.readFileSync(`${folder}/model.json`));
const weights = new Uint8Array(fs.readFileSync(`${folder}/weights.bin`));

async function generatorWith(threads) {
  const kernels = new URL(`../web/${kernelsFile(threads)}`, import.meta.url);
  return new Generator(about, await KernelNetwork.create(fs.readFileSync(kernels), about, weights, threads));
}

const median = (times) => times.toSorted((a, b) => a - b)[times.length >> 1];
const shown = (times) => `${median(times).toFixed(1)} (${Math.min(...times).toFixed(1)})`;

async function timed(times, work) {
  const began = performance.now(), result = await work();
  times.push(performance.now() - began);
  return result;
}

async function measure(generator, steps, frames) {
  const picture = toModel(Uint8Array.from({length: generator.pixels}, (_, i) => i * 37 % 256));
  const cache = await generator.cacheOf([picture], [-1]);
  const parts = {noise: [], frame: [], encoding: [], whole: []};
  for (let number = 1; number <= frames; number++) {
    await timed(parts.whole, async () => {
      await timed(parts.noise, () => generator.noiseOf(1, number));
      const frame = await timed(parts.frame, () => generator.frame(cache, number % 15, {seed: 1, number, steps}));
      await timed(parts.encoding, () => generator.append(cache, toModel(toPixels(frame)), number % 15));
    });
  }
  return parts;
}

for (const threads of given.threads.split(",").map(Number)) {
  const generator = await generatorWith(threads);
  await measure(generator, 1, 24);  // V8 compiles in stages
  for (const steps of given.steps.split(",").map(Number)) {
    const parts = await measure(generator, steps, Number(given.frames));
    const mean = parts.whole.reduce((a, b) => a + b) / parts.whole.length;
    const text = Object.entries(parts).map(([name, times]) => `${name} ${shown(times)}`).join(", ");
    console.log(`threads ${generator.network.threads}, steps ${steps}: ${text}; ${(1000 / mean).toFixed(1)} frames/s`);
  }
  await generator.network.release();
}
