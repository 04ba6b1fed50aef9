// The page: shows the worker's frames, and sends it keys and commands.

import {IDLE, Input, LABELS} from "./input.js";
import {Files} from "./files.js";
import * as png from "./png.js";
import {Recorder} from "./recorder.js";
import {missing, serveOffline, usableThreads} from "./support.js";

const $ = (id) => document.getElementById(id);
const files = new Files(JSON.parse($("files").textContent), document.baseURI);
const choices = new URLSearchParams(location.search);  // ?backend=wasm&threads=1, for measurements
let size = 64;

/* ---- state ---- */

let worker = null, ready = false;
let place = 0, total = 1, given = 1, mode = "hold";
let standing = "", replaying = false, waitingForCode = null, branches = null, futureTimer = 0;
let startClip = 0;
const arrivals = [], delays = [];
const recorder = new Recorder(size);

/* ---- messages ---- */

function note(text, bad = false) {
  $("note").textContent = text;
  $("note").classList.toggle("bad", bad);
}

function cover(title, text, {button = "", fault = false, share = 0} = {}) {
  $("cover").hidden = false;
  $("cover").classList.remove("gone");
  $("cover").classList.toggle("fault", fault);
  $("cover-title").textContent = title;
  $("cover-text").textContent = text;
  $("progress").hidden = fault;
  $("progress").firstElementChild.style.width = `${100 * share}%`;
  $("cover-button").hidden = !button;
  $("cover-button").textContent = button;
}

function uncover() {
  $("cover").classList.add("gone");
  setTimeout(() => { $("cover").hidden = $("cover").classList.contains("gone"); }, 500);
}

/* ---- the worker ---- */

const send = (message, transfer = []) => worker?.postMessage(message, transfer);

const handlers = {
  loading({done, all}) {
    cover("Loading the model", `${(done / 1e6).toFixed(1)} of ${(all / 1e6).toFixed(1)} MB. It will run in your browser.`, {share: .9 * done / all});
    if (done >= all) cover("Preparing the model", "Only the first visit downloads it; then the page also works offline.", {share: .92});
  },
  hello(message) {
    Object.assign(window.play, {model: message});
    $("title").textContent = `${message.name}, step ${message.step.toLocaleString("en")}`;
    $("model").textContent = ` · model ${message.fingerprint}. `;
    showSteps(message.steps);
    const code = codeOfAddress();
    if (code) $("code").value = code;
    if (code) replay(code);
    else send({do: "start", clip: startClip, frames: Number($("prompt").value)});
  },
  backend({backend, threads}) {
    Object.assign(window.play.model, {backend, threads});
    $("backend").textContent = backend === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads === 1 ? "" : "s"}`;
  },
  warming({done}) { cover("Warming up", "The browser compiles the model while it runs.", {share: .92 + .08 * done}); },
  started({given: frames, source}) {
    ready = true;
    window.play.sessions++;
    uncover();
    closeFutures();
    given = frames;
    $("scrub").min = given - 1;
    delays.length = arrivals.length = 0;
    setEnabled(true);
    markClip(source.clip);
    if (!replaying) { note(""); $("hint").hidden = false; }
    if (!window.play.started) { window.play.started = performance.now(); keepOffline(); }
  },
  given({pixels, number}) { setTimeout(() => total <= given && paint($("screen"), pixels), 90 * number); },
  frame(message) {
    paint($("screen"), message.pixels);
    ambience();
    ({place, total, given} = message);
    const now = performance.now();
    if (message.stamp > 0) { delays.push(now - message.stamp); if (delays.length > 200) delays.shift(); }
    if (message.steps) arrivals.push(now);
    window.play.frames++;
    window.play.seen?.(message, now);
    $("scrub").min = given - 1;
    $("scrub").max = total - 1;
    $("scrub").value = place;
    $("place").textContent = `${place + 1} / ${total}`;
    $("r-steps").textContent = message.steps || "given";
    $("r-window").textContent = `${message.window} frame${message.window === 1 ? "" : "s"}`;
    if (recorder.on) recorder.add($("screen"), message.action);
  },
  error({text}) {
    note(text, true);
    replaying = false;
    waitingForCode?.("");
    halt();
    closeFutures();
    if (!ready) send({do: "start", clip: startClip, frames: Number($("prompt").value)});
  },
  fault({text}) { fault(text); },
  rate({text}) { if (!$("note").textContent || $("note").textContent === standing) note(text); standing = text; },
  replayed({differs, frames}) {
    replaying = false;
    note(differs ? `Played again, ${frames} frames. The last one differs by rounding from the shared one: this device adds in another order.`
      : frames ? `Played again, ${frames} frames, the same to the last bit.` : "This code has no frames after its start.");
  },
  code({code}) { waitingForCode?.(code); },
  branches: showFutures,
  branch_frame({branch, t, pixels}) { if (branches) { branches.frames[branch][t] = pixels; progressOfFutures(); } },
  branches_done() { if (branches) { branches.done = true; progressOfFutures(); note("Choose a future to continue from it."); } },
  frames({frames}) { window.play.gotFrames?.(frames); },
};

function fault(text) {
  setEnabled(false);
  worker?.terminate();
  worker = null;
  cover("The model cannot run here", text, {button: "Try again", fault: true});
}

function begin() {
  const lacks = missing();
  if (lacks) {
    cover("A recorded rollout", lacks, {fault: true});
    document.body.dataset.state = "unsupported";
    return;
  }
  worker = new Worker(files.url("worker.js"), {type: "module"});
  worker.onmessage = ({data}) => handlers[data.say](data);
  worker.onerror = (event) => { event.preventDefault(); fault(`The model's program could not be started. ${event.message ?? ""}`); };
  const backend = choices.get("backend");
  send({
    do: "load", list: files.list, base: document.baseURI,
    backends: backend ? [backend] : ["webgpu", "wasm"],
    threads: usableThreads(Number(choices.get("threads"))),
  });
  send({do: "settings", fps: Number($("fps").value)});
}

