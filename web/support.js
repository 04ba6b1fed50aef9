// The browser features that the page needs, with a message if one is missing.

// A module of one function with a 128-bit vector instruction: i32x4.splat, drop.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 17, 26, 11);

// A message about missing features, or "".
export function missing() {
  const lacks = [];
  if (typeof WebAssembly !== "object") lacks.push("WebAssembly");
  else if (!WebAssembly.validate(SIMD)) lacks.push("WebAssembly's vector instructions (SIMD)");
  if (typeof Worker !== "function") lacks.push("web workers");
  if (typeof DecompressionStream !== "function") lacks.push("DecompressionStream");
  if (!lacks.length) return "";
  return `This browser lacks ${lacks.join(" and ")}, which the model needs. `
    + "A current Chrome, Edge, Firefox (113 or newer) or Safari (16.4 or newer) has it. Above: a recorded rollout.";
}

// Threads that the model may use: they need cross-origin isolation. One core of three or more is left for
// the page; of two, both are used, which was measured to be quicker, and hardly slower beside another program.
export function usableThreads(wanted) {
  if (!globalThis.crossOriginIsolated || typeof SharedArrayBuffer !== "function") return 1;
  if (wanted) return wanted;
  const cores = navigator.hardwareConcurrency || 1;
  return Math.min(4, cores > 2 ? cores - 1 : cores);
}

// Registers the service worker. On the first visit the page is reloaded once, so that the worker
// can add the headers for cross-origin isolation. Resolves to true if it reloads.
export async function serveOffline(url) {
  if (!navigator.serviceWorker) return false;
  try {
    const registration = await navigator.serviceWorker.register(url);
    if (globalThis.crossOriginIsolated || navigator.serviceWorker.controller || sessionStorage.reloaded) return false;
    const worker = registration.active ?? registration.installing ?? registration.waiting;
    const ready = worker?.state === "activated" || await Promise.race([
      new Promise((resolve) => worker?.addEventListener("statechange", () => worker.state === "activated" && resolve(true))),
      new Promise((resolve) => setTimeout(resolve, 4000, false)),
    ]);
    if (!ready) return false;
    sessionStorage.reloaded = "1";
    location.reload();
    return true;
  } catch (error) {
    console.warn("no service worker:", error);  // private windows, or no https: the page works without it
    return false;
  }
}
