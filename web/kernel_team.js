// Threads that compute the network together: this one, and helpers that are workers with the same kernels
// and the same memory. The results are the same bits with any number of threads.

import {CONTROL, memoryFor} from "./kernel_memory.js";
import {Part} from "./kernel_part.js";

const START = 10_000;  // ms within which a helper must start
const PATIENCE = 2000;  // ms that this thread waits for helpers; a run takes some ten
const SPIN = .1;  // ms of waiting before a thread sleeps: to wake one takes about as long
const [ARRIVED, PHASE, JOB] = [0, 16, 32];  // in different cache lines
const FIELDS = ["row", "area", "count", "alone", "earlier"];  // of a job

class HelperLost extends Error {}

// Where threads wait for each other.
export class Barrier {
  constructor(control, threads, patience = Infinity) { Object.assign(this, {control, threads, patience}); }

  wait() {
    const {control, threads} = this, phase = Atomics.load(control, PHASE);
    if (Atomics.add(control, ARRIVED, 1) === threads - 1) {
      Atomics.store(control, ARRIVED, 0);
      Atomics.add(control, PHASE, 1);
      Atomics.notify(control, PHASE);
    } else if (!this.#spun(phase)) this.#sleep(phase);
  }

  // Whether the others came while this thread looked for them.
  #spun(phase) {
    const end = performance.now() + SPIN;
    do {
      for (let i = 0; i < 50; i++) if (Atomics.load(this.control, PHASE) !== phase) return true;
    } while (performance.now() < end);
    return false;
  }

  #sleep(phase) {
    while (Atomics.load(this.control, PHASE) === phase)
      if (Atomics.wait(this.control, PHASE, phase, this.patience) === "timed-out") throw new HelperLost();
  }
}

export const controlOf = (memory, {control}) => new Int32Array(memory.buffer, control, CONTROL);
export const jobOf = (control) => Object.fromEntries(FIELDS.map((name, i) => [name, control[JOB + i]]));

export class Team {
  // A team of at most so many threads; memory: is shared if there are several.
  static async create(module, memory, layout, threads) {
    const {exports: run} = await WebAssembly.instantiate(module, {env: {memory}});
    const team = new Team(run, module, memory, layout);
    try {
      await team.#startHelpers(threads);
    } catch (error) {
      team.#alone(`the kernels' threads did not start (${error?.message ?? error})`);
    }
    return team;
  }

  constructor(run, module, memory, layout) {
    Object.assign(this, {run, module, memory, layout, threads: 1, helpers: []});
    this.part = new Part(run, layout, {thread: 0, threads: 1, wait() {}});
  }

  release() {
    for (const helper of this.helpers) helper.terminate();
    this.helpers = [];
  }

  // Computes a job: see `compute` of kernel_part.js. If helpers were lost on the way, `memory` is
  // a copy afterwards.
  compute(job) {
    if (this.threads === 1 || !this.#together(job)) this.part.compute(job);
  }

  // Returns whether all helpers did their part; else this thread is the only one from now on.
  #together(job) {
    FIELDS.forEach((name, i) => { this.control[JOB + i] = Number(job[name]); });
    try {
      this.barrier.wait();
      this.part.compute(job);
      this.barrier.wait();
      return true;
    } catch (error) {
      if (!(error instanceof HelperLost)) throw error;
      this.#alone("a thread of the kernels did not answer");
      return false;
    }
  }

  async #startHelpers(threads) {
    if (threads === 1) return;
    const {module, memory, layout} = this;
    await Promise.all(Array.from({length: threads - 1}, (_, i) => this.#helper({module, memory, layout, threads, thread: i + 1})));
    this.control = controlOf(memory, layout);
    this.barrier = new Barrier(this.control, threads, PATIENCE);
    this.part = new Part(this.run, layout, {thread: 0, threads, wait: () => this.barrier.wait()});
    this.threads = threads;
  }

  #helper(about) {
    const helper = new Worker(new URL("./kernel_helper.js", import.meta.url), {type: "module"});
    this.helpers.push(helper);
    let timer;
    return new Promise((resolve, reject) => {
      timer = setTimeout(reject, START, new Error("they take too long"));
      helper.onmessage = resolve;
      helper.onerror = (event) => { event.preventDefault?.(); reject(event); };
      helper.postMessage(about);
    }).finally(() => clearTimeout(timer));
  }

  // Goes on with one thread, in a copy of the memory, so that a late helper does no harm.
  #alone(why) {
    console.warn(`${why}: one thread is used`);
    this.release();
    const before = this.memory.buffer;
    this.memory = memoryFor(this.layout, true);
    new Uint8Array(this.memory.buffer).set(new Uint8Array(before));
    this.run = new WebAssembly.Instance(this.module, {env: {memory: this.memory}}).exports;
    this.part = new Part(this.run, this.layout, {thread: 0, threads: 1, wait() {}});
    this.threads = 1;
  }
}
