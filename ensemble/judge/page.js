"use strict";
// The explorer of a report. First functions from numbers to numbers, which tests call by themselves; then the parts of
// the page. All text reaches the page by textContent and attributes, never as HTML: names come from outside. (Formatted by
// prettier --print-width 120 --arrow-parens avoid, as page.css is.)

const LEAST = 2 ** -52;

// [bits, Base64 of little-endian whole numbers from 0] to a typed array.
function unpack([bits, text]) {
  const bytes = Uint8Array.from(atob(text), each => each.charCodeAt(0));
  return new { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array }[bits](bytes.buffer);
}

// The sample with its arrays unpacked: the candidates of frame s are first[s] up to first[s + 1], ascending by class,
// and `codes` holds one code of each member for each candidate.
function openSample(packed, members, classes) {
  const names = ["truth", "recording", "count", "candidates", "codes"];
  const sample = {
    ...packed,
    members,
    classes,
    ...Object.fromEntries(names.map(name => [name, unpack(packed[name])])),
  };
  sample.first = new Uint32Array(sample.frames + 1);
  for (let s = 0; s < sample.frames; s++) sample.first[s + 1] = sample.first[s] + sample.count[s];
  sample.sizes = new Float64Array(sample.recordings);
  for (const recording of sample.recording) sample.sizes[recording]++;
  const { zero, finest, perLog } = packed.coding;
  sample.probability = Float64Array.from({ length: 65536 }, (_, code) =>
    code < zero ? Math.exp(-finest * Math.expm1(code / perLog)) : 0,
  );
  return sample;
}

// Per frame whether the weighted mean is right, and its log-loss in nats; null where no member has a weight.
function pool(sample, weights) {
  const {
    frames,
    first,
    truth,
    candidates,
    codes,
    probability,
    members,
    classes,
    coding: { absent },
  } = sample;
  const used = [...weights.keys()].filter(m => weights[m] > 0);
  if (!used.length) return null;
  const total = used.reduce((sum, m) => sum + weights[m], 0);
  const right = new Float64Array(frames),
    loss = new Float64Array(frames);
  for (let s = 0; s < frames; s++) {
    let top = -1,
      most = -1,
      own = 0,
      present = total;
    if (sample.abstains)
      present = used.reduce((sum, m) => sum + (codes[first[s] * members + m] === absent ? 0 : weights[m]), 0);
    for (let place = first[s]; place < first[s + 1]; place++) {
      let sum = 0;
      for (const m of used) sum += weights[m] * probability[codes[place * members + m]];
      if (sum > most) [most, top] = [sum, candidates[place]];
      if (candidates[place] === truth[s]) own = sum;
    }
    if (present <= 0) [top, own, present] = [0, 1 / classes, 1]; // everybody abstains: equal probabilities
    right[s] = top === truth[s] ? 1 : 0;
    loss[s] = -Math.log(Math.max(own / present, LEAST));
  }
  return { right, loss };
}

// The mean over frames and its 95 % interval by Student's t over recordings, as ensemble.judge.t_interval.
function estimate(values, sample) {
  const sums = new Float64Array(sample.recordings),
    { frames, recordings, sizes, recording, t } = sample;
  for (let s = 0; s < frames; s++) sums[recording[s]] += values[s];
  const mean = sums.reduce((sum, each) => sum + each, 0) / frames;
  if (t === null) return { mean, low: null, high: null };
  const spread = sums.reduce((sum, each, g) => sum + (each - mean * sizes[g]) ** 2, 0);
  const half = (t * Math.sqrt((spread * recordings) / (recordings - 1))) / frames;
  return { mean, low: mean - half, high: mean + half };
}

// What a mix is worth on the sample, beside the baseline's { right, loss }.
function judge(sample, weights, baseline) {
  const found = pool(sample, weights);
  if (!found) return null;
  const minus = (a, b) => a.map((each, s) => each - b[s]);
  return {
    accuracy: estimate(found.right, sample),
    loss: estimate(found.loss, sample),
    gain: estimate(minus(found.right, baseline.right), sample),
    lossGain: estimate(minus(baseline.loss, found.loss), sample),
  };
}

// Places of the points that no other beats in both x and y, the less the better, by x.
function front(points) {
  const order = [...points.keys()].sort((a, b) => points[a].x - points[b].x || points[a].y - points[b].y);
  let least = Infinity;
  return order.filter(place => points[place].y < least && ((least = points[place].y), true));
}

// Round numbers from low to high, about as many as asked.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(each => each * power >= rough * 0.999),
    found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++)
    found.push(+(k * step).toPrecision(12));
  return found;
}

// Ticks at 1, 2 and 5 times powers of ten.
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const each of [1, 2, 5])
      if (each * 10 ** power >= low && each * 10 ** power <= high) found.push(each * 10 ** power);
  return found;
}

// The largest value that is shown: beyond it are only few values, and these so far that the others would be squeezed.
function farthest(values) {
  const sorted = [...values].sort((a, b) => a - b),
    limit = sorted[0] + 2.5 * (sorted[Math.floor(0.75 * (sorted.length - 1))] - sorted[0]);
  return Math.max(sorted[0], ...sorted.filter(each => each <= limit || sorted.length < 5));
}

// Stretches of equal values, as [start, end, value].
function runs(values) {
  const found = [];
  for (let start = 0, place = 1; place <= values.length; place++)
    if (place === values.length || values[place] !== values[start]) {
      found.push([start, place, values[start]]);
      start = place;
    }
  return found;
}

// Texts compared as people sort: numbers by value, before words, and what is empty last, whichever way.
function compareTexts(a, b, sign) {
  const number = text => (/^[+-]?[\d.,]+/.test(text) ? parseFloat(text.replaceAll(",", "")) : NaN);
  if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1);
  const [x, y] = [number(a), number(b)];
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
  return sign * (isNaN(x) ? a.localeCompare(b) : x - y);
}

