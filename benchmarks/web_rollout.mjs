// Generates frames with the modules of the page, in Node.js:
//
//     node benchmarks/web_rollout.mjs FOLDER JOB OUTPUT
//
// FOLDER is an ONNX export. JOB is a JSON file: {steps, package, threads, clips: [{frames, given, actions, seed}]};
// frames: base64 of uint8 [given, H, W, 3]; actions: those that led into the given frames, then those of
// the frames to generate. "package" is the unpacked onnxruntime-web to compute with; without it, the
// kernels do, on so many "threads". With "teacher" of a clip (base64 of float32 [F, H, W, 3]), each frame follows those frames.
// OUTPUT gets all generated frames, float32 in [−1, 1].

import fs from "node:fs";
import "./node_workers.mjs";
import {Generator, toModel, toPixels} from "../web/generator.js";
import {supports} from "../web/kernel_memory.js";
import {kernelsFile, KernelNetwork} from "../web/kernel_network.js";
import {OnnxNetwork} from "../web/onnx_network.js";

const [folder, jobPath, output] = process.argv.slice(2);
const about = JSON.parse(fs.readFileSync(`${folder}/model.json`));
const weights = new Uint8Array(fs.readFileSync(`${folder}/weights.bin`));
const job = JSON.parse(fs.readFileSync(jobPath));
const bytes = (text) => Uint8Array.from(Buffer.from(text, "base64"));

async function network() {
  if (job.package) {
    const ort = await import(`${job.package}/dist/ort.wasm.mjs`);
    Object.assign(ort.env.wasm, {numThreads: 1, wasmPaths: `${job.package}/dist/`});
    ort.env.logLevel = "error";
    const options = {executionProviders: ["wasm"], externalData: [{path: "weights.bin", data: weights}]};
    const open = (name) => ort.InferenceSession.create(new Uint8Array(fs.readFileSync(`${folder}/${name}.onnx`)), options);
    return new OnnxNetwork(ort, about, {denoise: await open("denoise"), encode: await open("encode")});
  }
  if (!supports(about.network)) throw new Error("the kernels do not compute this network");
  const {threads = 1} = job, kernels = new URL(`../web/${kernelsFile(threads)}`, import.meta.url);
  return KernelNetwork.create(fs.readFileSync(kernels), about, weights, threads);
}

const generator = new Generator(about, await network()), file = fs.openSync(output, "w");
for (const {frames, given, actions, seed, teacher} of job.clips) {
  const pixels = bytes(frames), each = generator.pixels;
  const prompt = Array.from({length: given}, (_, i) => toModel(pixels.subarray(i * each, (i + 1) * each)));
  const followed = teacher && new Float32Array(bytes(teacher).buffer);
  const cache = await generator.cacheOf(prompt, actions.slice(0, given));
  for (let number = given; number < actions.length; number++) {
    const frame = await generator.frame(cache, actions[number], {seed, number, steps: job.steps});
    fs.writeSync(file, new Uint8Array(frame.buffer, frame.byteOffset, frame.byteLength));
    const at = (number - given) * each;
    const next = followed ? followed.slice(at, at + each) : toModel(toPixels(frame));
    await generator.append(cache, next, actions[number]);
  }
}
fs.closeSync(file);
await generator.network.release();
