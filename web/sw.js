// Serves the page without a network after the first visit, and gives it the headers of an isolated
// page, which threads need. The build fills in FILES: every file of this version.

const FILES = {files};
const CACHE = "cwm-web:" + registration.scope;
const ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"};
const absolute = (path) => new URL(path, registration.scope).href;
const known = new Set(FILES.map(absolute));
const index = absolute("./");

self.addEventListener("install", (event) => event.waitUntil(install()));
self.addEventListener("activate", (event) => event.waitUntil(activate()));
self.addEventListener("message", (event) => { if (event.data === "keep all") event.waitUntil(keepAll()); });

self.addEventListener("fetch", (event) => {
  const {request} = event, url = request.url.split("#")[0].split("?")[0];
  if (request.method !== "GET" || !url.startsWith(registration.scope)) return;
  if (request.mode === "navigate") event.respondWith(page(request));
  else if (known.has(url)) event.respondWith(file(request, url));
});

async function install() {
  const cache = await caches.open(CACHE);
  await cache.add(new Request(index, {cache: "reload"}));
  await self.skipWaiting();
}

// Files of earlier versions go; those that did not change have the same name and stay.
async function activate() {
  const cache = await caches.open(CACHE);
  for (const {url} of await cache.keys()) if (url !== index && !known.has(url)) await cache.delete(url);
  await self.clients.claim();
}

// The newest page where there is a network, else the one that is kept.
async function page(request) {
  const cache = await caches.open(CACHE);
  try {
    const answer = await fetch(request);
    if (answer.ok && request.url.split("#")[0].split("?")[0] === index) await cache.put(index, answer.clone());
    return isolated(answer);
  } catch (error) {
    const kept = await cache.match(index);
    if (!kept) throw error;
    return isolated(kept);
  }
}

async function file(request, url) {
  const cache = await caches.open(CACHE);
  if (request.cache !== "reload" && request.cache !== "no-store") {
    const kept = await cache.match(url);
    if (kept) return isolated(kept);
  }
  const answer = await fetch(request);
  if (answer.ok && answer.status === 200) await cache.put(url, answer.clone());
  return isolated(answer);
}

// Once the page plays: everything that it has not yet asked for.
async function keepAll() {
  const cache = await caches.open(CACHE);
  for (const url of known) if (!await cache.match(url)) await cache.add(url).catch(() => {});
  for (const client of await self.clients.matchAll()) client.postMessage("all kept");
}

function isolated(answer) {
  if (answer.type === "opaque" || answer.type === "opaqueredirect" || !answer.status) return answer;
  const headers = new Headers(answer.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  return new Response(answer.body, {status: answer.status, statusText: answer.statusText, headers});
}