// A side of each point where its name covers nothing placed before: { x, y, anchor }, or null where there is none.
function placeNames(points, names, width, height, size = 7.8) {
  const taken = points.map(({ x, y }) => [x - 5, y - 5, x + 5, y + 5]),
    placed = [];
  const free = box =>
    box[0] >= 0 &&
    box[2] <= width &&
    box[1] >= 0 &&
    box[3] <= height &&
    !taken.some(each => each[0] < box[2] && box[0] < each[2] && each[1] < box[3] && box[1] < each[3]);
  for (const [place, { x, y }] of points.entries()) {
    const long = names[place].length * size;
    const sides = [
      [x + 9, y + 4, "start"],
      [x - 9, y + 4, "end"],
      [x, y - 9, "middle"],
      [x, y + 18, "middle"],
    ];
    const box = ([left, base, anchor]) => {
      const start = left - { start: 0, end: long, middle: long / 2 }[anchor];
      return [start, base - 11, start + long, base + 3];
    };
    const side = sides.find(each => free(box(each)));
    if (side) taken.push(box(side));
    placed.push(side ? { x: side[0], y: side[1], anchor: side[2] } : null);
  }
  return placed;
}

const brief = (name, most = 22) => (name.length > most ? name.slice(0, most - 1) + "\u2026" : name);
const percent = (value, digits = 2) => (value === null ? "unknown" : (100 * value).toFixed(digits));
const signed = (value, digits) => (value < 0 ? "" : "+") + value.toFixed(digits);
const short = value =>
  value >= 1e6
    ? +(value / 1e6).toPrecision(3) + " M"
    : value >= 1e3
      ? +(value / 1e3).toPrecision(3) + " k"
      : String(+value.toPrecision(3));

// ---------------------------------------------------------------------------------------------- elements and figures

const SVG = "http://www.w3.org/2000/svg";

function make(created, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined) created.setAttribute(name, value);
  created.append(...children);
  return created;
}
const html = (name, attributes = {}, ...children) => make(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) => make(document.createElementNS(SVG, name), attributes, children);

function select(label, options, change) {
  const menu = html("select", {}, ...options.map(([value, text]) => html("option", { value }, text)));
  menu.addEventListener("change", () => change(menu.value));
  return [html("label", {}, label, menu), menu];
}

// A figure that is drawn as wide as its place, and again when that changes, and that can be pointed at: with the
// pointer, by touch, and with the arrow keys. `draw(width)` returns { picture, at(x, y), step(place, key), ring(place),
// text(place) }; what is pointed at is outlined and described below.
function figure(label, draw) {
  const plot = html("div", {
    class: "plot",
    tabindex: 0,
    role: "application",
    "aria-label": label + "; arrow keys move from point to point",
  });
  const readout = html("p", { class: "readout", "aria-live": "polite" });
  let view = null,
    place = null,
    ring = null,
    width = 0;
  const show = next => {
    if (next === null || next === undefined || (next === place && ring)) return;
    place = next;
    ring?.remove();
    ring = view.ring(place);
    if (ring) view.picture.append(ring);
    readout.replaceChildren(...view.text(place));
  };
  const redraw = () => {
    width = plot.clientWidth;
    if (!width) return;
    view = draw(width);
    plot.replaceChildren(view.picture);
    [ring, place] = [null, null];
    readout.replaceChildren(...(view.hint ?? ["Point at the figure, or move with the arrow keys."]));
  };
  const point = event => {
    const box = view.picture.getBoundingClientRect(),
      scale = width / (box.width || 1);
    show(view.at((event.clientX - box.left) * scale, (event.clientY - box.top) * scale));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("keydown", event => {
    if (!/^(Arrow|Home|End)/.test(event.key) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(view.step(place, event.key));
  });
  new ResizeObserver(() => {
    if (Math.abs(plot.clientWidth - width) > 1) redraw();
  }).observe(plot);
  return { elements: [plot, readout], redraw };
}

// The view of a figure of points { x, y, text }: the nearest is pointed at, and arrow keys follow their order.
function points(picture, items, hint) {
  const near = (x, y) => items.map(each => (each.x - x) ** 2 + (each.y - y) ** 2);
  return {
    picture,
    hint,
    at(x, y) {
      const far = near(x, y);
      return items.length ? far.indexOf(Math.min(...far)) : null;
    },
    step(place, key) {
      const last = items.length - 1,
        by = /Left|Up/.test(key) ? -1 : 1;
      return last < 0
        ? null
        : key === "Home"
          ? 0
          : key === "End"
            ? last
            : place === null
              ? 0
              : Math.min(last, Math.max(0, place + by));
    },
    ring: place => svg("circle", { class: "ring", cx: items[place].x, cy: items[place].y, r: 8 }),
    text: place => items[place].text,
  };
}

function canvas(width, height) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
}

// Two axes with ticks and titles around the box [left, top, right, bottom]; x and y map values to places.
function axes(picture, [left, top, right, bottom], x, y, xTicks, yTicks, xText, yText, xTitle, yTitle) {
  for (const value of yTicks)
    picture.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, yText(value)),
    );
  for (const value of xTicks)
    picture.append(
      svg("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: bottom }),
      svg("text", { x: x(value), y: bottom + 16, "text-anchor": "middle" }, xText(value)),
    );
  picture.append(
    svg("path", { class: "axis", d: `M${left},${top}V${bottom}H${right}` }),
    svg("text", { x: right, y: bottom + 34, "text-anchor": "end" }, xTitle),
    svg("text", { x: left - 44 < 0 ? 0 : left - 44, y: top - 14 }, yTitle),
  );
}

const diamond = (x, y, r, kind) =>
  svg("path", { class: kind, d: `M${x},${y - r}L${x + r},${y}L${x},${y + r}L${x - r},${y}Z` });
const bold = text => html("b", {}, text);

// -------------------------------------------------------------------------------------------------- parts of the page

