/** The dialogs: sources, outputs, a phone, OBS, and the token. */

import { Refusal, blob, call, setToken, streamPath, token } from "./api.js";
import { HTTPS_COMMAND } from "./camera.js";
import { make, prose } from "./dom.js";

const $ = (id) => document.getElementById(id);
const OUTPUTS = {
  virtualcam: ["", "A camera that video calls and OBS can choose. The machine that runs livestyle needs a virtual camera driver; OBS brings one."],
  rtmp: ["rtmp://live.example.org/app/KEY", "Twitch, YouTube and others: their server's address with your stream key."],
  rtsp: ["rtsp://media.example.org:8554/name", "To a media server such as MediaMTX."],
  srt: ["srt://media.example.org:9000?mode=caller", "To a server or receiver that speaks SRT."],
  whip: ["whip+https://media.example.org/whip/name", "To another WHIP server."],
};

/** Run what a button asks for; a refusal's words go to `place`. Returns whether it went well. */
async function attempt(place, work) {
  place.hidden = true;
  try {
    await work();
    return true;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    prose(place, [error.message, error.hint].filter(Boolean).join(" — "));
    place.hidden = false;
    return false;
  }
}

export function wireDialogs() {
  for (const button of document.querySelectorAll("[data-opens]")) {
    button.addEventListener("click", () => {
      const dialog = $(button.dataset.opens);
      dialog.dispatchEvent(new Event("opening"));
      dialog.showModal();
    });
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
    dialog.querySelector(".close")?.addEventListener("click", () => dialog.close());
  }
  for (const button of document.querySelectorAll("[data-copies]")) {
    button.addEventListener("click", async () => {
      const field = $(button.dataset.copies);
      field.select();
      await navigator.clipboard?.writeText(field.value).catch(() => {});
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
}

/** Ask for the token; `renew()` runs once there is one. */
export function wireToken(renew) {
  const dialog = $("token-dialog");
  $("token-form").addEventListener("submit", () => {
    setToken($("token").value);
    renew();
  });
  return (words) => {
    $("token-words").textContent = words;
    if (!dialog.open) dialog.showModal();
  };
}

/** Add a video by its URL. `use(name)` shows the stream, `ended(name)` lets go of it; `suggested()` is a name for it, `params()` its settings. */
export function wireSources({ suggested, params, use, ended }) {
  const place = $("source-refusal");
  const form = $("source-form");
  const suggest = () => {
    $("source-name").value = suggested();
  };
  $("source-dialog").addEventListener("opening", suggest);
  for (const button of document.querySelectorAll("[data-source]")) {
    button.addEventListener("click", () => {
      $("source-url").value = button.dataset.source;
      form.requestSubmit();
    });
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const [stream, url] = [$("source-name").value.trim(), $("source-url").value.trim()];
    const added = await attempt(place, async () => {
      await call("POST", "/streams", { name: stream, source: url, params: params() }).catch((error) => {
        if (error.status !== 409) throw error;
        return call("PUT", streamPath(stream, "/source"), { url }); // it is there already
      });
    });
    if (!added) return;
    $("source-dialog").close();
    use(stream);
  });
  $("source-remove").addEventListener("click", async () => {
    const stream = $("source-name").value.trim();
    ended(stream);
    if (await attempt(place, () => call("DELETE", streamPath(stream, "/source")))) $("source-dialog").close();
  });
}

/** Where else the stylized stream goes. */
export function wireOutputs({ name }) {
  const [place, list, kind, url] = ["output-refusal", "output-list", "output-kind", "output-url"].map($);
  const describe = () => {
    const [example, about] = OUTPUTS[kind.value];
    Object.assign(url, { placeholder: example, value: "", required: Boolean(example) });
    $("output-url-row").hidden = !example;
    $("output-about").textContent = about;
  };
  const refresh = () =>
    attempt(place, async () => {
      const outputs = name() ? await call("GET", streamPath(name(), "/outputs")) : [];
      list.replaceChildren(...outputs.map(row));
      $("output-none").hidden = outputs.length > 0;
    });
  const row = ({ id, url: shown, state }) => {
    const item = make("li");
    const stop = make("button", { type: "button", className: "quiet", textContent: "Stop" });
    stop.setAttribute("aria-label", `stop ${shown}`);
    stop.addEventListener("click", async () => {
      if (await attempt(place, () => call("DELETE", streamPath(name(), `/outputs/${id}`)))) refresh();
    });
    item.append(make("code", { textContent: shown }), make("span", { className: "note", textContent: state }), stop);
    return item;
  };
  kind.addEventListener("change", describe);
  $("output-dialog").addEventListener("opening", () => {
    describe();
    refresh();
  });
  $("output-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const target = kind.value === "virtualcam" ? "virtualcam" : url.value.trim();
    const started = await attempt(place, async () => {
      if (!name()) throw new Refusal(0, "There is no stream yet.", "Press Start, or add a source, first.");
      await call("POST", streamPath(name(), "/outputs"), { url: target });
    });
    if (started) refresh();
  });
}

/** A code that a phone's camera reads. */
export function wirePhone({ name, info }) {
  $("phone-dialog").addEventListener("opening", async () => {
    const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
    const origin = local ? (info()?.urls?.find((url) => !/localhost|127\.0\.0\.1/.test(url)) ?? location.origin) : location.origin;
    const url = new URL(name() ? `/?stream=${encodeURIComponent(name())}` : "/", origin).href;
    $("phone-url").value = url;
    const hints = [];
    if (!url.startsWith("https:"))
      hints.push(`Phones let only HTTPS pages see their camera. To watch, this is enough; to use the camera, start with a certificate: ${HTTPS_COMMAND}.`);
    if (/localhost|127\.0\.0\.1/.test(url))
      hints.push("Now the server listens on this machine only; other devices reach it with `--host 0.0.0.0` and `--token`.");
    if (token()) hints.push("The phone will ask for the token: it is not in the code.");
    prose($("phone-hint"), hints.join(" "));
    $("phone-hint").hidden = !hints.length;
    await attempt($("phone-refusal"), async () => {
      const picture = await blob(`/api/v1/qr?text=${encodeURIComponent(url)}`);
      URL.revokeObjectURL($("phone-code").src);
      $("phone-code").src = URL.createObjectURL(picture);
    });
  });
}

/** What to enter in OBS. */
export function wireObs({ name }) {
  $("obs-dialog").addEventListener("opening", () => {
    const stream = encodeURIComponent(name() || "cam");
    const secret = token() ? `&token=${encodeURIComponent(token())}` : "";
    $("obs-view").value = `${location.origin}/view/${stream}?obs=1${secret}`;
    $("obs-whip").value = `${location.origin}/whip/${stream}`;
    $("obs-token").value = token();
  });
}
