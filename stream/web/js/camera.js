/** The browser's cameras and microphones, and in words why there is none. */

const IDEAL = { width: { ideal: 1280 }, height: { ideal: 720 }, frameRate: { ideal: 30, max: 60 } };

/** Why no camera: `message` and `hint` for the user. */
export class NoCamera extends Error {
  constructor(message, hint) {
    super(message);
    this.hint = hint;
  }
}

const WORDS = {
  NotAllowedError: [
    "The browser may not use the camera.",
    "Click the camera sign in or beside the address bar, allow the camera for this page, then press Start again. On a Mac or a phone the system's own privacy settings must allow the browser, too.",
  ],
  NotFoundError: ["No camera was found.", "Plug one in and press Start again, or add a video by its URL under Sources."],
  NotReadableError: [
    "The camera is there but cannot be opened.",
    "Another program or tab is probably using it: close that one, then press Start again.",
  ],
  AbortError: ["The camera stopped before its first picture.", "Unplug it, plug it in, and press Start again."],
};

export const HTTPS_COMMAND = "`livestyle serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --token WORD`";

/** What to do where the browser hides cameras because the page came without HTTPS. */
function httpsHelp() {
  const here = `On the machine that runs livestyle, open \`http://localhost:${location.port || "8787"}\`.`;
  return `${here} For other devices start it with a certificate: ${HTTPS_COMMAND}`;
}

function inWords(error) {
  const known = WORDS[error.name === "SecurityError" ? "NotAllowedError" : error.name];
  return new NoCamera(...(known ?? [`The camera could not be opened: ${error.message || error.name}.`, "Choose another camera."]));
}

/** A MediaStream of a camera, with the microphone where asked. Raises `NoCamera`. */
export async function openCamera({ deviceId = "", facing = "", microphone = false } = {}) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new NoCamera("This page came without HTTPS, so the browser shows it no camera.", httpsHelp());
  }
  const which = deviceId ? { deviceId: { exact: deviceId } } : facing ? { facingMode: facing } : {};
  const audio = microphone ? { echoCancellation: true, noiseSuppression: true } : false;
  try {
    return await navigator.mediaDevices.getUserMedia({ video: { ...IDEAL, ...which }, audio });
  } catch (error) {
    if (error.name !== "OverconstrainedError") throw inWords(error);
  }
  try {
    return await navigator.mediaDevices.getUserMedia({ video: true, audio }); // the chosen one went away
  } catch (error) {
    throw inWords(error);
  }
}

/** [{id, label}] of the cameras. Browsers tell names only once a camera was allowed. */
export async function cameras() {
  const devices = (await navigator.mediaDevices?.enumerateDevices?.().catch(() => [])) ?? [];
  const found = devices.filter(({ kind }) => kind === "videoinput");
  return found.map(({ deviceId, label }, n) => ({ id: deviceId, label: label || `Camera ${n + 1}` }));
}

/** Whether a camera shows its own user, who expects a mirror. */
export function isSelfie(track) {
  const { facingMode } = track.getSettings();
  return facingMode !== "environment";
}