function keepOffline() {
  navigator.serviceWorker?.controller?.postMessage("keep all");
}

/* ---- pictures ---- */

function paint(canvas, pixels) {
  const context = canvas.getContext("2d", {alpha: false});
  const image = context.createImageData(size, size), to = image.data;
  for (let i = 0, from = 0; i < to.length;) {
    to[i++] = pixels[from++]; to[i++] = pixels[from++]; to[i++] = pixels[from++]; to[i++] = 255;
  }
  context.putImageData(image, 0, 0);
}

// The glow of the picture on the page: few pixels, which the browser enlarges smoothly, with a
// transparent rim. A blur of the style sheet would be computed for each frame.
function ambience() {
  const context = $("glow").getContext("2d");
  context.imageSmoothingEnabled = true;
  context.globalAlpha = .25;
  context.filter = "saturate(1.5)";
  context.drawImage($("screen"), 1, 1, 8, 8);
  $("glow").classList.add("on");
}

function readOut() {
  const now = performance.now();
  while (arrivals.length && now - arrivals[0] > 2000) arrivals.shift();
  const span = arrivals.length > 1 ? arrivals.at(-1) - arrivals[0] : 0;
  $("r-fps").textContent = span > 300 ? ((arrivals.length - 1) / span * 1000).toFixed(1) : "–";
  if (delays.length) {
    const sorted = [...delays].sort((a, b) => a - b);
    const at = (share) => Math.round(sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]);
    $("r-latency").textContent = `${at(.5)} · ${at(.95)} ms`;
  }
}

/* ---- what if ---- */

function showFutures({actions, frames}) {
  closeFutures();
  branches = {frames: actions.map(() => []), count: frames, done: false};
  const grid = $("futures-grid");
  actions.forEach((action, branch) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    button.append(canvas, LABELS[action]);
    button.disabled = true;
    button.onclick = () => { closeFutures(); send({do: "choose", branch}); };
    grid.append(button);
  });
  const canvases = [...grid.querySelectorAll("canvas")];
  let t = 0;
  futureTimer = setInterval(() => {
    canvases.forEach((canvas, i) => { const some = branches.frames[i]; if (some.length) paint(canvas, some[Math.min(t, some.length - 1)]); });
    t = (t + 1) % (frames + 5);  // the last picture is shown longer
  }, 110);
  $("futures").hidden = false;
  note("Generating six futures …");
}