// Rows sort by a click on a heading; they become cards where the table is wider than its place.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells],
    body = table.tBodies[0];
  const roles = {
    table: "table",
    thead: "rowgroup",
    tbody: "rowgroup",
    tr: "row",
    "thead th": "columnheader",
    "tbody th": "rowheader",
    td: "cell",
  };
  for (const [kind, role] of Object.entries(roles))
    // cards are no table to a browser
    for (const each of kind === "table" ? [table] : table.querySelectorAll(kind)) each.setAttribute("role", role);
  for (const row of body.rows)
    for (const [place, cell] of [...row.cells].entries()) if (place) cell.dataset.label = heads[place].textContent;
  for (const [column, head] of heads.entries()) {
    const button = html("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("n") || head.classList.contains("interval");
      const down = head.ariaSort ? head.ariaSort === "ascending" : numeric;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [row.cells[column].textContent.trim(), row]);
      rows.sort(([a], [b]) => compareTexts(a, b, down ? -1 : 1));
      body.append(...rows.map(([, row]) => row));
    });
  }
  const place = table.parentElement;
  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth === width) return;
    width = place.clientWidth;
    place.classList.remove("cards");
    place.classList.toggle("cards", place.scrollWidth > width + 1);
  }).observe(place);
}

function mixPart(data, changed) {
  const { members, baseline } = data,
    sample = openSample(data.sample, members.length, data.classes.length);
  const only = m => members.map((_, other) => (other === m ? 1 : 0));
  const base = pool(sample, only(members.indexOf(baseline)));
  const on = members.map(() => true),
    weight = members.map(() => 1);
  const mix = () => weight.map((each, m) => (on[m] ? each : 0));
  const names = ["accuracy", "loss", "gain", "gain-low", "gain-high", "loss-gain", "loss-gain-low", "loss-gain-high"];
  const out = Object.fromEntries(names.map(name => [name, html("output", { id: `mix-${name}` })]));
  const status = html("p", { "aria-live": "polite", class: "needs" });

  const rows = members.map((name, m) => {
    const box = html("input", { type: "checkbox", id: `on-${m}` });
    const slider = html("input", { type: "range", min: 0, max: 1, step: 0.01, "aria-label": `weight of ${name}` });
    const share = html("span", { class: "n" }),
      accuracy = html("span", { class: "n left-out" }),
      loss = html("span", { class: "n left-out" });
    const row = html("div", {}, html("label", {}, box, html("span", {}, name)), slider, share, loss, accuracy);
    box.addEventListener("change", () => {
      on[m] = box.checked;
      if (on[m] && !weight[m]) weight[m] = 1;
      update();
    });
    slider.addEventListener("input", () => {
      weight[m] = +slider.value;
      on[m] = weight[m] > 0;
      update();
    });
    return { box, slider, share, accuracy, loss, row };
  });

  function set(weights) {
    const most = Math.max(...weights);
    weights.forEach((each, m) => {
      on[m] = each > 0;
      weight[m] = each > 0 ? each / most : 1;
    });
    update();
  }

  function update() {
    const weights = mix(),
      total = weights.reduce((sum, each) => sum + each, 0),
      found = judge(sample, weights, base);
    const interval = ({ low, high }, scale, digits) =>
      [low, high].map(end => (end === null ? "unknown" : signed(scale * end, digits)));
    status.textContent = found ? "" : "No member is on.";
    const texts = !found
      ? []
      : [
          percent(found.accuracy.mean),
          found.loss.mean.toFixed(4),
          signed(100 * found.gain.mean, 2),
          ...interval(found.gain, 100, 2),
          signed(found.lossGain.mean, 4),
          ...interval(found.lossGain, 1, 4),
        ];
    names.forEach((name, place) => {
      out[name].value = found ? texts[place] : "-";
    });
    rows.forEach(({ box, slider, share, accuracy, loss, row }, m) => {
      box.checked = on[m];
      slider.value = weight[m];
      row.className = on[m] ? "" : "off";
      slider.setAttribute("aria-valuetext", `${percent(total ? weights[m] / total : 0, 1)} % of the mix`);
      share.textContent = percent(total ? weights[m] / total : 0, 1);
      const rest =
        found && on[m]
          ? judge(
              sample,
              weights.map((each, other) => (other === m ? 0 : each)),
              base,
            )
          : null;
      loss.textContent = rest ? signed(rest.loss.mean - found.loss.mean, 4) : "";
      accuracy.textContent = rest ? signed(100 * (rest.accuracy.mean - found.accuracy.mean), 2) : "";
    });
    changed(weights);
  }

  const act = (text, weights) => {
    const button = html("button", { type: "button", class: "act" }, text);
    button.addEventListener("click", () => set(weights));
    return button;
  };
  const presets = [
    act(
      "Equal weights",
      members.map(() => 1),
    ),
    act(`Only ${baseline}`, only(members.indexOf(baseline))),
    ...Object.entries(data.weights)
      .filter(([, weights]) => Math.max(...weights) > 0)
      .map(([rule, weights]) => act(`As ${rule}`, weights)),
  ];

  const single = judge(sample, only(members.indexOf(baseline)), base);
  const compared = [
    [baseline, members.indexOf(baseline), [single.accuracy.mean, single.loss.mean]],
    ...data.rules.map((name, place) => [name, members.length + place, data.sample.rules[place]]),
  ].map(([name, place, [accuracy, loss]]) =>
    html(
      "tr",
      {},
      html("th", { scope: "row" }, name),
      ...[
        percent(accuracy),
        percent(data.columns.accuracy[place]),
        loss.toFixed(4),
        data.columns.log_loss[place].toFixed(4),
      ].map(text => html("td", { class: "n" }, text)),
    ),
  );
  const heads = ["sample", "exact", "sample", "exact"].map(text => html("th", { scope: "col", class: "n" }, text));
  const groups = ["accuracy %", "log-loss"].map(text =>
    html("th", { scope: "colgroup", colspan: 2, class: "n" }, text),
  );
  const entry = (title, output, unit, low, high) =>
    html(
      "div",
      {},
      html("dt", {}, title),
      html("dd", {}, output, html("span", {}, ` ${unit}`), ...(low ? [html("small", {}, low, " to ", high)] : [])),
    );
  const all = data.frames.toLocaleString("en"),
    some = data.sample.frames.toLocaleString("en"),
    size =
      data.sample.frames === data.frames
        ? `The sample is all ${all} frames`
        : `A sample: ${some} of the ${all} frames, from ${data.sample.recordings.toLocaleString("en")} recordings in ` +
          "proportion to their length";
  const head = html(
    "div",
    { class: "head" },
    html("span", {}, "member"),
    html("span", {}, "weight"),
    html("span", { class: "n" }, "share %"),
    html("span", { class: "n left-out" }, "left out: nats"),
    html("span", { class: "n left-out" }, "points"),
  );
  update();
  return [
    html(
      "div",
      { class: "mix" },
      html(
        "div",
        {},
        html("div", { class: "bar" }, ...presets),
        html("div", { class: "members" }, head, ...rows.map(each => each.row)),
        html(
          "p",
          { class: "readout" },
          '"left out" is how log-loss and accuracy change without the member, the other weights being as they are.' +
            (data.membersLeftOut
              ? ` ${data.membersLeftOut} members that are less good by themselves are in the tables only.`
              : ""),
        ),
      ),
      html(
        "div",
        { class: "answer", role: "group", "aria-label": "Your mix on the sample" },
        html(
          "dl",
          {},
          entry("accuracy", out.accuracy, "%"),
          entry("log-loss", out.loss, "nats"),
          entry(`gain over ${baseline}`, out.gain, "points", out["gain-low"], out["gain-high"]),
          entry("log-loss reduced by", out["loss-gain"], "nats", out["loss-gain-low"], out["loss-gain-high"]),
        ),
        status,
        html(
          "table",
          {},
          html("caption", {}, "On the sample and exactly"),
          html("thead", {}, html("tr", {}, html("td", { rowspan: 2 }), ...groups), html("tr", {}, ...heads)),
          html("tbody", {}, ...compared),
        ),
        html("p", {}, `${size}; 95 % intervals by Student's t over recordings. "exact" is over all frames.`),
      ),
    ),
  ];
}

