/** The page: one button, one picture, every setting. Here the parts are put together. */

import { Refusal, call, streamPath, takeToken } from "./api.js";
import { cameras, isSelfie, NoCamera } from "./camera.js";
import { wireDialogs, wireObs, wireOutputs, wirePhone, wireSources, wireToken } from "./dialogs.js";
import { pressed, toggle, wireFullscreen, wireTakes } from "./dock.js";
import { Events } from "./events.js";
import { Models } from "./models.js";
import { Numbers } from "./numbers.js";
import { Player } from "./player.js";
import { Publisher } from "./publisher.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { StyleCards, large } from "./styles.js";
import { Toasts } from "./toasts.js";
import { video } from "./whep.js";

const $ = (id) => document.getElementById(id);
const OWN = "cam"; // name of the stream that Start makes
const BOX = [512, 288];

takeToken();
const streams = new Map(); // name → newest status
const stage = new Stage();
const player = new Player($("after"), $("after-still"));
const publisher = new Publisher();
const numbers = new Numbers($("numbers"));
const toasts = new Toasts($("toasts"), $("notes"), $("notes-count"));
const cards = new StyleCards($("styles"), (name) => settings.set("style.prompt", name));
const settings = new Settings(
  { main: $("settings-main"), more: $("settings-more"), advanced: $("settings-advanced") },
  async (changes) => {
    if (selected) settings.show(await call("PATCH", streamPath(selected, "/params"), changes));
  },
  (key, value) => key === "style.prompt" && promptChanged(value),
);
const models = new Models($("model-field"), $("model"), async (model) => {
  try {
    const status = await call("PUT", streamPath(selected, "/model"), { model });
    streams.set(selected, status);
    settings.show(status.params);
  } catch (error) {
    complain(error);
  }
  describe();
});
const events = new Events();
const askToken = wireToken(begin);
let info = null;
let selected = ""; // the stream on the stage; "" is my camera, not started
let phase = "";

function promptChanged(prompt) {
  cards.show(prompt);
  if (!selected) stage.example(large(cards.pictureOf(prompt)));
}

function complain(error) {
  if (error instanceof Refusal && error.status === 401) askToken(error.message);
  else toasts.say(error.message, { hint: error.hint ?? "", kind: "bad" });
  if (!(error instanceof Refusal) && !(error instanceof NoCamera)) throw error;
}

// The streams

function show(name) {
  selected = name;
  phase = "";
  numbers.clear();
  stage.trouble();
  list();
  $("bare").href = `/view/${encodeURIComponent(name || OWN)}`;
  if (!name) {
    player.stop();
    stage.mirror(false);
    stage.example(large(cards.pictureOf(settings.values["style.prompt"] ?? "")));
    describe();
    return;
  }
  const own = publisher.running && publisher.name === name;
  stage.stream(name, own ? publisher.media : null);
  stage.mirror(own && isSelfie(publisher.media.getVideoTracks()[0]));
  $("mirror").setAttribute("aria-pressed", stage.mirrored);
  player.start(name, { iceServers: info?.ice_servers });
  const status = streams.get(name);
  if (status) settings.show(status.params);
  describe();
}

function list() {
  const chooser = $("stream");
  const names = [...new Set([...streams.keys(), ...(selected ? [selected] : [])])].sort();
  const mine = publisher.running ? publisher.name : "";
  const options = [["", mine ? `My camera (${mine})` : "My camera"], ...names.filter((n) => n !== mine).map((n) => [n, n])];
  if (JSON.stringify(options) !== chooser.dataset.options) {
    chooser.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    chooser.dataset.options = JSON.stringify(options);
  }
  chooser.value = selected === mine ? "" : selected;
}