function progressOfFutures() {
  if (branches.done) for (const button of $("futures-grid").children) button.disabled = false;
}

function closeFutures() {
  if (!$("futures").hidden) note(standing);
  clearInterval(futureTimer);
  branches = null;
  $("futures").hidden = true;
  $("futures-grid").replaceChildren();
}

/* ---- commands ---- */

function pressed(action) {
  if (action !== IDLE) {
    closeFutures();
    $("hint").hidden = true;
    if (replaying) note("You control the session from here.");
    else if ($("note").classList.contains("bad")) note(standing);
    replaying = false;
  }
  send({do: "keys", action, stamp: performance.now()});
}

function rewindBy(frames) {
  const to = Math.max(given - 1, Math.min(total - 1, place + frames));
  if (to !== place) rewindTo(to);
}

function rewindTo(to) {
  halt();
  closeFutures();
  place = to;
  send({do: "rewind", to});
}

function setMode(value) {
  mode = value;
  showMode();
  $("hint").hidden ||= mode === "auto";
  send({do: "settings", auto: mode === "auto", step_mode: mode === "step"});
}

function showMode() {
  for (const button of $("modes").children) button.setAttribute("aria-checked", button.dataset.mode === mode);
}

function halt() {  // the worker stops by itself
  if (mode === "auto") mode = "hold";
  showMode();
}

function oneFrame() {
  closeFutures();
  send({do: "wait"});
}

function whatIf() {
  if (!ready) return;
  input.release();
  halt();
  send({do: "what_if"});
}

function start(source) {
  replaying = false;
  halt();
  send({do: "start", frames: Number($("prompt").value), ...source});
  $("screen").focus({preventScroll: true});
}

function replay(code) {
  if (!code.trim()) { note("Paste a share code first.", true); return; }
  replaying = true;
  halt();
  note("Generating the session again; press a key to take over.");
  send({do: "replay", code});
  $("screen").focus({preventScroll: true});
}

function makeCode() {
  return new Promise((resolve) => {
    waitingForCode = (code) => { waitingForCode = null; if (code) $("code").value = code; resolve(code); };
    send({do: "share"});
  });
}

const linkOf = (code) => `${location.href.split("#")[0]}#${code}`;
const codeOfAddress = () => location.hash.startsWith("#CWM") ? location.hash.slice(1) : "";

async function copyLink() {
  const code = await makeCode();
  if (!code) return;
  const copied = await navigator.clipboard?.writeText(linkOf(code)).then(() => true, () => false);
  if (!copied) $("code").value = linkOf(code);
  note(copied ? "Copied: the link opens this session." : "The link is in the field: copy it from there.");
}

async function toggleRecording() {
  try {
    if (!recorder.on) {
      recorder.start();
      recorder.add($("screen"), IDLE);
      note("Recording. Each generated frame is added to the video.");
    } else {
      const {blob, name} = await recorder.stop(), link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = link.textContent = name;
      note("Saved: ");
      $("note").append(link);
      link.click();
    }
  } catch (error) {
    note(error.message, true);
  }
  $("live").hidden = !recorder.on;
  $("record").textContent = recorder.on ? "■ Stop and save" : "● Record a video";
}

// The user's picture: its middle, reduced to the size of a frame.
async function usePicture(file) {
  if (!file) return;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) { note("This browser cannot read that file as a picture: use a PNG or JPEG.", true); return; }
  const side = Math.min(bitmap.width, bitmap.height), canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d", {alpha: false});
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, size, size);
  const {data} = context.getImageData(0, 0, size, size);
  const pixels = Uint8Array.from({length: size * size * 3}, (_, i) => data[Math.floor(i / 3) * 4 + i % 3]);
  start({png: await png.encode(pixels, size, size)});
}

