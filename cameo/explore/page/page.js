"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const element = (id) => document.getElementById(id);
const ORANGE = [230, 159, 0], BLUE = "#0072b2", WHITE = "#ffffff", BLACK = "#000000";
const SIDE = 472; // pixels of a canvas, twice its size on the screen
const state = { sample: 0, layer: 0, readout: 0, level: facts.levels.length - 1, question: "looks", pictures: "views",
  view: facts.first.view, token: facts.first.token };
let bytes = null;
const images = new Map();

// ---- Data ----------------------------------------------------------------------------------------------------------

const keyOf = (model, level, layer, readout, sample, query, key) =>
  [model, level, layer, readout, sample, query, key].join("/");
const records = new Map(facts.maps.map((m) => [keyOf(m.model, m.level, m.layer, m.readout, m.sample, m.query, m.key), m.at]));

async function unpack() {
  const text = atob(element("maps").textContent.trim());
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  bytes = new Uint8Array(await new Response(stream).arrayBuffer());
}

const gridOf = (layer, view) => facts.layers[layer].grids[view];
const keptGrid = ([height, width]) => [Math.ceil(height / facts.step), Math.ceil(width / facts.step)];
const short = (at) => bytes[at] | (bytes[at + 1] << 8);

// Row of a map for a token of its query view: the most-attended token, its share, and the shares of all kept keys.
function rowOf(at, query, key, token) {
  const [, width] = gridOf(state.layer, query), [rows, columns] = keptGrid(gridOf(state.layer, query));
  const row = Math.floor(Math.floor(token / width) / facts.step) * columns + Math.floor((token % width) / facts.step);
  const count = rows * columns, [keyHeight, keyWidth] = gridOf(state.layer, key), keys = keyHeight * keyWidth;
  const best = short(at + 2 * row), peak = short(at + 2 * (count + row)) / 65535;
  const start = at + 4 * count;
  const share = (value) => peak * (value / 255) ** 2;
  if (facts.keys === null) {
    return { best, peak, at: (j) => share(bytes[start + row * keys + j]),
      each: (visit) => { for (let j = 0; j < keys; j++) visit(j, share(bytes[start + row * keys + j])); } };
  }
  const kept = Math.min(facts.keys, keys), values = start + 2 * count * kept;
  const each = (visit) => {
    for (let i = 0; i < kept; i++) visit(short(start + 2 * (row * kept + i)), share(bytes[values + row * kept + i]));
  };
  return { best, peak, each, at: (j) => { let found = 0; each((k, p) => { if (k === j) found = p; }); return found; } };
}

function mapAt(model, query, key) {
  return records.get(keyOf(model, state.level, state.layer, state.readout, state.sample, query, key));
}

function truthOf(query, key) {
  const of = facts.truth[state.layer][state.sample];
  return of[query + "/" + key] || null;
}

// Whole numbers of rows and columns from the found token to the match, the larger of the two.
function distance(found, match, width) {
  return Math.max(Math.abs(Math.floor(found / width) - Math.floor(match / width)), Math.abs((found % width) - (match % width)));
}

// Error of a token: in the first other view in which it has a match and of which there is a map.
function errorOf(model, view, token) {
  for (let key = 0; key < views().length; key++) {
    const truth = key === view ? null : truthOf(view, key), at = mapAt(model, view, key);
    if (!truth || at === undefined || truth[token] < 0) continue;
    return distance(rowOf(at, view, key, token).best, truth[token], gridOf(state.layer, key)[1]);
  }
  return null;
}

function* keptTokens(view) {
  const [height, width] = gridOf(state.layer, view);
  for (let r = 0; r < height; r += facts.step) for (let c = 0; c < width; c += facts.step) yield r * width + c;
}

