/** The one settings schema, as pydantic writes it, read for a form. */

const STEPS = 0.01; // of numbers up to 2; larger ones go by 0.1

/** The schema's sections → [{section, about, fields: [{key, label, about, type, …}]}], in its own order. */
export function fieldsOf({ schema, defaults }) {
  const resolved = (node) => (node.$ref ? schema.$defs[node.$ref.split("/").pop()] : node);
  return Object.entries(schema.properties).map(([section, node]) => {
    const { description = "", properties } = resolved(node.allOf?.[0] ?? node);
    const fields = Object.entries(properties).map(([name, raw]) => field(`${section}.${name}`, name, resolved(raw), defaults));
    return { section, about: description, fields };
  });
}

function field(key, name, raw, defaults) {
  const words = name.replace(/_ms$/, " (ms)").replaceAll("_", " ");
  const step = raw.type === "integer" ? 1 : raw.maximum <= 2 ? STEPS : 10 * STEPS;
  return {
    key,
    label: words[0].toUpperCase() + words.slice(1),
    about: raw.description ?? "",
    type: raw.enum ? "enum" : raw.type,
    options: raw.enum ?? [],
    least: raw.minimum ?? (raw.exclusiveMinimum === undefined ? undefined : raw.exclusiveMinimum + step),
    most: raw.maximum ?? (raw.exclusiveMaximum === undefined ? undefined : raw.exclusiveMaximum - step),
    step,
    length: raw.maxLength,
    value: defaults[key] ?? raw.default,
  };
}