events.addEventListener("status", ({ detail: status }) => {
  const fresh = !streams.has(status.name);
  streams.set(status.name, status);
  if (fresh) list();
  if (status.name !== selected) return;
  settings.show(status.params);
  stage.originals(["live", "stalled"].includes(status.phase));
  describe();
});
events.addEventListener("list", ({ detail: names }) => {
  for (const name of [...streams.keys()]) if (!names.includes(name)) streams.delete(name);
  list();
});
events.addEventListener("event", ({ detail }) => {
  if (detail.stream === selected && ["note", "error", "level", "sink"].includes(detail.kind) && detail.text) {
    toasts.say(detail.text, { hint: detail.data?.hint ?? "", kind: detail.kind === "error" ? "bad" : "note" });
  }
  if (detail.kind === "phase" && detail.data?.phase === "ended") {
    streams.delete(detail.stream);
    if (detail.stream === selected && !publisher.running) {
      toasts.say(`The stream ${selected} has ended.`);
      show("");
    } else list();
  }
});
$("stream").addEventListener("change", ({ target }) => show(target.value || (publisher.running ? publisher.name : "")));

// The state, in words

/** What is true now: a trouble of our own comes before the server's words. */
function describe() {
  const status = selected ? streams.get(selected) : null;
  const whip = publisher.running && publisher.name === selected ? publisher.peer?.state : "";
  const [now, words, progress] = state(status, whip);
  stage.words(now, words, progress);
  if (now !== phase) stage.announce(words.replace(/:.*$/, ""));
  phase = now;
  $("start").textContent = publisher.running ? "Stop" : "Start";
  $("start").classList.toggle("stop", publisher.running);
  if (status?.phase === "failed") stage.trouble(status.error?.message ?? status.error ?? status.words, status.error?.hint ?? "");
  const { model, engine, device, size } = status ?? {};
  models.show(model ?? "");
  if (model) $("machine").textContent = [model, engine, device, size?.join("×")].filter(Boolean).join(" · ");
}

function state(status, whip) {
  if (!selected) return ["idle", "An example: press Start to see yourself"];
  if (whip === "connecting") return ["loading", "connecting your camera"];
  if (whip === "waiting") return ["reconnecting", "reconnecting your camera"];
  if (player.kind === "refused") return ["failed", "refused"];
  if (status && status.phase !== "live") return [status.phase, status.words, status.progress ?? null];
  if (player.kind === "mjpeg") return ["slow", `${status?.words ?? "live"} (MJPEG)`];
  if (player.kind === "live") return ["live", status?.words ?? "live"];
  return [player.kind === "reconnecting" ? "reconnecting" : "loading", `${player.kind}…`];
}

player.addEventListener("state", ({ detail: { kind, message, hint } }) => {
  if (kind === "refused") {
    stage.trouble(message, hint);
    if (/token/.test(message)) askToken(message);
  } else if (kind === "live") stage.trouble();
  else if (kind === "mjpeg") toasts.say(message, { hint });
  else if (kind === "reconnecting" && message) stage.trouble(message, hint || "It is tried again by itself.");
  describe();
});
player.addEventListener("size", ({ detail: { width, height } }) => stage.aspect(width, height));

publisher.addEventListener("state", ({ detail: { state: now, error } }) => {
  if (now === "refused") {
    stop();
    stage.trouble(error.message, error.hint);
    if (error.status === 401) askToken(error.message);
  } else if (now === "waiting") stage.trouble(error.message, error.hint || "It is tried again by itself.");
  else if (now === "connected") stage.trouble();
  describe();
});
publisher.addEventListener("ended", () => {
  stop();
  stage.trouble("The camera went away.", "Plug it in again and press Start.");
});

// One button

const choice = () => ({ deviceId: $("camera").value, microphone: pressed("microphone") });

async function start() {
  $("start").disabled = true;
  stage.trouble();
  try {
    await publisher.open(choice());
    await fillCameras();
    const options = { params: settings.values, box: info?.limits?.box ?? BOX, iceServers: info?.ice_servers };
    const name = await publisher.start(wantedName(), streams, options);
    show(name);
  } catch (error) {
    publisher.stop();
    show("");
    if (error instanceof NoCamera) stage.trouble(error.message, error.hint);
    else complain(error);
  } finally {
    $("start").disabled = false;
  }
}

function stop() {
  const mine = publisher.name === selected;
  publisher.stop();
  if (mine) show("");
  else list();
  describe();
}

