// The stage: keys in, frames out, over one WebSocket. See cwm_jax/play/web/messages.py for the protocol.

const SIZE = 64, FRAME_BYTES = SIZE * SIZE * 3, HEADER = 24;
const ARROW_LABELS = {1: "← left", 2: "↖ jump left", 4: "· nothing", 5: "↑ jump", 7: "→ right", 8: "↗ jump right"};
const CODES = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down",
  KeyA: "left", KeyD: "right", KeyW: "up", KeyS: "down", Space: "up",
};
const CAPS = {ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓"};
// Modifiers of the browser's own shortcuts, unless the game is played with them.
const MODIFIERS = {ctrlKey: "Control", metaKey: "Meta", altKey: "Alt"};
const $ = (id) => document.getElementById(id);

/* ---- state ---- */

let socket = null, over = false, connecting = false;
let pending = null;  // the command to send once connected
let standing = "";  // the default note
let knownControls = "";  // the game's controls
let place = 0, total = 1;
let mode = "hold", recording = false, replaying = false;
let unsure = false, unsureAge = 0;  // whether the overlay is on; frames since its last patches
let pace = {};  // the chosen frames a second and DDIM steps
let card = null;  // numbers of DDIM steps that the model's card lists as playable
let game = procgenGame(), lastSent = game.idle;
let expectBranches = null, futureTimer = 0;
let waitingForCode = null;
const sources = {keyboard: new Set(), touch: new Map(), gamepad: new Set()};
const arrivals = [], delays = [];

/* ---- messages to the player ---- */

function note(text, bad = false) {
  $("note").textContent = text;
  $("note").classList.toggle("bad", bad);
}

function cover(title, text = "", button = "") {
  $("cover").hidden = !title;
  $("cover-title").textContent = title;
  $("cover-text").textContent = text;
  $("cover-button").hidden = !button;
  $("cover-button").textContent = button;
}

/* ---- the socket ---- */

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
  else if (socket?.readyState === WebSocket.CLOSED && ["start", "replay"].includes(message.do)) {
    pending = message;
    connect();
  }
}

async function connect() {
  if (connecting) return;
  connecting = true;
  over = false;
  cover("Connecting …");
  const url = new URL("play/socket", document.baseURI);
  url.hash = url.search = "";
  // Proxies may hide the page's origin from the server: a key that only this page can read proves it.
  const answer = await fetch(new URL("key", url), {cache: "no-store"}).catch(() => null);
  if (answer?.ok) url.searchParams.set("key", (await answer.json().catch(() => ({}))).key ?? "");
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  connecting = false;
  let opened = false;
  socket = new WebSocket(url);
  socket.onopen = () => { opened = true; };
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({data}) => typeof data === "string" ? handleEvent(JSON.parse(data)) : handleFrames(data);
  socket.onclose = ({code}) => {
    waitingForCode?.("");
    if (over) return;
    if (!opened) return notOpened(url);
    const why = code === 1009 ? "The last message was larger than the server accepts."
      : "The connection was lost, and the session with it.";
    cover("Disconnected", why, "New session");
  };
}

/* Shows why there is no socket: the server answers a plain request with the reason. */
async function notOpened(url) {
  url.protocol = url.protocol === "wss:" ? "https:" : "http:";
  const answer = await fetch(url, {cache: "no-store"}).catch(() => null);
  const why = answer?.status === 426 ? await answer.text() : "The server did not answer.";
  cover("Not connected", why, "Try again");
}