function withinOne(model) {
  let hits = 0, matches = 0;
  for (let query = 0; query < views().length; query++) {
    for (let key = 0; key < views().length; key++) {
      const truth = key === query ? null : truthOf(query, key), at = mapAt(model, query, key);
      if (!truth || at === undefined) continue;
      for (const token of keptTokens(query)) {
        if (truth[token] < 0) continue;
        matches++;
        hits += distance(rowOf(at, query, key, token).best, truth[token], gridOf(state.layer, key)[1]) <= 1;
      }
    }
  }
  return { hits, matches };
}

const views = () => facts.samples[state.sample].views;
const classOf = (error) => facts.errors.findLast((c) => error >= c.from);

// ---- Drawing -------------------------------------------------------------------------------------------------------

function picture(model, view) {
  const of = facts.predictions[[model, state.level, state.sample, view].join("/")];
  return state.pictures === "predictions" && of ? of : views()[view].image;
}

async function load(source) {
  if (!images.has(source)) {
    const image = new Image();
    image.src = source;
    await image.decode();
    images.set(source, image);
  }
  return images.get(source);
}

function cell(canvas, view, token) {
  const [height, width] = gridOf(state.layer, view);
  return [(token % width) * canvas.width / width, Math.floor(token / width) * canvas.height / height,
    canvas.width / width, canvas.height / height];
}

function frame(context, [x, y, w, h], color, line, dash) {
  for (const [stroke, thickness] of [[BLACK, line + 4], [color, line]]) {
    context.strokeStyle = stroke;
    context.lineWidth = thickness;
    context.setLineDash(stroke === BLACK ? [] : dash || []);
    context.strokeRect(x, y, w, h);
  }
  context.setLineDash([]);
}

function ring(context, [x, y, w, h], color) {
  for (const [stroke, thickness] of [[BLACK, 9], [color, 5]]) {
    context.strokeStyle = stroke;
    context.lineWidth = thickness;
    context.beginPath();
    context.arc(x + w / 2, y + h / 2, Math.max(7, Math.min(w, h) * 0.3), 0, 2 * Math.PI);
    context.stroke();
  }
}

function shade(context, canvas, view, shares) {
  let most = 0;
  for (const share of shares.values()) most = Math.max(most, share);
  context.fillStyle = "rgba(20, 20, 20, 0.55)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const [token, share] of shares) {
    const alpha = most > 0 ? Math.sqrt(share / most) : 0;
    context.fillStyle = `rgba(${ORANGE}, ${0.9 * alpha})`;
    context.fillRect(...cell(canvas, view, token));
  }
}

async function draw(canvas, model, view) {
  const context = canvas.getContext("2d"), image = await load(picture(model, view));
  context.imageSmoothingEnabled = image.width >= 128;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (!facts.layers[state.layer].grids[view]) return;
  if (state.question === "errors") {
    for (const token of keptTokens(view)) {
      const error = errorOf(model, view, token), [x, y, w, h] = cell(canvas, view, token);
      context.fillStyle = error === null ? "rgba(255, 255, 255, 0.75)" : classOf(error).color + "e6";
      context.fillRect(x, y, w * facts.step, h * facts.step);
    }
  } else if (view !== state.view) {
    const shares = new Map();
    if (state.question === "looks") {
      const at = mapAt(model, state.view, view);
      if (at !== undefined) {
        const row = rowOf(at, state.view, view, state.token);
        row.each((token, share) => shares.set(token, share));
        shade(context, canvas, view, shares);
        frame(context, cell(canvas, view, row.best), WHITE, 4, [10, 6]);
      }
      const truth = truthOf(state.view, view);
      if (truth && truth[state.token] >= 0) ring(context, cell(canvas, view, truth[state.token]), "#56b4e9");
    } else {
      const at = mapAt(model, view, state.view);
      if (at !== undefined) {
        for (const token of keptTokens(view)) shares.set(token, rowOf(at, view, state.view, token).at(state.token));
        shade(context, canvas, view, shares);
      }
      const truth = truthOf(state.view, view);
      if (truth && truth[state.token] >= 0) ring(context, cell(canvas, view, truth[state.token]), "#56b4e9");
    }
  }
  if (view === state.view) frame(context, cell(canvas, view, state.token), WHITE, 5);
}