/** Another source comes, or none: a camera of ours would take its stream back. */
function letGo(name) {
  if (!publisher.running || publisher.name !== name) return;
  publisher.stop();
  if (selected === name) stage.stream(name, null);
}

/** A stream that was asked for by ?stream= and has no source is published to; else "cam". */
function wantedName() {
  const asked = new URLSearchParams(location.search).get("stream");
  return /^[\w-]{1,64}$/.test(asked ?? "") ? asked : OWN;
}

async function fillCameras() {
  const chosen = $("camera").value || publisher.media?.getVideoTracks()[0].getSettings().deviceId || "";
  const found = await cameras();
  const options = found.filter(({ id }) => id).map(({ id, label }) => new Option(label, id));
  $("camera").replaceChildren(...(options.length ? options : [new Option("Default camera", "")]));
  if (found.some(({ id }) => id === chosen)) $("camera").value = chosen;
}

async function changeCamera() {
  if (!publisher.running) return;
  try {
    const kept = await publisher.change(choice());
    if (!kept) {
      const options = { params: {}, box: BOX, iceServers: info?.ice_servers };
      await publisher.peer.close(); // or the new session would find the old one publishing
      await publisher.start(publisher.name, new Map([[publisher.name, {}]]), options);
    }
    if (selected === publisher.name) stage.stream(selected, publisher.media);
  } catch (error) {
    complain(error);
  }
}

$("start").addEventListener("click", () => (publisher.running ? stop() : start()));
$("camera").addEventListener("change", changeCamera);
navigator.mediaDevices?.addEventListener?.("devicechange", fillCameras);
addEventListener("pagehide", () => {
  publisher.peer?.close();
  player.peer?.close();
});
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());

// Once a second

async function tick() {
  if (!selected || document.hidden) return;
  const own = publisher.running && publisher.name === selected;
  const up = own ? await publisher.uplink.take(publisher.peer?.pc) : null;
  const inbound = player.kind === "live" ? await video(player.peer) : null;
  numbers.tick({ status: streams.get(selected), seen: player.downlink.take(), up, inbound });
}

// The start

async function begin() {
  try {
    const paths = ["/info", "/schema", "/styles", "/models"];
    const [facts, schema, styles, rows] = await Promise.all(paths.map((path) => call("GET", path)));
    info = facts;
    models.build(rows);
    cards.build(styles);
    settings.build(schema);
    stage.trouble();
    await call("GET", "/streams"); // the first that wants a token, where one is needed
  } catch (error) {
    if (error.status === 403) toasts.say(error.message, { hint: error.hint }); // one to publish with only
    else if (error.status === 401) askToken(error.message);
    else {
      stage.trouble(error.message, error.hint);
      setTimeout(begin, 3000);
      return;
    }
  }
  if (events.socket) events.renew();
  else events.start();
  const asked = new URLSearchParams(location.search).get("stream");
  if (asked && !publisher.running) {
    const status = await call("GET", streamPath(asked)).catch(() => null);
    if (status) streams.set(asked, status);
    show(status ? asked : "");
  }
}

toggle("microphone", changeCamera);
toggle("sound", (on) => ($("after").muted = !on));
toggle("mirror", (on) => stage.mirror(on));
toggle("compare", (on) => stage.compare(on));
wireFullscreen($("stage"), $("after"));
wireTakes({ name: () => selected, picture: () => player.picture, video: $("after"), toasts, complain });
wireDialogs();
wireSources({
  suggested: () => (selected && selected !== publisher.name ? selected : "film"),
  params: () => settings.values,
  use: (name) => {
    letGo(name);
    show(name);
  },
  ended: letGo,
});
wireOutputs({ name: () => selected });
wirePhone({ name: () => selected, info: () => info });
wireObs({ name: () => selected || (publisher.running ? publisher.name : OWN) });
$("notes-dialog").addEventListener("opening", () => toasts.read());
stage.example("");
describe();
fillCameras();
begin();
setInterval(tick, 1000);
