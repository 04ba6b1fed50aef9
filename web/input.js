// Keys, buttons and gamepads as one set of held directions, and the action that they make.

const CODES = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down",
  KeyA: "left", KeyD: "right", KeyW: "up", KeyS: "down", Space: "up",
};
export const LABELS = {1: "← left", 2: "↖ jump left", 4: "· nothing", 5: "↑ jump", 7: "→ right", 8: "↗ jump right"};
export const IDLE = 4;

export class Input {
  // changed(action, held) is called when the held keys make another action; commands: by key code.
  constructor({pads, changed, commands}) {
    this.sources = {keyboard: new Set(), touch: new Map(), gamepad: new Set()};
    this.pads = [...pads];
    this.changed = changed;
    this.commands = commands;
    this.last = IDLE;
    addEventListener("keydown", (event) => this.#key(event, true), true);
    addEventListener("keyup", (event) => this.#key(event, false), true);
    addEventListener("blur", () => this.release());
    document.addEventListener("visibilitychange", () => document.hidden && this.release());
    this.pads.forEach((pad) => this.#wire(pad));
    const poll = () => { this.#pollGamepads(); requestAnimationFrame(poll); };
    poll();
  }

  release() {
    for (const source of Object.values(this.sources)) source.clear();
    this.#changed();
  }

  get held() {
    const {keyboard, touch, gamepad} = this.sources;
    return new Set([...keyboard, ...touch.values(), ...gamepad]);
  }

  #changed() {
    const keys = this.held;
    for (const pad of this.pads) pad.classList.toggle("held", keys.has(pad.dataset.key));
    // 0 … 8: left, none, right, each with down, none, up
    const x = keys.has("right") - keys.has("left"), y = keys.has("up") - keys.has("down");
    const action = (x + 1) * 3 + y + 1;
    if (action === this.last) return;
    this.last = action;
    this.changed(action);
  }

  #key(event, down) {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const way = CODES[event.code];
    if (way) {
      event.preventDefault();
      this.sources.keyboard[down ? "add" : "delete"](way);
      if (!event.repeat) this.#changed();
    } else if (down && this.commands[event.code]) {
      event.preventDefault();
      this.commands[event.code](event.repeat);
    }
  }

  #wire(pad) {
    pad.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      pad.setPointerCapture?.(event.pointerId);
      this.sources.touch.set(event.pointerId, pad.dataset.key);
      this.#changed();
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"])
      pad.addEventListener(end, (event) => { this.sources.touch.delete(event.pointerId); this.#changed(); });
    pad.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  #pollGamepads() {
    const pads = [...navigator.getGamepads?.() ?? []].filter(Boolean);
    const now = new Set(pads.flatMap(directions));
    if (!now.size && !this.sources.gamepad.size) return;
    this.sources.gamepad = now;
    this.#changed();
  }
}

function directions({axes: [x = 0, y = 0], buttons}) {
  const on = (i) => buttons[i]?.pressed, ways = [];
  if (x < -.4 || on(14)) ways.push("left");
  if (x > .4 || on(15)) ways.push("right");
  if (y < -.5 || on(12) || on(0)) ways.push("up");
  if (y > .5 || on(13)) ways.push("down");
  return ways;
}

function typing(target) {
  return target.closest?.("input:not([type=range]):not([type=radio]), textarea, select");
}