function sizePart(data) {
  const { columns, members, rules } = data,
    names = [...members, ...rules];
  const known = name => columns[name]?.some(each => each !== null && each > 0);
  const costs = [
    ["parameters", "parameters"],
    ["microseconds", "µs per frame"],
    ["milliseconds", "ms per frame"],
    ["bytes", "bytes"],
    ["memory", "bytes of memory"],
  ].filter(([name]) => known(name));
  if (!costs.length) return [html("p", { class: "needs" }, "The members' sizes are unknown.")];
  let [cost, title] = costs[0],
    loss = "log_loss";
  const losses = [
    ["log_loss", "log-loss, nats", 1],
    ["accuracy", "wrong frames, %", 100],
    ["brier", "Brier score", 1],
    ["calibration_error", "calibration error, %", 100],
  ].filter(([name]) => known(name));
  const drawn = figure("Loss against size", width => {
    const height = Math.min(430, Math.max(300, width * 0.72)),
      box = [48, 30, width - 10, height - 42],
      picture = canvas(width, height);
    const [, lossTitle, scale] = losses.find(([name]) => name === loss),
      at = [...names.keys()].filter(place => columns[cost][place] > 0 && columns[loss][place] !== null);
    const values = at.map(place => ({
      x: columns[cost][place],
      y: loss === "accuracy" ? 100 * (1 - columns[loss][place]) : scale * columns[loss][place],
    }));
    const xs = values.map(each => Math.log10(each.x)),
      ys = values.map(each => each.y);
    const pad = (low, high, least) => {
      const by = Math.max((high - low) * 0.08, least);
      return [low - by, high + by];
    };
    const [x0, x1] = pad(Math.min(...xs), Math.max(...xs), 0.1),
      [y0, y1] = pad(Math.min(...ys), farthest(ys), 0.002);
    const x = value => box[0] + ((Math.log10(value) - x0) / (x1 - x0)) * (box[2] - box[0]),
      y = value => Math.max(box[1], box[3] - ((value - y0) / (y1 - y0)) * (box[3] - box[1]));
    const yTicks = ticks(y0, y1, 5),
      digits = Math.max(0, ...yTicks.map(each => (String(each).split(".")[1] ?? "").length));
    const xTicks = logTicks(10 ** x0, 10 ** x1),
      spaced = xTicks.length > 6 ? xTicks.filter(each => /^1/.test(each.toExponential())) : xTicks;
    axes(picture, box, x, y, spaced, yTicks, short, value => value.toFixed(digits), title + ", logarithmic", lossTitle);
    const best = front(values),
      items = values.map((each, place) => ({ x: x(each.x), y: y(each.y) }));
    picture.append(
      svg("path", {
        class: "front",
        d: best.map((place, k) => `${k ? "H" : "M"}${items[place].x}${k ? "V" : ","}${items[place].y}`).join(""),
      }),
    );
    const shown = at.map((place, k) => brief(names[place]) + (values[k].y > y1 ? " \u2191" : "")),
      label = placeNames(items, shown, width, box[3]);
    items.forEach((item, place) => {
      const name = names[at[place]],
        rule = at[place] >= members.length,
        kind = rule ? "rule" : name === data.baseline ? "baseline" : "member";
      picture.append(
        rule ? diamond(item.x, item.y, 5.5, kind) : svg("circle", { class: kind, cx: item.x, cy: item.y, r: 4 }),
      );
      if (label[place])
        picture.append(
          svg(
            "text",
            {
              class: `halo ${rule ? "label-rule" : kind === "baseline" ? "label-baseline" : ""}`,
              x: label[place].x,
              y: label[place].y,
              "text-anchor": label[place].anchor,
            },
            shown[place],
          ),
        );
      item.text = [
        bold(name),
        ` ${rule ? "(rule)" : "(member)"}: ${lossTitle.split(",")[0]} ${values[place].y.toFixed(loss === "log_loss" || loss === "brier" ? 4 : 2)}, ` +
          `${values[place].x.toLocaleString("en")} ${title}${values[place].y > y1 ? "; above the figure" : ""}${best.includes(place) ? "; nothing smaller is as good" : ""}`,
      ];
    });
    const order = [...items.keys()].sort((a, b) => items[a].x - items[b].x || items[a].y - items[b].y);
    return points(
      picture,
      order.map(place => items[place]),
    );
  });
  const [costLabel] = select(
    "size ",
    costs.map(([name, text]) => [name, text]),
    value => {
      [cost, title] = costs.find(([name]) => name === value);
      drawn.redraw();
    },
  );
  const [lossLabel] = select(
    "loss ",
    losses.map(([name, text]) => [name, text]),
    value => {
      loss = value;
      drawn.redraw();
    },
  );
  return [html("div", { class: "bar" }, ...(costs.length > 1 ? [costLabel] : []), lossLabel), ...drawn.elements];
}