const place = (view, token) => {
  const [, width] = gridOf(state.layer, view);
  return `row ${Math.floor(token / width) + 1}, column ${token % width + 1}`;
};
const named = (view) => `view ${view + 1} (${views()[view].reference ? "reference" : "target"})`;

function told(model) {
  const parts = [];
  for (let key = 0; key < views().length; key++) {
    const at = key === state.view ? undefined : mapAt(model, state.view, key);
    if (at === undefined) continue;
    const row = rowOf(at, state.view, key, state.token), truth = truthOf(state.view, key);
    let text = `in ${named(key)} most at ${place(key, row.best)} (${(100 * row.peak).toFixed(1)} %)`;
    if (truth && truth[state.token] >= 0) {
      const off = distance(row.best, truth[state.token], gridOf(state.layer, key)[1]);
      text += off === 0 ? ", the true match" : `, ${off} token${off > 1 ? "s" : ""} from the true match`;
    } else text += ", no true match there";
    parts.push(text);
  }
  return parts.join("; ") || "no map, since its alignment head is not trained or the layer does not see this view";
}

let turn = 0;
async function render() {
  const mine = ++turn; // a later call draws anew, and this one stops
  element("legend").replaceChildren(...legend());
  const sections = element("models").children;
  for (let model = 0; model < facts.models.length; model++) {
    const { hits, matches } = withinOne(model);
    sections[model].querySelector("p").textContent = matches
      ? `${(100 * hits / matches).toFixed(1)} % of ${matches} matches of this scene found within one token` : "no match in this scene";
    const canvases = sections[model].querySelectorAll("canvas");
    for (let view = 0; view < canvases.length; view++) {
      canvases[view].setAttribute("aria-label", label(model, view));
      await draw(canvases[view], model, view);
      if (mine !== turn) return;
    }
  }
  const lines = [`Token at ${place(state.view, state.token)} of ${named(state.view)}:`,
    ...facts.models.map((name, model) => `${name}: ${told(model)}.`)];
  element("told").replaceChildren(...lines.map((text) => Object.assign(document.createElement("p"), { textContent: text })));
  history.replaceState(null, "", "#" + new URLSearchParams(state)); // reloading shows the same again
  document.body.dataset.ready = "yes";
}

function label(model, view) {
  const at = view === state.view ? `selected token at ${place(view, state.token)}` : "press an arrow key to select a token";
  return `${facts.models[model]}, ${named(view)}: ${at}`;
}

// ---- Controls ------------------------------------------------------------------------------------------------------

function legend() {
  const entry = (mark, text) => {
    const span = document.createElement("span");
    span.append(mark, text);
    return span;
  };
  const patch = (style, name = "patch") => {
    const mark = document.createElement("i");
    mark.className = name;
    mark.style.cssText = style;
    return mark;
  };
  if (state.question === "errors") {
    return [...facts.errors.map((c) => entry(patch(`background:${c.color}`), c.text)), entry(patch("background:#fff"), "no match")];
  }
  const mark = (paint) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 22, height: 22 });
    canvas.style.width = "22px";
    paint(canvas.getContext("2d"));
    return canvas;
  };
  const bar = patch(`background:linear-gradient(90deg, #262626, rgb(${ORANGE}))`, "bar");
  const entries = [entry(mark((c) => frame(c, [5, 5, 12, 12], WHITE, 3)), "the token you chose"),
    entry(bar, state.question === "looks" ? "little to most attention within a view" : "little to most attention to it within a view"),
    entry(mark((c) => ring(c, [1, 1, 20, 20], "#56b4e9")), "its true match")];
  if (state.question === "looks") entries.push(entry(mark((c) => frame(c, [5, 5, 12, 12], WHITE, 3, [4, 3])), "most-attended token"));
  return entries;
}

