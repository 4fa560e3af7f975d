/** The handle between before and after: dragged by pointer, moved by arrow keys. */

const STEP = 2; // percent a key press

export class Split {
  constructor(stage, handle) {
    Object.assign(this, { stage, handle, percent: 50 });
    handle.addEventListener("pointerdown", (event) => this.#grab(event));
    handle.addEventListener("keydown", (event) => this.#key(event));
    handle.addEventListener("dblclick", () => this.move(50));
    this.move(50);
  }

  move(percent) {
    this.percent = Math.min(100, Math.max(0, percent));
    this.stage.style.setProperty("--split", `${this.percent}%`);
    this.handle.setAttribute("aria-valuenow", Math.round(this.percent));
    this.handle.setAttribute("aria-valuetext", `${Math.round(this.percent)} % before, ${Math.round(100 - this.percent)} % stylized`);
  }

  show(visible) {
    this.stage.classList.toggle("comparing", visible);
    this.handle.hidden = !visible;
  }

  #grab(event) {
    this.handle.setPointerCapture(event.pointerId);
    event.preventDefault();
    this.handle.focus();
    const follow = ({ clientX }) => {
      const { left, width } = this.stage.getBoundingClientRect();
      this.move(((clientX - left) / width) * 100);
    };
    this.handle.addEventListener("pointermove", follow);
    const release = () => this.handle.removeEventListener("pointermove", follow);
    for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
      this.handle.addEventListener(type, release, { once: true });
    }
  }

  #key(event) {
    const steps = { ArrowLeft: -STEP, ArrowDown: -STEP, ArrowRight: STEP, ArrowUp: STEP, PageDown: -10, PageUp: 10 };
    if (event.key === "Home") this.move(0);
    else if (event.key === "End") this.move(100);
    else if (event.key in steps) this.move(this.percent + steps[event.key]);
    else return;
    event.preventDefault();
  }
}