const handlers = {
  progress: ({text}) => cover("Starting", text),
  full: ({text}) => { over = true; cover("Too many players", `${text} Try again when a player has left.`, "Try again"); },
  fault: ({text}) => { over = true; cover("Play is not possible", text); },
  idle: ({text, code}) => {
    over = true;
    cover("Paused", `${text} Its share code is in the field below “Share”: play it to continue from there.`, "New session");
    if (code) setCode(code);
  },
  hello: (m) => {
    $("title").textContent = m.title;
    const controls = JSON.stringify(m.controls);
    if (knownControls && knownControls !== controls) return location.reload();  // another game since the connection was lost
    knownControls = controls;
    if (!m.controls.procgen) {
      game = otherGame(m.controls);
      showControls(m.controls);
    }
    cover("");
    card = m.playable;
    markSteps();
    standing = m.demo ? "No model is loaded: these are real recordings, and keys have no effect." : "";
    send({do: "settings", ...pace});
    setMode(mode);
    sendKeys(true);
    if (pending) send(pending);
    pending = null;
  },
  started: ({given}) => {
    closeFutures();
    if (!replaying) note(standing);
    $("scrub").min = given - 1;
    recording = false; showRecording();
    delays.length = arrivals.length = 0;
  },
  error: ({text}) => { note(text, true); replaying = false; halt(); waitingForCode?.(""); },
  rate: ({text}) => {  // empty when the chosen frame rate is reached again
    const {textContent, firstElementChild, classList} = $("note");
    const free = text ? !classList.contains("bad") && !firstElementChild : textContent === standing;
    standing = text;
    if (free) note(text);
  },
  thinking: ({text}) => note(text),
  replayed: ({text}) => { replaying = false; note(text); },
  recording: ({on, start}) => {
    recording = on; showRecording();
    note(on ? `Recording from frame ${start}.` : start === null ? "No recording: the whole session is saved."
      : "Recorded. Save it as a video or as data.");
  },
  code: ({code}) => { waitingForCode?.(code); note(`A code of ${code.length} characters, which replays this session.`); },
  branches: (m) => { expectBranches = m; },
  file: (m) => {
    const link = document.createElement("a");
    link.href = new URL(`play/files/${m.token}/${m.name}`, document.baseURI);
    link.download = `cwm_jax_${m.name}`;
    link.textContent = link.download;
    note("Saved: ");
    $("note").append(link);
    link.click();
  },
};

function handleEvent(message) {
  handlers[message.event]?.(message);
}

/* ---- pictures ---- */

function paint(canvas, bytes, offset) {
  const context = canvas.getContext("2d", {alpha: false});
  const image = context.createImageData(SIZE, SIZE), to = image.data;
  for (let i = 0, from = offset; i < to.length; from += 3) {
    to[i++] = bytes[from]; to[i++] = bytes[from + 1]; to[i++] = bytes[from + 2]; to[i++] = 255;
  }
  context.putImageData(image, 0, 0);
}

function handleFrames(buffer) {
  const bytes = new Uint8Array(buffer);
  if (bytes[0] === 2) { showFutures(bytes); return; }
  if (bytes[0] === 3) { showUnsure(bytes); return; }
  if (++unsureAge > 1) hideUnsure();  // the patches of a frame follow it; until then the last ones stay
  const view = new DataView(buffer);
  paint($("screen"), bytes, HEADER);
  const steps = view.getUint16(4, true), window_ = view.getUint16(6, true);
  place = view.getUint32(8, true);
  total = view.getUint32(12, true);
  const stamp = view.getFloat64(16, true);
  const now = performance.now();
  if (stamp > 0) { delays.push(now - stamp); if (delays.length > 100) delays.shift(); }
  arrivals.push(now);
  window.playFrames = (window.playFrames ?? 0) + 1;
  $("scrub").max = total - 1;
  $("scrub").value = place;
  $("place").textContent = `${place + 1} / ${total}`;
  $("r-steps").textContent = steps || "given";
  $("r-window").textContent = window_ > 64 ? "–" : `${window_} frame${window_ === 1 ? "" : "s"}`;
}

/* ---- of which patches the model is unsure ---- */

// How far a patch of the predicted frame moves between denoising steps, in colours of 0 … 255: no
// tint up to the first, the strongest from the second on.
const SURE = 4, UNSURE = 16;

function showUnsure(bytes) {
  if (!unsure) return;  // sent before the key was pressed
  const [, rows, columns] = bytes, canvas = $("unsure");
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++)
    image.data.set([255, 40, 20, 190 * Math.max(0, Math.min(1, (bytes[3 + i] - SURE) / (UNSURE - SURE)))], 4 * i);
  context.putImageData(image, 0, 0);
  canvas.hidden = false;
  unsureAge = 0;
}

