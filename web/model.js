// Loads runtime and model: WebGPU where there is one that computes the same as WASM, else WASM.

import {UserError} from "./errors.js";
import {Generator, toModel} from "./generator.js";

const TOLERANCE = 1e-3;  // between WebGPU's and WASM's first frame, in [−1, 1]
const WEIGHTS = "weights.bin";
const GRAPHS = ["denoise", "encode"];
const RUNTIMES = {
  wasm: {module: "ort.wasm.mjs", loader: "ort-wasm.mjs", binary: "ort-wasm.wasm"},
  webgpu: {module: "ort.webgpu.mjs", loader: "ort-webgpu.mjs", binary: "ort-webgpu.wasm"},
};

// {about, generator, backend, threads}; `say` hears of the progress.
export async function loadModel(files, {backends, threads, say}) {
  const about = await files.json("model.json");
  const fetched = new Progress(files, say);
  const wanted = ["wasm", ...(backends.includes("webgpu") && await hasWebGpu() ? ["webgpu"] : [])];
  const model = [WEIGHTS, ...GRAPHS.map((name) => `${name}.onnx`)];
  fetched.expect([...model, ...wanted.flatMap((name) => Object.values(RUNTIMES[name]))]);
  const [weights, ...graphs] = await Promise.all(model.map((name) => fetched.get(name)));
  const open = async (backend) => {
    const ort = await runtime(backend, fetched, files, threads);
    return new Generator(ort, about, await sessions(ort, backend, weights, graphs));
  };
  const wasm = await open("wasm");
  let generator = wasm, backend = "wasm";
  if (wanted.includes("webgpu")) {
    const found = await open("webgpu").catch((error) => { console.warn("WebGPU:", error); return null; });
    if (found && await agree(found, wasm)) { generator = found; backend = "webgpu"; }
    const unused = generator === wasm ? found : wasm;
    for (const session of Object.values(unused?.sessions ?? {})) await session.release();
  }
  return {about, generator, backend, threads: backend === "wasm" ? threads : 1};
}

class Progress {
  constructor(files, say) { this.files = files; this.say = say; this.done = this.all = 0; }

  expect(names) { for (const name of names) this.all += this.files.list[name].bytes; }

  get(name) {
    return this.files.fetch(name, (more) => {
      this.done += more;
      this.say("loading", {done: this.done, all: this.all});
    });
  }
}

async function hasWebGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

async function runtime(backend, fetched, files, threads) {
  const {module, loader, binary} = RUNTIMES[backend];
  const [wasmBinary] = await Promise.all([fetched.get(binary), fetched.get(module), fetched.get(loader)]);
  const ort = await import(files.url(module));
  Object.assign(ort.env.wasm, {
    wasmBinary,
    wasmPaths: {mjs: files.url(loader)},
    numThreads: backend === "wasm" ? threads : 1,
    proxy: false,
  });
  ort.env.logLevel = "error";
  return ort;
}

async function sessions(ort, backend, weights, graphs) {
  const options = {
    executionProviders: [backend],
    externalData: [{path: WEIGHTS, data: weights}],
    graphOptimizationLevel: "all",
  };
  const opened = {};
  for (const [i, name] of GRAPHS.entries()) {
    try {
      opened[name] = await ort.InferenceSession.create(graphs[i], options);
    } catch (error) {
      throw new UserError(`The model does not fit into this browser's memory, or cannot run here (${error.message ?? error}).`);
    }
  }
  return opened;
}

// Whether two generators make the same first frame.
async function agree(one, other) {
  const given = toModel(Uint8Array.from({length: one.pixels}, (_, i) => i * 37 % 256));
  const frames = [];
  for (const generator of [one, other]) {
    const memory = await generator.remembered([given], [-1]);
    frames.push(await generator.frame(memory, 7, {seed: 1, number: 1, steps: generator.about.steps[0]}));
  }
  const worst = frames[0].reduce((most, value, i) => Math.max(most, Math.abs(value - frames[1][i])), 0);
  if (!(worst < TOLERANCE)) console.warn(`WebGPU differs from WASM by ${worst}: not used`);
  return worst < TOLERANCE;
}
