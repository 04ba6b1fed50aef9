// The model's worker: loads it, and plays a session by the page's commands. It receives
// {do: NAME, …} and sends {say: NAME, …}, as over the socket of the Python page.

import {fromHex} from "./bytes.js";
import {UserError} from "./errors.js";
import {Files} from "./files.js";
import {automatic, Governor} from "./governor.js";
import {loadModel} from "./model.js";
import {Prompts} from "./prompts.js";
import {checkRecipe, Session} from "./session.js";
import * as shareCode from "./share_code.js";

const WARM_UP = 24;  // frames before the user's first: the browser compiles in stages …
const WARM_MS = 4000;  // … or as many as take so long
const FUTURE = 8;  // frames of what-if
const IDLE = 4;
const FUTURES = [1, 2, 4, 5, 7, 8];  // left, jump left, nothing, jump, right, jump right

let model = null, prompts = null, session = null, governor = null;
const keys = {held: IDLE, tapped: null, stamp: 0};
const pace = {fps: 15, steps: 0, auto: false, stepMode: false};
let commands = [], wake = () => {};
let due = 0, slow = "", saidThreads = 0;

const say = (name, more = {}, transfer = []) => postMessage({say: name, ...more}, transfer);

self.onmessage = ({data}) => {
  if (data.do === "keys") {
    keys.held = data.action;
    if (data.action !== IDLE) { keys.tapped = data.action; keys.stamp = data.stamp; }
  } else if (data.do === "settings") {
    const {fps, steps, auto, step_mode: stepMode} = data;
    for (const [name, value] of Object.entries({fps, steps, auto, stepMode})) if (value !== undefined) pace[name] = value;
  } else commands.push(data);
  wake();
};

const does = {
  async load({list, base, backends, threads}) {
    const files = new Files(list, base);
    model = await loadModel(files, {backends, threads, say});
    prompts = new Prompts(files, await files.json("clips"), model.about.network.image_size);
    prompts.index.records.forEach((record) => { record.actions = Array.from(fromHex(record.actions)); });
    governor = new Governor(automatic(model.about));
    const {about} = model;
    say("hello", {name: about.name, step: about.step, steps: about.steps, fingerprint: about.fingerprint, clips: prompts.count});
  },

  async start({clip, frames, png}) {
    await begin(await prompts.load(png ? {png} : {clip: clip ?? Math.floor(Math.random() * prompts.count), frames}));
  },

  async wait() { keys.tapped = IDLE; },

  async rewind({to}) {
    quiet();
    show(await session.rewind(to), {steps: stepsAt(session.at)});
  },

  async what_if() {
    quiet();
    const steps = chosenSteps();
    say("branches", {actions: FUTURES, frames: FUTURE});
    await session.settle();
    await session.whatIf(FUTURES, FUTURE, steps, (branch, t, pixels) => say("branch_frame", {branch, t, pixels}));
    say("branches_done");
  },

  async choose({branch}) { show(await session.choose(branch), {steps: stepsAt(session.at)}); },

  async share() {
    const recipe = await session.recipe(fromHex(model.about.fingerprint));
    say("code", {code: await shareCode.encode(recipe)});
  },

  async replay({code}) {
    quiet();
    const recipe = await shareCode.decode(code);
    checkRecipe(recipe, model.about);
    const prompt = await prompts.ofRecipe(recipe);
    await begin(prompt, recipe.seed);
    session.follow(recipe);
    if (!session.script.length) say("replayed", {differs: false, frames: 0});
  },

  // For measurements and tests: the raw frames.
  async frames({start, stop}) { say("frames", {frames: await session.history.frames(start, stop)}); },
};

// One turn of the worker: commands, then a frame if one is due.
async function live() {
  for (;;) {
    const command = commands.shift();
    if (command) await guarded(() => does[command.do](command));
    else if (!session || !wanted()) await new Promise((resolve) => { wake = resolve; });
    else if (performance.now() < due) await pause(due - performance.now());
    else await guarded(frame);
    if (model) sayBackend();
    await turn();
  }
}