function differencePart(data) {
  const { members } = data,
    M = members.length,
    { x: xs, y: ys, share } = data.map,
    between = unpack(data.map.disagreement);
  if (M < 2) return { elements: [html("p", { class: "needs" }, "One member differs from nobody.")], mixed() {} };
  let weights = members.map(() => 1);
  const drawn = figure("Map of how members differ", width => {
    const height = Math.min(430, Math.max(300, width * 0.72)),
      picture = canvas(width, height);
    const span = list => [Math.min(...list), Math.max(...list)],
      [x0, x1] = span(xs),
      [y0, y1] = span(ys);
    const scale = Math.min((width - 130) / (x1 - x0 || 1), (height - 60) / (y1 - y0 || 1));
    const items = members.map((_, m) => ({
      x: width / 2 + (xs[m] - (x0 + x1) / 2) * scale,
      y: height / 2 - (ys[m] - (y0 + y1) / 2) * scale,
    }));
    const label = placeNames(
      items,
      members.map(name => brief(name)),
      width,
      height,
    );
    picture.append(svg("rect", { class: "band", width, height, rx: 6 }));
    items.forEach((item, m) => {
      const kind = (members[m] === data.baseline ? "baseline" : "member") + (weights[m] > 0 ? "" : " open");
      picture.append(svg("circle", { class: kind, cx: item.x, cy: item.y, r: 4.5 }));
      if (label[m])
        picture.append(
          svg(
            "text",
            {
              class: members[m] === data.baseline ? "label-baseline" : "name",
              x: label[m].x,
              y: label[m].y,
              "text-anchor": label[m].anchor,
            },
            brief(members[m]),
          ),
        );
      const others = [...members.keys()]
        .filter(other => other !== m)
        .sort((a, b) => between[m * M + a] - between[m * M + b]);
      const say = other => `${members[other]} (${percent(between[m * M + other] / 65535)} %)`;
      item.text = [
        bold(members[m]),
        M > 2
          ? `: differs least from ${say(others[0])}, most from ${say(others.at(-1))}`
          : `: differs from ${say(others[0])}`,
      ];
    });
    const order = [...items.keys()].sort((a, b) => items[a].x - items[b].x);
    return points(
      picture,
      order.map(place => items[place]),
      [`The two axes hold ${percent(share, 0)} % of all difference; members that are off in your mix are hollow.`],
    );
  });
  return {
    elements: drawn.elements,
    mixed(next) {
      const same = weights.every((each, m) => each > 0 === next[m] > 0);
      weights = next;
      if (!same) drawn.redraw();
    },
  };
}

function calibrationPart(data) {
  const names = [...data.members, ...data.rules],
    { frames, confidence, accuracy, after } = data.bins;
  let answer = data.best === null ? names.indexOf(data.baseline) : names.lastIndexOf(data.best);
  const note = html("p", { class: "readout" });
  const describe = () => {
    const found = after[answer];
    note.replaceChildren(
      ...(!found
        ? ["One recording: nothing to fit a temperature on."]
        : [
            html("span", { class: "key baseline" }, "before"),
            ": all frames, calibration error ",
            bold(percent(data.columns.calibration_error[answer]) + " %"),
            ". ",
            html("span", { class: "key rule" }, "after"),
            ` a temperature of ${found.temperature.toFixed(2)}, fitted on the other half of the recordings, ` +
              "on the sample: calibration error ",
            bold(`${percent(found.after[0])} %`),
            ` (there before: ${percent(found.before[0])} %), log-loss `,
            bold(found.after[1].toFixed(4)),
            ` (before: ${found.before[1].toFixed(4)}).`,
          ]),
    );
  };
  const drawn = figure("Reliability", width => {
    const size = Math.min(width - 62, 470),
      box = [48, 32, 48 + size, 32 + size],
      picture = canvas(width, size + 74);
    const x = value => box[0] + value * size,
      y = value => box[3] - value * size,
      fifths = [0, 0.2, 0.4, 0.6, 0.8, 1],
      items = [];
    const most = Math.max(...frames[answer]),
      bins = frames[answer].length;
    frames[answer].forEach((count, bin) =>
      picture.append(
        svg("rect", {
          class: "share",
          x: x(bin / bins) + 1,
          width: size / bins - 2,
          y: y((0.22 * count) / most),
          height: (0.22 * size * count) / most,
        }),
      ),
    );
    axes(
      picture,
      box,
      x,
      y,
      fifths,
      fifths,
      value => percent(value, 0),
      value => percent(value, 0),
      "confidence, %",
      "right, %",
    );
    picture.append(svg("path", { class: "diagonal", d: `M${x(0)},${y(0)}L${x(1)},${y(1)}` }));
    for (const [kind, found] of [
      ["before", { frames: frames[answer], confidence: confidence[answer], accuracy: accuracy[answer] }],
      ["after", after[answer]],
    ]) {
      if (!found) continue;
      const shown = [...found.frames.keys()].filter(bin => found.frames[bin] >= 10);
      picture.append(
        svg("path", {
          class: kind,
          d: shown.map((bin, k) => `${k ? "L" : "M"}${x(found.confidence[bin])},${y(found.accuracy[bin])}`).join(""),
        }),
      );
      for (const bin of shown) {
        const item = { x: x(found.confidence[bin]), y: y(found.accuracy[bin]) };
        picture.append(svg("circle", { class: `dot-${kind}`, cx: item.x, cy: item.y, r: 3.2 }));
        item.text = [
          bold(kind),
          `: ${found.frames[bin].toLocaleString("en")} frames, confidence ${percent(found.confidence[bin], 1)} %, right ${percent(found.accuracy[bin], 1)} %`,
        ];
        items.push(item);
      }
    }
    return points(picture, items, [
      "Grey: how many frames have this confidence. Bins of fewer than ten frames are left out.",
    ]);
  });
  const [label, menu] = select(
    "answers of ",
    names.map((name, place) => [place, name]),
    value => {
      answer = +value;
      describe();
      drawn.redraw();
    },
  );
  menu.value = answer;
  describe();
  return [html("div", { class: "bar" }, label), ...drawn.elements, note];
}

