// Chooses the denoising steps of a frame, as `cwm_jax/play/inference/governor.py` does.

const PATIENCE = 1500;  // ms between changes, since they are visible
const FULL = .9, ROOMY = .85;  // shares of a frame's time: more is too slow, less leaves time for more steps
const SMOOTHING = .2;  // weight of the newest measurement
const OVERHEAD = 2;  // runs of a frame besides its steps: it is added to two caches

export class Governor {
  // choices: numbers of steps that the model's card lists, at most those that are best for it.
  constructor(choices, clock = () => performance.now()) {
    this.choices = [...choices].sort((a, b) => a - b);
    this.clock = clock;
    this.run = null;  // ms of one run of the network
    this.changed = clock();
    this.steps = this.choices[this.choices.length >> 1];
  }

  note(steps, ms) {
    const each = ms / (steps + OVERHEAD);
    this.run = this.run === null ? each : this.run + SMOOTHING * (each - this.run);
  }

  // The steps for the next frame at `fps` frames a second; `now`: without a delay.
  choose(fps, now = false) {
    if (this.run === null || (!now && this.clock() - this.changed < PATIENCE)) return this.steps;
    const best = this.#best(1000 / fps);
    if (best !== this.steps) { this.steps = best; this.changed = this.clock(); }
    return this.steps;
  }

  // Frames a second that so many steps reach.
  capacity(steps) {
    return this.run === null ? Infinity : 1000 / this.#ms(steps);
  }

  #best(due) {
    const within = (share) => this.choices.filter((n) => this.#ms(n) <= share * due);
    if (this.#ms(this.steps) > FULL * due) return within(FULL).at(-1) ?? this.choices[0];
    return within(ROOMY).filter((n) => n > this.steps).at(-1) ?? this.steps;
  }

  #ms(steps) {
    return this.run * (steps + OVERHEAD);
  }
}

// The choices of a model: those that its card lists, at most the number that is best for it.
export function automatic({steps, usual_steps: usual}) {
  const best = steps.filter((n) => n <= usual);
  return best.length ? best : [Math.min(...steps)];
}