function hideUnsure() {
  $("unsure").hidden = true;
}

function setUnsure(on) {
  unsure = on;
  hideUnsure();
  setPace({unsure});
  note(on ? "Red: the model is less sure of these patches of the next frames." : standing);
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

function showFutures(bytes) {
  const {actions, names, frames} = expectBranches;
  closeFutures();
  const grid = $("futures-grid");
  grid.classList.toggle("many", actions.length > 6);
  actions.forEach((action, branch) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIZE;
    button.append(canvas, game.label(action, names[branch]));
    button.onclick = () => { closeFutures(); send({do: "choose", branch}); };
    grid.append(button);
  });
  const canvases = [...grid.querySelectorAll("canvas")];
  let t = 0;
  const showNext = () => {
    canvases.forEach((canvas, i) => paint(canvas, bytes, 1 + (i * frames + Math.min(t, frames - 1)) * FRAME_BYTES));
    t = (t + 1) % (frames + 5);  // the last picture is shown longer
  };
  showNext();
  futureTimer = setInterval(showNext, 110);
  $("futures").hidden = false;
  note("Choose a future to continue from.");
}

function closeFutures() {
  if (!$("futures").hidden) note(standing);
  clearInterval(futureTimer);
  $("futures").hidden = true;
  $("futures-grid").replaceChildren();
}

/* ---- keys, buttons, gamepad ---- */

// A game defines its keys (any words), their keyboard and gamepad inputs, and the action of the held
// ones. A button of the page holds all keys of its `data-key`.

function procgenGame() {
  return {
    idle: 4,
    key: (code) => CODES[code],
    action(keys) {  // 0 … 8: left, none, right, each with down, none, up
      const x = keys.has("right") - keys.has("left"), y = keys.has("up") - keys.has("down");
      return (x + 1) * 3 + y + 1;
    },
    gamepad: (pad) => [...directions(pad), ...(pad.buttons[0]?.pressed ? ["up"] : [])],
    label: (action) => ARROW_LABELS[action] ?? `action ${action}`,
  };
}

function otherGame({action_encoding, idle, actions}) {
  const keysOf = actions.map(keysOfControl), used = new Set(keysOf.flat());
  const others = keysOf.filter((keys, i) => i !== restOf({action_encoding, idle}) && !keys.some((key) => key.startsWith("Arrow")));
  return {
    idle,
    key: (code) => used.has(code) ? code : undefined,
    action(keys) {
      const held = keysOf.map((mine) => mine.every((key) => keys.has(key)) ? mine.length : 0);
      if (action_encoding === "buttons") return held.reduce((bits, on, i) => on ? bits | 1 << i : bits, 0);
      const most = Math.max(...held);
      return most ? held.indexOf(most) : idle;
    },
    gamepad: (pad) => [
      ...directions(pad).map((way) => `Arrow${way[0].toUpperCase()}${way.slice(1)}`),
      ...others.filter((_, i) => pad.buttons[i < 12 ? i : i + 4]?.pressed).flat(),  // 12 … 15 are the D-pad
    ],
    label: (action, name) => name,
  };
}

function keysOfControl({keys}, number) {  // a control without keys is held by its button only
  return keys.length ? keys : [`#${number}`];
}

function restOf({action_encoding, idle}) {  // the control that does nothing, which needs no button
  return action_encoding === "one_hot" ? idle : -1;
}