function confusionPart(data) {
  const { shown, answers, frames } = data.confusion,
    tables = frames.map(unpack),
    C = shown.length,
    names = shown.map(place => data.classes[place]),
    labels = names.map(name => brief(name, 9));
  const totals = shown.map(place => data.byClass.frames[place]),
    cell = (table, i, j) => (totals[i] ? table[i * C + j] / totals[i] : 0);
  let which = String(tables.length - 1);
  const drawn = figure("Confusion matrix", width => {
    const margin = Math.min(70, 10 + 7 * Math.max(...labels.map(each => each.length))),
      step = Math.min((width - margin) / C, 40),
      size = step * C;
    const picture = canvas(width, size + margin),
      difference = which === "difference",
      each = Math.max(1, Math.ceil(11 / step));
    picture.append(svg("rect", { class: "band", x: margin, y: margin, width: size, height: size }));
    for (let i = 0; i < C; i++)
      for (let j = 0; j < C; j++) {
        const value = difference ? cell(tables[1], i, j) - cell(tables[0], i, j) : cell(tables[+which], i, j);
        if (Math.abs(value) < 0.002) continue;
        const better = difference && value > 0 === (i === j),
          kind = difference ? (better ? "hit" : "miss") : i === j ? "hit" : "miss";
        const strength = difference
          ? Math.min(1, Math.sqrt(Math.abs(value) * 10))
          : i === j
            ? value ** 2
            : Math.min(1, Math.sqrt(value * 2.5));
        picture.append(
          svg("rect", {
            class: kind,
            x: margin + j * step,
            y: margin + i * step,
            width: Math.max(step - 0.5, 0.5),
            height: Math.max(step - 0.5, 0.5),
            "fill-opacity": Math.max(0.06, strength).toFixed(3),
          }),
        );
      }
    for (let i = 0; i < C; i += each)
      picture.append(
        svg(
          "text",
          {
            x: margin - 4,
            y: margin + (i + 0.5) * step + 3.5,
            "text-anchor": "end",
            style: "font-size:" + Math.min(11, Math.max(8, step * each - 1)) + "px",
          },
          labels[i],
        ),
        svg(
          "text",
          {
            transform: `translate(${margin + (i + 0.5) * step + 3.5},${margin - 4}) rotate(-90)`,
            style: "font-size:" + Math.min(11, Math.max(8, step * each - 1)) + "px",
          },
          labels[i],
        ),
      );
    const say = (i, j) => {
      const parts = tables
        .map(
          (table, k) =>
            `${answers[k]} ${percent(cell(table, i, j))} % (${table[i * C + j].toLocaleString("en")} of ${totals[i].toLocaleString("en")} frames)`,
        )
        .reverse();
      return [
        bold(i === j ? `${names[i]} is recognised` : `${names[i]} is taken for ${names[j]}`),
        ": " + parts.join(", "),
      ];
    };
    const clamp = k => Math.min(C - 1, Math.max(0, k));
    const shades = difference ? "Blue: more right, or fewer mistakes; red: the reverse. " : "";
    return {
      picture,
      hint: [
        shades +
          (C < data.classes.length
            ? `The ${C} classes with the most mistakes. Point at a cell, or move with the arrow keys.`
            : "Point at a cell, or move with the arrow keys."),
      ],
      at: (x, y) =>
        x < margin || y < margin || x > margin + size || y > margin + size
          ? null
          : clamp(Math.floor((y - margin) / step)) * C + clamp(Math.floor((x - margin) / step)),
      step(place, key) {
        if (place === null) return 0;
        const [i, j] = [Math.floor(place / C), place % C],
          [down, over] = {
            ArrowUp: [-1, 0],
            ArrowDown: [1, 0],
            ArrowLeft: [0, -1],
            ArrowRight: [0, 1],
            Home: [0, -C],
            End: [0, C],
          }[key];
        return clamp(i + down) * C + clamp(j + over);
      },
      ring: place =>
        svg("rect", {
          class: "ring",
          x: margin + (place % C) * step - 1,
          y: margin + Math.floor(place / C) * step - 1,
          width: step + 1.5,
          height: step + 1.5,
        }),
      text: place => say(Math.floor(place / C), place % C),
    };
  });
  const options = answers.map((name, place) => [String(place), name]).reverse();
  if (tables.length > 1) options.push(["difference", `${answers[1]} minus ${answers[0]}`]);
  const [label] = select("answers of ", options, value => {
    which = value;
    drawn.redraw();
  });
  return [html("div", { class: "bar" }, label), ...drawn.elements];
}

