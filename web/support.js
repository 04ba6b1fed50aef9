// What the page needs of a browser, named where it is missing.

// A module of one function with a 128-bit vector instruction: i32x4.splat, drop.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 17, 26, 11);

// Words for the person, or "" where all is there.
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

// Threads that the model may use: they need a page that is isolated from others. One core is left to
// the page: threads wait for each other, and one that has to wait for a core delays all.
export function usableThreads(wanted) {
  if (!globalThis.crossOriginIsolated || typeof SharedArrayBuffer !== "function") return 1;
  if (wanted) return wanted;
  return Math.min(4, Math.max(1, (navigator.hardwareConcurrency || 1) - 1));
}

// Registers the service worker. On the first visit the page is loaded once more, so that the worker
// can give it the headers of an isolated page; never twice. Resolves to true where it is reloading.
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
    console.warn("no service worker:", error);  // private windows, or no https: it plays all the same
    return false;
  }
}
