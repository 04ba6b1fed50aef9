// Loads the network: as kernels in WebAssembly, as graphs in onnxruntime where the kernels do not
// compute it, and on WebGPU if that gives the same results.

import {UserError} from "./errors.js";
import {Generator, toModel} from "./generator.js";
import {supports} from "./kernel_memory.js";
import {KernelNetwork} from "./kernel_network.js";
import {OnnxNetwork} from "./onnx_network.js";

const TOLERANCE = 2e-3;  // between two backends' first frames, in [−1, 1], …
const DIFFERENT = .01;  // … which this share of the numbers may exceed: near ties of two displacements
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
    const found = await open("webgpu").catch((error) => { console.warn("WebGPU:", error); return null; });
    const better = found && await agree(found, generator);
    await (better ? generator : found)?.network.release();
    if (better) { generator = found; backend = "webgpu"; }
  }
  return {about, generator, backend};
}

const filesOf = (backend, threads) => {
  if (backend === "wasm") return [threads > 1 ? "kernels-shared.wasm" : "kernels.wasm"];
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
    return new OnnxNetwork(ort, about, await sessions(ort, backend, weights, others), ort.env.wasm.numThreads);
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

// Whether two generators generate the same first frame.
async function agree(one, other) {
  const given = toModel(Uint8Array.from({length: one.pixels}, (_, i) => i * 37 % 256));
  const frames = [];
  for (const generator of [one, other]) {
    const cache = await generator.cacheOf([given], [-1]);
    frames.push(await generator.frame(cache, 7, {seed: 1, number: 1, steps: generator.about.steps[0]}));
  }
  const far = frames[0].filter((value, i) => !(Math.abs(value - frames[1][i]) < TOLERANCE)).length;
  const same = far <= DIFFERENT * frames[0].length;
  if (!same) console.warn(`WebGPU differs from WebAssembly in ${far} of ${frames[0].length} numbers: not used`);
  return same;
}