function classesPart(data) {
  const names = [...data.members, ...data.rules],
    C = data.classes.length,
    right = unpack(data.byClass.right),
    { frames, oracle, shown } = data.byClass;
  const base = data.members.indexOf(data.baseline),
    best = data.best === null ? base : names.lastIndexOf(data.best);
  const share = (answer, place) => right[answer * C + place] / frames[place];
  const orders = {
    gain: ["the rule's gain", (a, b) => share(best, b) - share(base, b) - share(best, a) + share(base, a)],
    worst: ["fewest right", (a, b) => share(best, a) - share(best, b)],
    frames: ["most frames", (a, b) => frames[b] - frames[a]],
    name: ["name", (a, b) => data.classes[a].localeCompare(data.classes[b])],
  };
  let order = "worst";
  const drawn = figure("Accuracy by class", width => {
    const rows = [...shown].sort(orders[order][1]),
      wide = Math.max(...rows.map(place => brief(data.classes[place], 12).length), 1) * 7.4 + 12,
      step = 19;
    const left = Math.min(wide, width * 0.3),
      end = width > 700 ? width - 190 : width - 22,
      top = 26,
      picture = canvas(width, top + rows.length * step + 8);
    const lowest = Math.min(...rows.flatMap(place => names.map((_, answer) => share(answer, place)))),
      low = Math.min(0.9, Math.floor(lowest * 10) / 10);
    const x = value => left + ((value - low) / (1 - low)) * (end - left);
    for (const value of ticks(low, 1, width > 500 ? 8 : 4))
      picture.append(
        svg("line", { class: "grid", x1: x(value), x2: x(value), y1: top - 4, y2: top + rows.length * step }),
        svg("text", { x: x(value), y: 14, "text-anchor": "middle" }, percent(value, 0) + " %"),
      );
    if (end < width - 100) picture.append(svg("text", { x: end + 28, y: 14 }, "best single member"));
    const ranking = place => [...names.keys()].sort((a, b) => share(b, place) - share(a, place));
    rows.forEach((place, row) => {
      const y = top + (row + 0.5) * step,
        all = data.members.map((_, m) => share(m, place)),
        trust = ranking(place).find(answer => answer < data.members.length);
      picture.append(
        svg("text", { class: "name", x: left - 10, y: y + 4, "text-anchor": "end" }, brief(data.classes[place], 12)),
        svg("line", { class: "span", x1: x(Math.min(...all)), x2: x(Math.max(...all)), y1: y, y2: y }),
        svg("line", { class: "oracle", x1: x(oracle[place]), x2: x(oracle[place]), y1: y - 5, y2: y + 5 }),
        ...all.map(value => svg("circle", { class: "member", cx: x(value), cy: y, r: 2.4 })),
        svg("circle", { class: "baseline", cx: x(share(base, place)), cy: y, r: 4 }),
      );
      if (data.best !== null) picture.append(diamond(x(share(best, place)), y, 5, "rule"));
      if (end < width - 100)
        picture.append(
          svg(
            "text",
            { x: end + 28, y: y + 4 },
            `${brief(data.members[trust], 16)} ${percent(share(trust, place), 1)}`,
          ),
        );
    });
    const view = points(
      picture,
      rows.map((place, row) => ({ x: 0, y: top + (row + 0.5) * step, place })),
      ["Point at a row, or move with the arrow keys, for everybody's share."],
    );
    view.at = (_, y) => (rows.length ? Math.min(rows.length - 1, Math.max(0, Math.floor((y - top) / step))) : null);
    view.ring = row =>
      svg("rect", { class: "ring", x: 0.75, y: top + row * step, width: width - 1.5, height: step, rx: 3 });
    view.text = row => {
      const place = rows[row],
        list = ranking(place),
        said = list.length > 14 ? [...list.slice(0, 10), ...list.slice(-3)] : list;
      return [
        bold(`${data.classes[place]}, ${frames[place].toLocaleString("en")} frames`),
        `: some member ${percent(oracle[place], 1)} %; ` +
          said.map(answer => `${names[answer]} ${percent(share(answer, place), 1)}`).join(", ") +
          (said.length < list.length ? "; others between" : ""),
      ];
    };
    return view;
  });
  const [label, menu] = select(
    "order ",
    Object.entries(orders).map(([name, [text]]) => [name, text]),
    value => {
      order = value;
      drawn.redraw();
    },
  );
  menu.value = order;
  return [html("div", { class: "bar" }, label), drawn.elements[1], drawn.elements[0]];
}

