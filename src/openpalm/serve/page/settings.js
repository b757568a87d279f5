// The settings: how they are stored, and the dialog that changes them.

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");

// The browser may refuse storage, or it may be full; the page works without it.
export function recall(storage, name, otherwise) {
  try {
    return JSON.parse(window[storage].getItem(`openpalm.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(storage, name, value) {
  try {
    window[storage].setItem(`openpalm.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// Keys are the names of the form's fields, and the API's names if it has the setting. null: not set.
const DEFAULTS = {
  model: "", system: "", temperature: null, top_p: null, top_k: null, max_tokens: null, seed: null,
  show_tokens: false, store: false, theme: "auto",
};

export const settings = { ...DEFAULTS, ...recall("localStorage", "settings", {}) };

// Not among the settings: the key is stored for this tab only.
export const secret = { key: recall("sessionStorage", "key", "") };

let keyBefore = "";

// Calls `changed(name)` after each change, and `closed(keyChanged)` when the dialog closes.
export function onSettings(changed, closed) {
  form.addEventListener("input", ({ target }) => {
    if (!target.validity.valid) return; // the form marks the field; the last valid value is kept
    change(target.name, valueOf(target));
    changed(target.name);
  });
  document.getElementById("defaults").addEventListener("click", () => {
    for (const [name, value] of Object.entries({ ...DEFAULTS, model: settings.model })) {
      change(name, value);
      changed(name);
    }
    fill();
  });
  dialog.addEventListener("close", () => closed(secret.key !== keyBefore));
}

export function openSettings(field) {
  keyBefore = secret.key;
  fill();
  dialog.showModal();
  form.elements[field]?.focus();
}

// Shows the server's defaults in the empty fields.
export function showServer(sampling, sharing) {
  for (const name of ["temperature", "top_p", "top_k"]) {
    form.elements[name].placeholder = sampling?.[name] ?? "";
  }
  form.elements.store.closest("label").hidden = !sharing;
}

export function showModels(ids) {
  form.elements.model.replaceChildren(...ids.map((id) => new Option(id, id)));
  if (!ids.includes(settings.model)) settings.model = ids[0] ?? "";
  form.elements.model.value = settings.model;
}

function change(name, value) {
  if (name === "key") {
    secret.key = value.trim();
    remember("sessionStorage", "key", secret.key);
  } else {
    settings[name] = value;
    remember("localStorage", "settings", settings);
  }
  showTheme();
}

function showTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

function valueOf(field) {
  if (field.type === "checkbox") return field.checked;
  if (field.type === "number") return field.value === "" ? null : field.valueAsNumber;
  return field.value;
}

function fill() {
  for (const [name, value] of Object.entries({ ...settings, ...secret })) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = value;
    else field.value = value ?? "";
  }
}

dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // the backdrop
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  dialog.close();
});
showTheme();
