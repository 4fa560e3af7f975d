/** The bare page: a stream and nothing else; with ?obs=1 not even words, on a transparent ground; &sound=1 with its sound. */

import { call, takeToken } from "./api.js";
import { Player } from "./player.js";

const $ = (id) => document.getElementById(id);
const WORDS = {
  off: "",
  connecting: "connecting…",
  live: "",
  mjpeg: "WebRTC cannot get through: pictures over HTTP, with more delay",
  reconnecting: "reconnecting…",
};

takeToken();
const name = decodeURIComponent(location.pathname.split("/").pop());
const options = new URLSearchParams(location.search);
const bare = options.get("obs") === "1";
document.documentElement.classList.toggle("obs", bare);
document.title = `${name} – livestyle`;

const player = new Player($("picture"), $("still"));
player.addEventListener("state", ({ detail: { kind, message, hint } }) => {
  document.documentElement.dataset.state = kind;
  const told = kind === "refused" || kind === "reconnecting" ? [message, hint].filter(Boolean).join(" — ") : "";
  $("words").textContent = [WORDS[kind], told].filter(Boolean).join(" ");
});
$("sound").addEventListener("click", ({ target }) => {
  $("picture").muted = !$("picture").muted;
  target.setAttribute("aria-pressed", !$("picture").muted);
});
$("full").addEventListener("click", () => {
  if (document.fullscreenElement) document.exitFullscreen();
  else document.documentElement.requestFullscreen?.();
});
addEventListener("pagehide", () => player.peer?.close());
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());

if (options.get("sound") === "1") $("picture").muted = false; // OBS may play sound; a browser first wants a click

const info = await call("GET", "/info").catch(() => null);
player.start(name, { iceServers: info?.ice_servers });