function recordingsPart(data) {
  const { numbers, sizes } = data.whole,
    [truth, top, confidence] = ["truth", "top", "confidence"].map(name => unpack(data.whole[name]));
  if (!numbers.length)
    return [
      html(
        "p",
        { class: "needs" },
        "The frames belong to no recordings of several frames: there is no course of time to show.",
      ),
    ];
  const rules = data.whole.rules.map(place => data.rules[place]),
    names = [...rules, ...data.members],
    F = truth.length,
    C = data.classes.length,
    starts = sizes.map((_, k) => sizes.slice(0, k).reduce((sum, each) => sum + each, 0));
  const lead = data.best === null ? names.lastIndexOf(data.baseline) : rules.indexOf(data.best),
    text = value => (value === C ? "abstains" : data.classes[value]);
  const right = (answer, k) => {
    let sum = 0;
    for (let f = starts[k]; f < starts[k] + sizes[k]; f++) sum += top[answer * F + f] === truth[f] ? 1 : 0;
    return sum / sizes[k];
  };
  const order = [...numbers.keys()].sort((a, b) => right(lead, a) - right(lead, b)),
    rowHeight = 26,
    answers = [lead, ...names.keys()].filter((each, place, all) => all.indexOf(each) === place);
  let k = order[0],
    frame = 0,
    step = 6;
  const labels = html("ol", { "aria-hidden": "true" }),
    strip = html("div", {
      class: "strip",
      tabindex: 0,
      role: "application",
      "aria-label":
        "Recording, frame by frame; arrow keys move by a frame, Page Up and Page Down to the mistake before and after",
    });
  const readout = html("p", { class: "readout", "aria-live": "polite" }),
    cells = [],
    cursor = svg("line", { class: "cursor", y1: 0 });
  for (const name of ["true", ...answers.map(answer => names[answer])]) {
    const value = html("span");
    cells.push(value);
    labels.append(html("li", {}, html("span", { title: name }, name), value));
  }

  function point(next) {
    frame = Math.min(sizes[k] - 1, Math.max(0, next));
    const at = starts[k] + frame,
      x = (frame + 0.5) * step;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cells[0].textContent = text(truth[at]);
    answers.forEach((answer, row) => {
      cells[row + 1].textContent = `${text(top[answer * F + at])} ${(confidence[answer * F + at] / 255).toFixed(2)}`;
      cells[row + 1].className = top[answer * F + at] === truth[at] ? "" : "wrong";
    });
    const agree = data.members.filter((_, m) => top[(rules.length + m) * F + at] === truth[at]).length;
    readout.replaceChildren(
      bold(`Frame ${frame + 1} of ${sizes[k]}`),
      `: true ${text(truth[at])}; ${names[lead]} says ${text(top[lead * F + at])} with ${percent(confidence[lead * F + at] / 255, 0)} %; ${agree} of ${data.members.length} members are right`,
    );
    if (x < strip.scrollLeft || x > strip.scrollLeft + strip.clientWidth) strip.scrollLeft = x - strip.clientWidth / 2;
  }

  function draw() {
    step = Math.max(4, (strip.clientWidth - 1) / sizes[k]);
    const width = step * sizes[k],
      height = rowHeight * (answers.length + 1),
      picture = svg("svg", {
        viewBox: `0 0 ${width} ${height}`,
        width,
        height,
        preserveAspectRatio: "none",
        "aria-hidden": "true",
      });
    const own = [
      truth.subarray(starts[k], starts[k] + sizes[k]),
      ...answers.map(answer => top.subarray(answer * F + starts[k], answer * F + starts[k] + sizes[k])),
    ];
    own.forEach((values, row) => {
      const y = row * rowHeight,
        marked = Array.from(values, (value, f) => value * 2 + (value === own[0][f] ? 0 : 1));
      for (const [start, end, mark] of runs(marked)) {
        const kind = row === 0 ? "true" : mark % 2 ? "wrong" : "",
          name = text(mark >> 1),
          [x, wide] = [start * step, (end - start) * step];
        picture.append(
          svg("rect", { class: `segment ${kind}`, x, y, width: Math.max(wide - 1, 1), height: rowHeight - 4, rx: 2 }),
        );
        if (row) {
          const offset = answers[row - 1] * F + starts[k];
          let path = `M${x},${y + rowHeight - 4}`;
          for (let f = start; f < end; f++) {
            const up = y + (rowHeight - 4) * (1 - (0.3 * confidence[offset + f]) / 255);
            path += `L${f === start ? x : f * step},${up.toFixed(1)}L${f === end - 1 ? x + Math.max(wide - 1, 1) : (f + 1) * step},${up.toFixed(1)}`;
          }
          picture.append(svg("path", { class: `sure ${kind}`, d: path + `V${y + rowHeight - 4}Z` }));
        }
        if (wide > name.length * 6.6 + 5 && (row === 0 || mark % 2))
          picture.append(svg("text", { class: "segment-name", x: x + 3.5, y: y + 13 }, name));
      }
    });
    cursor.setAttribute("y2", height);
    picture.append(cursor);
    strip.replaceChildren(picture);
    point(frame);
  }

  function mistake(by) {
    const wrong = Array.from({ length: sizes[k] }, (_, f) => top[lead * F + starts[k] + f] !== truth[starts[k] + f]);
    const begins = runs(wrong)
      .filter(([, , value]) => value)
      .map(([begin]) => begin);
    const next = by > 0 ? begins.find(begin => begin > frame) : begins.findLast(begin => begin < frame);
    if (next !== undefined) point(next);
  }

  const pointer = event => point(Math.floor((event.clientX - strip.firstChild.getBoundingClientRect().left) / step));
  strip.addEventListener("pointermove", pointer);
  strip.addEventListener("pointerdown", pointer);
  strip.addEventListener("keydown", event => {
    const move = {
      ArrowLeft: () => point(frame - 1),
      ArrowRight: () => point(frame + 1),
      Home: () => point(0),
      End: () => point(sizes[k] - 1),
      PageUp: () => mistake(-1),
      PageDown: () => mistake(1),
    }[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move();
  });
  const [label, menu] = select(
    "recording ",
    order.map(each => [each, `${numbers[each]}: ${sizes[each]} frames, ${percent(right(lead, each), 1)} % right`]),
    value => {
      k = +value;
      frame = 0;
      strip.scrollLeft = 0;
      draw();
    },
  );
  menu.value = k;
  const go = (words, by) => {
    const button = html("button", { type: "button", class: "act" }, words);
    button.addEventListener("click", () => mistake(by));
    return button;
  };
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(strip.clientWidth - width) > 1) {
      width = strip.clientWidth;
      draw();
    }
  }).observe(strip);
  return [
    html("div", { class: "bar" }, label, go("Mistake before", -1), go("Next mistake", 1)),
    readout,
    html("div", { class: "strips" }, labels, strip),
  ];
}

function start() {
  document.documentElement.classList.add("script");
  document.querySelectorAll("table.sortable").forEach(sortable);
  addEventListener("beforeprint", () =>
    document.querySelectorAll("details").forEach(each => {
      each.open = true;
    }),
  );
  const source = document.getElementById("data");
  if (source) {
    const data = JSON.parse(source.textContent),
      put = (id, elements) => document.querySelector(`#${id} .live`).replaceChildren(...elements);
    const difference = differencePart(data);
    put("mix", mixPart(data, difference.mixed));
    put("size", sizePart(data));
    put("difference", difference.elements);
    put("calibration", calibrationPart(data));
    put("confusion", confusionPart(data));
    put("classes", classesPart(data));
    put("recordings", recordingsPart(data));
  }
  document.documentElement.dataset.ready = Math.round(performance.now());
}

if (typeof module !== "undefined")
  module.exports = {
    unpack,
    openSample,
    pool,
    estimate,
    judge,
    front,
    ticks,
    logTicks,
    farthest,
    runs,
    compareTexts,
    placeNames,
    short,
  };
if (typeof document !== "undefined") start();
