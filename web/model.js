// Loads the network: as kernels in WebAssembly, as graphs in onnxruntime where the kernels do not
// compute it, and on WebGPU if that gives the same results and is not slower.

import {UserError} from "./errors.js";
import {Generator, toModel} from "./generator.js";
import {supports} from "./kernel_memory.js";
import {kernelsFile, KernelNetwork} from "./kernel_network.js";
import {OnnxNetwork} from "./onnx_network.js";

const TOLERANCE = 2e-3;  // between two backends' first frames, in [−1, 1], …
const DIFFERENT = .01;  // … which this share of the numbers may exceed: near ties of two displacements
const TRIAL = 1000;  // ms for which a backend's speed is measured
const WEIGHTS = "weights.bin";
const GRAPHS = ["denoise", "encode"];
const RUNTIMES = {
  onnxruntime: {module: "ort.wasm.mjs", loader: "ort-wasm.mjs", binary: "ort-wasm.wasm", provider: "wasm"},
  webgpu: {module: "ort.webgpu.mjs", loader: "ort-webgpu.mjs", binary: "ort-webgpu.wasm", provider: "webgpu"},
};

// {about, generator, backend}; `say` receives progress messages. backends: of "wasm" (the
// kernels if they compute this network, else onnxruntime), "onnxruntime" and "webgpu".
export async function loadModel(files, {backends, threads, say}) {
  const about = await files.json("model.json");
  const fetched = new Progress(files, say);
  const plain = !backends.includes("onnxruntime") && supports(about.network) ? "wasm" : "onnxruntime";
  const wanted = [plain, ...(backends.includes("webgpu") && await hasWebGpu() ? ["webgpu"] : [])];
  fetched.expect([WEIGHTS, ...new Set(wanted.flatMap((backend) => filesOf(backend, threads)))]);
  const open = async (backend) => new Generator(about, await network(backend, {about, fetched, files, threads}));
  let backend = plain, generator = await open(plain);
  if (wanted.includes("webgpu")) {
    const found = await open("webgpu").catch(unusable);
    const better = found && await isBetter(found, generator, backends.includes("wasm")).catch(unusable);
    await (better ? generator : found)?.network.release();
    if (better) { generator = found; backend = "webgpu"; }
  }
  return {about, generator, backend};
}

function unusable(error) {
  console.warn("WebGPU is not used:", error);
  return null;
}

const filesOf = (backend, threads) => {
  if (backend === "wasm") return [kernelsFile(threads)];
  const {module, loader, binary} = RUNTIMES[backend];
  return [...GRAPHS.map((name) => `${name}.onnx`), module, loader, binary];
};

class Progress {
  constructor(files, say) { this.files = files; this.say = say; this.done = this.all = 0; this.started = {}; }

  expect(names) { for (const name of names) this.all += this.files.list[name].bytes; }

  get(name) {
    this.started[name] ??= this.files.fetch(name, (more) => {
      this.done += more;
      this.say("loading", {done: this.done, all: this.all});
    });
    return this.started[name];
  }
}

async function hasWebGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

async function network(backend, {about, fetched, files, threads}) {
  const names = [WEIGHTS, ...filesOf(backend, threads)];
  const [weights, ...others] = await Promise.all(names.map((name) => fetched.get(name)));
  try {
    if (backend === "wasm") return await KernelNetwork.create(others[0], about, weights, threads);
    const ort = await runtime(backend, others.at(-1), files, threads);
    const lanes = backend === "webgpu" ? 1 : Infinity;  // its LayerNormalization wants one scale for all lanes
    const how = {threads: ort.env.wasm.numThreads, lanes};
    return new OnnxNetwork(ort, about, await sessions(ort, backend, weights, others), how);
  } catch (error) {
    throw new UserError(`The model does not fit into this browser's memory, or cannot run here (${error.message ?? error}).`);
  }
}

async function runtime(backend, wasmBinary, files, threads) {
  const {module, loader} = RUNTIMES[backend];
  const ort = await import(files.url(module));
  Object.assign(ort.env.wasm, {
    wasmBinary,
    wasmPaths: {mjs: files.url(loader)},
    numThreads: backend === "onnxruntime" ? threads : 1,
    proxy: false,
  });
  ort.env.logLevel = "error";
  return ort;
}

async function sessions(ort, backend, weights, graphs) {
  const options = {
    executionProviders: [RUNTIMES[backend].provider],
    externalData: [{path: WEIGHTS, data: weights}],
    graphOptimizationLevel: "all",
  };
  const opened = {};
  for (const [i, name] of GRAPHS.entries()) opened[name] = await ort.InferenceSession.create(graphs[i], options);
  return opened;
}

// Whether WebGPU generates the same frames as WebAssembly, and if that can be chosen, at least as fast.
async function isBetter(found, plain, canChoose) {
  const frames = [await firstFrame(plain), await firstFrame(found)];
  const far = frames[0].filter((value, i) => !(Math.abs(value - frames[1][i]) < TOLERANCE)).length;
  if (far > DIFFERENT * frames[0].length) return unusable(`${far} of ${frames[0].length} numbers differ from WebAssembly`);
  if (!canChoose) return true;
  const [webGpu, wasm] = [await frameTime(found), await frameTime(plain)];
  return webGpu <= wasm || unusable(`a frame takes ${webGpu.toFixed(0)} ms, with WebAssembly ${wasm.toFixed(0)}`);
}

// The cache of two frames.
function trialCache(generator) {
  const frames = [37, 41].map((step) => toModel(Uint8Array.from({length: generator.pixels}, (_, i) => i * step % 256)));
  return generator.cacheOf(frames, [-1, 7]);
}

async function firstFrame(generator) {
  return generator.frame(await trialCache(generator), 7, {seed: 1, number: 2, steps: generator.about.steps[0]});
}

// The least ms of a frame of the fewest steps with its encoding; compilers have a second to finish.
async function frameTime(generator) {
  const cache = await trialCache(generator), end = performance.now() + TRIAL;
  let least = Infinity;
  do {
    const began = performance.now();
    const frame = await generator.frame(cache, 7, {seed: 1, number: 2, steps: Math.min(...generator.about.steps)});
    await generator.append(cache, frame, 7);
    least = Math.min(least, performance.now() - began);
  } while (performance.now() < end);
  return least;
}
