/** Small plots of the last minute, one value a second, drawn on a canvas in the page's own colours. */

const SECONDS = 60;

/** `kind`: "line", "bars", or "stack" (a value is then an array, drawn one upon the other). */
export class Plot {
  #values = [];

  constructor(canvas, kind, least = 1) {
    Object.assign(this, { canvas, kind, least });
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** The newest second's value; null leaves a gap. */
  push(value) {
    this.#values.push(value);
    if (this.#values.length > SECONDS) this.#values.shift();
    this.draw();
  }

  clear() {
    this.#values = [];
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    const scale = devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const totals = this.#values.map((value) => (Array.isArray(value) ? value.reduce((a, b) => a + b, 0) : (value ?? 0)));
    const top = Math.max(this.least, ...totals) * 1.1;
    const x = (index) => width - (this.#values.length - 1 - index) * (width / (SECONDS - 1));
    const y = (value) => height - 1 - (value / top) * (height - 3);
    const colours = ["--plot-1", "--plot-2", "--plot-3", "--plot-4", "--plot-5"].map((name) => getComputedStyle(canvas).getPropertyValue(name));
    pen.fillStyle = getComputedStyle(canvas).getPropertyValue("--line");
    pen.fillRect(0, height - 1, width, 1);
    const draw = { line, bars, stack }[this.kind];
    draw(pen, this.#values, { x, y, height, slot: width / SECONDS, colours });
  }
}

function line(pen, values, { x, y, height, colours }) {
  for (const run of runs(values)) {
    pen.beginPath();
    for (const index of run) pen.lineTo(x(index), y(values[index]));
    pen.strokeStyle = colours[0];
    pen.lineWidth = 1.75;
    pen.lineJoin = "round";
    pen.stroke();
    pen.lineTo(x(run.at(-1)), height);
    pen.lineTo(x(run[0]), height);
    pen.globalAlpha = 0.14;
    pen.fillStyle = colours[0];
    pen.fill();
    pen.globalAlpha = 1;
  }
}

function bars(pen, values, { x, y, height, slot, colours }) {
  pen.fillStyle = colours[0];
  values.forEach((value, index) => {
    if (value) pen.fillRect(x(index) - slot * 0.8, y(value), Math.max(1.5, slot * 0.7), height - y(value));
  });
}

function stack(pen, values, { x, y, height, slot, colours }) {
  values.forEach((parts, index) => {
    let base = 0;
    parts?.forEach((part, n) => {
      pen.fillStyle = colours[n % colours.length];
      pen.fillRect(x(index) - slot, y(base + part), slot + 0.5, y(base) - y(base + part));
      base += part;
    });
  });
}

/** Indices of neighbouring values that are there. */
function runs(values) {
  const found = [];
  values.forEach((value, index) => {
    if (value === null || value === undefined) return;
    if (found.at(-1)?.at(-1) === index - 1) found.at(-1).push(index);
    else found.push([index]);
  });
  return found;
}