function showControls(controls) {
  document.querySelectorAll("#stage .pad").forEach((pad) => pad.remove());
  const pad = document.createElement("div");
  pad.className = "pad many";
  controls.actions.forEach((control, i) => {
    if (i === restOf(controls)) return;
    const button = document.createElement("button");
    button.dataset.key = keysOfControl(control, i).join(" ");
    button.append(control.name);
    const cap = document.createElement("kbd");
    cap.textContent = control.keys.map((code) => CAPS[code] ?? code.replace(/^(Key|Digit)/, "")).join(" ");
    if (control.keys.length) button.append(cap);
    pad.append(button);
  });
  $("controls").after(pad);
  wirePads();
  $("screen").setAttribute("aria-label", `Frames of ${controls.game} that the model generates.`);
  $("arrows-hint")?.remove();
  for (const hint of document.querySelectorAll("#stage [data-code]"))  // the game's own keys take precedence
    if (game.key(hint.dataset.code)) hint.matches("kbd") ? hint.remove() : hint.title = hint.title.replace(/ \(.*/, "");
  for (const hint of document.querySelectorAll(".hint span")) if (!hint.querySelector("kbd")) hint.remove();
}

function held() {
  return new Set([...sources.keyboard, ...[...sources.touch.values()].flat(), ...sources.gamepad]);
}

function sendKeys(force = false) {
  const keys = held(), action = game.action(keys);
  for (const button of document.querySelectorAll(".pad [data-key]"))
    button.classList.toggle("held", button.dataset.key.split(" ").every((key) => keys.has(key)));
  if (action === lastSent && !force) return;
  lastSent = action;
  if (action !== game.idle) {
    closeFutures();
    if (replaying) note("You are playing now.");
    else if ($("note").classList.contains("bad")) note(standing);
    replaying = false;
  }
  send({do: "keys", action, stamp: action === game.idle ? 0 : performance.now()});
}

function rewindBy(frames) {
  const to = Math.max($("scrub").min, Math.min(total - 1, place + frames));
  if (to !== place) rewindTo(to);
}

function rewindTo(to) {
  hideUnsure();
  halt();
  place = to;
  send({do: "rewind", to});
}

function typing(target) {
  return target.closest?.("input:not([type=range]):not([type=radio]), textarea, select, [contenteditable=true]");
}

function ofBrowser(event) {
  return Object.entries(MODIFIERS).some(([held, name]) => event[held] && !game.key(`${name}Left`) && !game.key(`${name}Right`));
}

function onKey(event, down) {
  if (typing(event.target) || ofBrowser(event)) return;
  const key = game.key(event.code);
  if (key) {
    event.preventDefault();
    event.stopPropagation();
    sources.keyboard[down ? "add" : "delete"](key);
    if (!event.repeat) sendKeys();
  } else if (down) {
    const act = {KeyZ: () => rewindBy(-1), KeyX: () => rewindBy(1), Period: oneFrame,
      KeyP: () => event.repeat || setMode(mode === "auto" ? "hold" : "auto"), KeyF: () => event.repeat || whatIf(),
      KeyU: () => event.repeat || setUnsure(!unsure), Escape: closeFutures}[event.code];
    if (act) { event.preventDefault(); act(); }
  }
}

function releaseAll() {
  for (const source of Object.values(sources)) source.clear();
  sendKeys();
}

function directions({axes: [x = 0, y = 0], buttons}) {
  const on = (i) => buttons[i]?.pressed, ways = [];
  if (x < -.4 || on(14)) ways.push("left");
  if (x > .4 || on(15)) ways.push("right");
  if (y < -.5 || on(12)) ways.push("up");
  if (y > .5 || on(13)) ways.push("down");
  return ways;
}

function pollGamepad() {
  const pads = navigator.getGamepads?.() ?? [];
  const now = new Set([...pads].filter(Boolean).flatMap((pad) => game.gamepad(pad)));
  if (now.size || sources.gamepad.size) { sources.gamepad = now; sendKeys(); }
  requestAnimationFrame(pollGamepad);
}

function wirePads() {
  for (const button of document.querySelectorAll(".pad [data-key]")) {
    button.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      button.setPointerCapture?.(event.pointerId);
      sources.touch.set(event.pointerId, button.dataset.key.split(" "));
      sendKeys();
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"])
      button.addEventListener(end, (event) => { sources.touch.delete(event.pointerId); sendKeys(); });
    button.addEventListener("contextmenu", (event) => event.preventDefault());
  }
}

/* ---- functions for Gradio's controls ---- */

function setPace(chosen) {
  Object.assign(pace, chosen);
  send({do: "settings", ...chosen});
}

function unplayable(steps) {
  return Boolean(card) && steps > 0 && !card.includes(steps);
}

function markSteps() {
  let marked = false;
  for (const label of document.querySelectorAll("#play-steps label")) {
    const off = unplayable(Number(label.textContent));
    label.toggleAttribute("data-unplayable", off);
    label.title = off ? "Not playable by the model's card" : "";
    marked ||= off;
  }
  document.querySelector("#play-steps")?.toggleAttribute("data-marked", marked);
}

function setSteps(chosen) {
  const steps = chosen === "auto" ? 0 : Number(chosen);
  setPace({steps});
  if (!card) return;
  note(unplayable(steps) ? `The model's card does not list ${steps} DDIM step${steps === 1 ? "" : "s"} as playable.` : standing);
}

function setMode(value) {
  mode = value;
  showMode();
  send({do: "settings", auto: mode === "auto", step_mode: mode === "step"});
}

function showMode() {
  for (const button of document.querySelectorAll("#modes button"))
    button.setAttribute("aria-checked", button.dataset.mode === mode);
}

function halt() {  // the server has stopped already
  if (mode === "auto") mode = "hold";
  showMode();
}

function oneFrame() {
  closeFutures();
  send({do: "wait"});
}

function whatIf() {
  releaseAll();
  halt();
  send({do: "what_if", frames: 8});
}

function showRecording() {
  $("live").hidden = !recording;
  const button = document.querySelector("#play-record");
  if (button) button.textContent = recording ? "■ Stop" : "● Record";
}

function setCode(code) {
  const area = document.querySelector("#play-code textarea");
  if (!area) return;
  area.value = code;
  area.dispatchEvent(new Event("input", {bubbles: true}));
}

function pickPicture() {
  const input = document.createElement("input");
  input.type = "file";
  input.accept = "image/*";
  input.onchange = () => sendPicture(input.files[0]);
  input.click();
}

async function sendPicture(file) {
  if (!file) return;
  if (file.size > 4 << 20) { note(`That file has ${(file.size / 1e6).toFixed(1)} MB; at most 4 MB are accepted.`, true); return; }
  replaying = false;
  socket.send(await file.arrayBuffer());
}

function start(clip, prompt) {
  replaying = false;
  send({do: "start", clip, prompt});
  focusStage();
}

window.play = {
  start: (clip, prompt) => start(clip ?? 0, prompt),
  startRandom: (prompt) => start(null, prompt),
  pickPicture,
  sendPicture,
  setFps: (fps) => setPace({fps}),
  setSteps,
  record: () => send({do: "record", on: !recording}),
  clear: () => send({do: "clear"}),
  saveVideo: () => send({do: "save", kind: "mp4"}),
  saveNumbers: () => send({do: "save", kind: "npz"}),
  share: () => new Promise((resolve) => {
    waitingForCode = (code) => { waitingForCode = null; resolve(code); };
    send({do: "share"});
  }),
  replay: (code) => {
    replaying = true;
    halt();
    note("Replaying the session; press a key to take over.");
    send({do: "replay", code});
    focusStage();
  },
};

function focusStage() {
  $("screen").focus({preventScroll: true});
}

/* ---- start, once Gradio has inserted the stage ---- */

function begin() {
  addEventListener("keydown", (event) => onKey(event, true), true);
  addEventListener("keyup", (event) => onKey(event, false), true);
  addEventListener("blur", releaseAll);
  document.addEventListener("visibilitychange", () => document.hidden && releaseAll());
  wirePads();
  for (const button of document.querySelectorAll("#modes button"))
    button.onclick = () => { setMode(button.dataset.mode); focusStage(); };
  $("wait").onclick = oneFrame;
  $("whatif").onclick = whatIf;
  $("futures-close").onclick = closeFutures;
  $("back").onclick = () => rewindBy(-1);
  $("forth").onclick = () => rewindBy(1);
  $("scrub").oninput = () => rewindTo(Number($("scrub").value));
  $("cover-button").onclick = connect;
  setInterval(readOut, 250);
  requestAnimationFrame(pollGamepad);
  connect();
}

const waiting = setInterval(() => {
  if ($("screen") && document.querySelector("#play-record")) { clearInterval(waiting); begin(); }
}, 50);
