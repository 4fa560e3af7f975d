/** Two things the DOM makes long. */

/** A new element with these properties. */
export function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

/** Put text into an element; what stands between backticks becomes code. */
export function prose(element, text) {
  if (element.dataset.prose === text) return element; // written before: whoever reads or copies it is not disturbed
  element.dataset.prose = text;
  element.replaceChildren(...text.split("`").map((part, n) => (n % 2 ? make("code", { textContent: part }) : part)));
  return element;
}
