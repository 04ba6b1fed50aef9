// Gives Node.js the Worker of browsers, as far as the page's kernels use it. Import it first.

import {isMainThread, parentPort, Worker as Thread, workerData} from "node:worker_threads";

if (isMainThread) {
  globalThis.Worker = class {
    constructor(url) {
      this.thread = new Thread(new URL(import.meta.url), {workerData: url.href});
      this.thread.unref();
      this.thread.on("message", (data) => this.onmessage?.({data}));
      this.thread.on("error", (error) => this.onerror?.(error));
    }

    postMessage(data) { this.thread.postMessage(data); }

    terminate() { return this.thread.terminate(); }
  };
} else {
  globalThis.self = globalThis;
  globalThis.postMessage = (data) => parentPort.postMessage(data);
  const early = [], keep = (data) => early.push(data);
  parentPort.on("message", keep);
  await import(workerData);
  parentPort.off("message", keep);
  parentPort.on("message", (data) => self.onmessage({data}));
  for (const data of early) self.onmessage({data});
}