async function guarded(work) {
  try {
    await work();
  } catch (error) {
    quiet();
    if (session) session.script = [];
    const known = error instanceof UserError;
    if (!known) console.error(error);
    say(model ? "error" : "fault", {text: known ? error.message : `The model stopped: ${error.message ?? error}`});
  }
}

const wanted = () => session.script.length || pace.auto || keys.tapped !== null || (keys.held !== IDLE && !pace.stepMode);

function quiet() {
  keys.held = IDLE;
  keys.tapped = null;
  pace.auto = false;
}

function takenAction() {
  const {held, tapped} = keys;
  keys.tapped = null;
  return pace.stepMode ? tapped ?? IDLE : held !== IDLE ? held : tapped ?? IDLE;
}

const chosenSteps = () => pace.steps || governor.choose(pace.fps);
const stepsAt = (number) => session.history.programs[number]?.[0] ?? 0;

async function frame() {
  const began = performance.now();
  due = Math.max(due + 1000 / pace.fps, began);
  if (due > began + 1000 / pace.fps) due = began + 1000 / pace.fps;
  if (session.script.length && keys.held === IDLE && keys.tapped === null) {
    const {pixels, action, steps, over, differs} = await session.replayStep();
    show(pixels, {action, steps});
    await session.settle();
    governor.note(steps, performance.now() - began);
    if (over) say("replayed", {differs, frames: session.length - session.given});
    return;
  }
  session.script = [];
  const steps = chosenSteps(), action = takenAction(), stamp = keys.stamp;
  keys.stamp = 0;
  show(await session.step(action, steps), {action, steps, stamp});
  await session.settle();
  governor.note(steps, performance.now() - began);
  sayRate(steps);
}

function show(pixels, {action = IDLE, steps = 0, stamp = 0}) {
  const {at: place, length: total, window: window_, given} = session;
  say("frame", {pixels, action, steps, stamp, place, total, given, window: window_});
}

function sayRate(steps) {
  const reached = governor.capacity(steps);
  const count = Math.max(1, Math.round(reached));
  const text = reached < .9 * pace.fps ? `Slow machine: ${count} frame${count === 1 ? "" : "s"} a second.` : "";
  if (Boolean(text) !== Boolean(slow)) say("rate", {text});
  slow = text;
}

async function begin(prompt, seed) {
  quiet();
  const opened = new Session(model.generator, prompt, seed);
  if (!session) await warmUp(opened);
  session = opened;
  due = 0;
  say("started", {given: session.given, seed: session.seed, source: prompt.source.png ? {} : prompt.source});
  for (let number = 0; number < session.given; number++)
    say("given", {pixels: prompt.frames[number], number});
  show(prompt.frames.at(-1), {steps: 0});
}

// Runs the model before the first session, so that the governor has measured a frame's time.
async function warmUp(opened) {
  const least = governor.choices[0], trial = new Session(model.generator, opened.prompt, 0);
  const start = performance.now();
  for (let done = 0; done < 1;) {
    const began = performance.now();
    await trial.step(trial.length % 15, least);
    await trial.settle();
    const now = performance.now();
    done = Math.max((trial.length - trial.given) / WARM_UP, (now - start) / WARM_MS);
    if (done > .5) governor.note(least, now - began);
    say("warming", {done: Math.min(1, done)});
  }
  governor.choose(pace.fps, true);
}

// What computes; again if the threads changed, since the kernels go on with one if another is lost.
function sayBackend() {
  const {backend, generator: {network: {threads}}} = model;
  if (threads !== saidThreads) say("backend", {backend, threads});
  saidThreads = threads;
}

// Lets messages arrive; faster than a timer.
const channel = new MessageChannel();
function turn() {
  return new Promise((resolve) => { channel.port1.onmessage = resolve; channel.port2.postMessage(0); });
}

function pause(ms) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    wake = () => { clearTimeout(timer); resolve(); };
  });
}

live();
