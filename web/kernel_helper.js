// A helper of the kernels: a worker that computes its part of each job, as long as it lives.

import {Part} from "./kernel_part.js";
import {Barrier, controlOf, jobOf} from "./kernel_team.js";

self.onmessage = async ({data: {module, memory, layout, thread, threads}}) => {
  const {exports: run} = await WebAssembly.instantiate(module, {env: {memory}});
  const control = controlOf(memory, layout), barrier = new Barrier(control, threads);
  const part = new Part(run, layout, {thread, threads, wait: () => barrier.wait()});
  postMessage("ready");
  setTimeout(() => {
    for (;;) {
      barrier.wait();
      part.compute(jobOf(control));
      barrier.wait();
    }
  });
};