function choose(view, token) {
  const [, width] = gridOf(state.layer, view), { step } = facts;
  const row = Math.floor(token / width), column = token % width;
  Object.assign(state, { view, token: (row - (row % step)) * width + column - (column % step) });
  render();
}

function press(event, view) {
  const grid = gridOf(state.layer, view), moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!grid || !(event.key in moves)) return;
  event.preventDefault();
  const from = view === state.view ? state.token : 0, [down, right] = view === state.view ? moves[event.key] : [0, 0];
  const row = Math.floor(from / grid[1]) + down * facts.step, column = (from % grid[1]) + right * facts.step;
  if (row >= 0 && row < grid[0] && column >= 0 && column < grid[1]) choose(view, row * grid[1] + column);
}

function click(event, canvas, view) {
  const grid = gridOf(state.layer, view);
  if (!grid) return;
  const box = canvas.getBoundingClientRect();
  const part = (at, start, size, count) => Math.min(count - 1, Math.max(0, Math.floor((at - start) / size * count)));
  choose(view, part(event.clientY, box.top, box.height, grid[0]) * grid[1] + part(event.clientX, box.left, box.width, grid[1]));
}

// Another layer or scene has other views and grids: the chosen token stays where it is, as far as it exists there.
function settle() {
  const grids = facts.layers[state.layer].grids;
  if (!views()[state.view] || !grids[state.view]) state.view = views().findIndex((_, view) => grids[view]);
  const [height, width] = grids[state.view];
  if (!(state.token >= 0 && state.token < height * width)) state.token = Math.floor(height / 2) * width + Math.floor(width / 2);
}

function build() {
  const sections = facts.models.map((name, model) => {
    const section = document.createElement("section"), title = document.createElement("h2"), row = document.createElement("div");
    title.textContent = name;
    row.className = "views";
    row.append(...views().map((one, view) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: Math.round(SIDE * one.size[0] / one.size[1]) });
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "application");
      canvas.addEventListener("click", (event) => click(event, canvas, view));
      canvas.addEventListener("keydown", (event) => press(event, view));
      caption.textContent = named(view);
      figure.append(canvas, caption);
      return figure;
    }));
    section.append(title, document.createElement("p"), row);
    return section;
  });
  element("models").replaceChildren(...sections);
}

function options(id, texts) {
  const select = element(id);
  if (texts) select.replaceChildren(...texts.map((text, value) => new Option(text, value)));
  select.value = state[id];
  select.addEventListener("change", () => {
    state[id] = texts ? Number(select.value) : select.value;
    settle();
    if (id === "sample") build();
    render();
  });
}

function restore() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (!(name in state)) continue;
    const number = Number(value), limit = { sample: facts.samples, layer: facts.layers, readout: facts.readouts, level: facts.levels }[name];
    if (typeof state[name] === "string") {
      if ([...element(name).options].some((option) => option.value === value)) state[name] = value;
    } else if (Number.isInteger(number) && number >= 0 && (!limit || number < limit.length)) state[name] = number;
  }
}

async function start() {
  restore();
  settle();
  options("sample", facts.samples.map((sample) => sample.key));
  options("layer", facts.layers.map((layer) => layer.text));
  options("readout", facts.readouts);
  options("level", facts.levels.map((level) => level.toFixed(2)));
  options("question");
  options("pictures");
  element("about").replaceChildren(...facts.about.map((text) => Object.assign(document.createElement("p"), { textContent: text })));
  build();
  await unpack();
  await render();
}

start().catch((error) => {
  element("problem").hidden = false;
  element("problem").textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old for this page: it needs DecompressionStream (Chromium 80, Firefox 113, Safari 16.4 or newer)."
    : "The page could not be drawn: " + error;
});