function pickPicture() {
  const picker = document.createElement("input");
  picker.type = "file";
  picker.accept = "image/*";
  picker.onchange = () => usePicture(picker.files[0]);
  picker.click();
}

/* ---- the page's controls ---- */

function showSteps(numbers) {
  $("steps").replaceChildren($("steps").querySelector("legend"));
  for (const steps of ["auto", ...numbers]) {
    const label = document.createElement("label"), radio = document.createElement("input");
    Object.assign(radio, {type: "radio", name: "steps", value: steps, checked: steps === "auto"});
    radio.onchange = () => send({do: "settings", steps: steps === "auto" ? 0 : steps});
    label.append(radio, String(steps));
    $("steps").append(label);
  }
}

async function showGallery() {
  const {clips, rows} = await files.json("gallery");
  startClip = clips[0];
  const gallery = $("gallery");
  const sheet = files.url("gallery.png");
  gallery.style.setProperty("--sheet", `url("${sheet}")`);
  gallery.style.setProperty("--columns", clips.length);
  gallery.style.setProperty("--rows", rows);
  clips.forEach((clip, i) => {
    const button = document.createElement("button");
    button.style.setProperty("--x", `${100 * i / (clips.length - 1)}%`);
    button.dataset.clip = clip;
    button.setAttribute("aria-label", `Clip ${clip}`);
    button.setAttribute("aria-pressed", "false");
    button.title = `Start from clip ${clip}`;
    button.onclick = () => start({clip});
    gallery.append(button);
  });
}

function markClip(clip) {
  for (const button of $("gallery").children) button.setAttribute("aria-pressed", Number(button.dataset.clip) === clip);
}

function setEnabled(on) {
  for (const control of document.querySelectorAll("main button, #scrub, #code")) {
    if (control.id !== "cover-button" && control.id !== "futures-close") control.disabled = !on;
  }
}

const input = new Input({
  pads: document.querySelectorAll(".pad [data-key]"),
  changed: pressed,
  commands: {
    KeyZ: () => rewindBy(-1),
    KeyX: () => rewindBy(1),
    Period: oneFrame,
    KeyP: (again) => again || setMode(mode === "auto" ? "hold" : "auto"),
    KeyF: (again) => again || whatIf(),
    Escape: closeFutures,
  },
});

function wire() {
  for (const button of $("modes").children)
    button.onclick = () => { setMode(button.dataset.mode); $("screen").focus({preventScroll: true}); };
  const clicks = {
    wait: oneFrame, whatif: whatIf, "futures-close": closeFutures, back: () => rewindBy(-1), forth: () => rewindBy(1),
    random: () => start({clip: null}), picture: pickPicture, record: toggleRecording,
    "make-code": async () => { const code = await makeCode(); if (code) note(`A code of ${code.length} letters: it plays this session.`); },
    "copy-link": copyLink, "play-code": () => replay($("code").value.replace(/^[^#]*#/, "")), "cover-button": () => location.reload(),
  };
  for (const [id, act] of Object.entries(clicks)) $(id).onclick = act;
  $("scrub").oninput = () => rewindTo(Number($("scrub").value));
  $("prompt").oninput = () => { $("prompt-value").textContent = $("prompt").value; };
  $("fps").oninput = () => { $("fps-value").textContent = $("fps").value; send({do: "settings", fps: Number($("fps").value)}); };
  addEventListener("hashchange", () => codeOfAddress() && ready && replay(codeOfAddress()));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => { event.preventDefault(); usePicture(event.dataTransfer.files[0]); });
  setInterval(readOut, 250);
}

// For tests and measurements.
window.play = {
  frames: 0,
  sessions: 0,
  makeCode,
  replay,
  send,
  start,
  history: (from, to) => new Promise((resolve) => { window.play.gotFrames = resolve; send({do: "frames", start: from, stop: to}); }),
};

wire();
setEnabled(false);
if (!await serveOffline(new URL("sw.js", document.baseURI))) {
  await showGallery().catch((error) => note(error.message, true));
  begin();
}
