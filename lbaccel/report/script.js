"use strict";
// The charts are drawn already: this switches axes, shows values, and gives CSV and lines to copy.
(() => {
  const root = document.documentElement;
  addEventListener("error", (event) => { root.dataset.error = String(event.message); });
  const charts = JSON.parse(document.getElementById("curves").textContent);
  const UNITS = 1000, PAD = 0.04, TICKS = 7, COLORS = 8, LINE = 14, MOST_LABELS = 9, FLIPS = 700, MARK_ROWS = 4;
  const units = (share) => Math.round(share * UNITS);
  const percent = (share) => Math.round(share * 1000) / 10;

  // ---- scales.py, once more
  const trimmed = (v) => Math.abs(v) < 1e5 ? String(parseFloat(v.toPrecision(5))) : v.toFixed(0);
  function short(v) {
    const size = Math.abs(v);
    if (size >= 1e6) return trimmed(v / 1e6) + "M";
    if (size >= 1e4) return trimmed(v / 1e3) + "k";
    if (size === 0) return "0";
    if (size < 1e-3) {
      const [mantissa, power] = v.toExponential(1).split("e");
      return mantissa.replace(/\.0$/, "") + "e" + Number(power);
    }
    return trimmed(v);
  }
  function place(scale, v) {
    if (scale.kind === "linear") return (v - scale.low) / (scale.high - scale.low);
    if (v <= 0) return NaN;
    const low = Math.log10(scale.low), high = Math.log10(scale.high);
    return (Math.log10(v) - low) / (high - low);
  }
  function scaleOf(values, kind, most) {
    let low = Infinity, high = -Infinity;
    for (const v of values) {
      if (!Number.isFinite(v) || (kind !== "linear" && v <= 0)) continue;
      if (v < low) low = v;
      if (v > high) high = v;
    }
    if (low > high) return kind === "linear" ? { kind, low: 0, high: 1 } : { kind, low: 1, high: 10 };
    if (kind === "linear") {
      const pad = PAD * (high - low) || Math.abs(low) / 10 || 1;
      let top = high + pad;
      if (most !== null && high <= most) top = Math.min(top, most + 0.1 * pad);
      return { kind, low: low - pad, high: top };
    }
    const factor = high > low ? (high / low) ** PAD : 2;
    return { kind, low: low / factor, high: high * factor };
  }
  function linearTicks(low, high, wanted) {
    const raw = (high - low) / wanted, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= raw * (1 - 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) {
      found.push(Math.min(Math.max(i * step, low), high));
    }
    return found;
  }
  function logTicks(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const stride = Math.max(1, Math.ceil((last - first) / TICKS)), found = [];
    for (let k = first; k <= last; k += stride) {
      for (const m of last - first <= 3 ? [1, 2, 5] : [1]) {
        const v = m * 10 ** k;
        if (low <= v && v <= high) found.push(v);
      }
    }
    return found.length >= 3 ? found : linearTicks(low, high, 4);
  }
  const ticks = (s) => s.kind === "linear" ? linearTicks(s.low, s.high, 5) : logTicks(s.low, s.high);

  // ---- chart.py, once more
  function eachPoint(line, axis, see) {
    const xs = line.x[axis] || [];
    for (let i = 0; i < xs.length; i++) if (xs[i] !== null) see(xs[i], line.y[i], i);
  }
  function path(chart, line) {
    let text = "", pen = "M";
    eachPoint(line, chart.at, (a, b) => {
      const across = place(chart.x, a), up = b === null ? NaN : place(chart.y, b);
      if (Number.isNaN(across) || Number.isNaN(up)) { pen = "M"; return; }
      text += pen + units(across) + " " + units(1 - up);
      pen = "L";
    });
    return text;
  }
  function rescale(chart, logX, logY) {
    const xs = [], ys = [];
    for (const line of chart.lines) {
      eachPoint(line, chart.at, (a, b) => { if (b !== null) { xs.push(a); ys.push(b); } });
    }
    for (const mark of chart.marks) {
      if (mark.y !== null) ys.push(mark.y);
      else if (mark.x[chart.at] != null) xs.push(mark.x[chart.at]);
    }
    chart.x = scaleOf(xs, logX ? "log" : "linear", null);
    chart.y = scaleOf(ys, logY ? "log" : "linear", chart.most);
  }
  function word(kind, text, side, at, parent) {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    span.style[side] = at + "%";
    parent.append(span);
  }
  function labels(chart) {
    const found = [];
    for (const line of chart.lines) {
      let end = null;
      eachPoint(line, chart.at, (a, b) => {
        const up = b === null ? NaN : place(chart.y, b);
        if (!Number.isNaN(up) && !Number.isNaN(place(chart.x, a))) end = units(1 - up);
      });
      if (line.label && end !== null) found.push({ text: line.label, color: line.c % COLORS, y: end });
    }
    return found;
  }
  function apart(found, height) {
    if (found.length > MOST_LABELS) return [];
    const gap = LINE * UNITS / height;
    found.sort((a, b) => a.y - b.y);
    for (let i = 1; i < found.length; i++) found[i].y = Math.max(found[i].y, found[i - 1].y + gap);
    let end = UNITS;
    for (let i = found.length - 1; i >= 0; i--) { found[i].y = Math.min(found[i].y, end); end = found[i].y - gap; }
    return found;
  }
  function redraw(figure, chart) {
    const plot = figure.querySelector(".plot"), words = plot.querySelector(".words");
    const paths = plot.querySelectorAll(".l"), marks = plot.querySelectorAll(".mark");
    chart.lines.forEach((line, i) => paths[i].setAttribute("d", path(chart, line)));
    const ups = ticks(chart.y);
    plot.querySelector(".grid").setAttribute(
      "d", ups.map((v) => `M0 ${units(1 - place(chart.y, v))}H${UNITS}`).join(""));
    words.replaceChildren();
    for (const v of ticks(chart.x)) word("tick x", short(v), "left", percent(place(chart.x, v)), words);
    for (const v of ups) word("tick y", short(v), "top", percent(1 - place(chart.y, v)), words);
    for (const l of apart(labels(chart), plot.clientHeight)) {
      word("label t" + l.color, l.text, "top", percent(l.y / UNITS), words);
    }
    chart.marks.forEach((mark, i) => {
      let d = "";
      if (mark.y !== null) {
        const up = units(1 - place(chart.y, mark.y));
        d = `M0 ${up}H${UNITS}`;
        word("word side", mark.n, "top", up / 10, words);
      } else if (mark.x[chart.at] != null) {
        const across = units(place(chart.x, mark.x[chart.at]));
        d = `M${across} 0V${UNITS}`;
        const flip = across > FLIPS ? " flip" : "", color = mark.c === null ? "" : " t" + mark.c % COLORS;
        word("word up" + flip + color, mark.n, "left", across / 10, words);
        words.lastChild.style.setProperty("--row", i % MARK_ROWS);
      }
      marks[i].setAttribute("d", d);
    });
    figure.querySelector(".xlabel").textContent = chart.axes[chart.at];
  }

  // ---- the reader's hand
  function press(group, button) {
    for (const other of group.querySelectorAll("button[data-axis]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  }
  for (const box of document.querySelectorAll(".switchable")) {
    const bar = box.querySelector(".switch");
    const figures = [...box.querySelectorAll("figure.chart")];
    const logs = { x: false, y: false };
    let axis = null;
    const all = () => figures.forEach((figure) => {
      const chart = charts[figure.dataset.chart];
      if (axis !== null && axis in chart.axes) chart.at = axis;
      rescale(chart, logs.x, logs.y);
      redraw(figure, chart);
    });
    bar.hidden = false;
    bar.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      if (button.dataset.axis) { axis = button.dataset.axis; press(bar, button); }
      else {
        logs[button.dataset.log] = !logs[button.dataset.log];
        button.setAttribute("aria-pressed", String(logs[button.dataset.log]));
      }
      all();
    });
  }
  const full = (v) => v === null ? "-" : Math.abs(v) >= 1000 || Number.isInteger(v)
    ? v.toLocaleString("en-US", { maximumFractionDigits: 1 }) : String(parseFloat(v.toPrecision(5)));
  function nearest(chart, plot, left, top) {
    const width = plot.clientWidth, height = plot.clientHeight;
    let best = null;
    for (const line of chart.lines) {
      eachPoint(line, chart.at, (a, b, i) => {
        if (b === null) return;
        const x = place(chart.x, a) * width, y = (1 - place(chart.y, b)) * height;
        const far = (x - left) ** 2 + (y - top) ** 2;
        if (!Number.isNaN(far) && (best === null || far < best.far)) best = { far, line, i, a, b, x, y };
      });
    }
    return best;
  }
  for (const figure of document.querySelectorAll("figure.chart")) {
    const chart = charts[figure.dataset.chart], plot = figure.querySelector(".plot");
    const tip = document.createElement("div"), spot = document.createElement("div");
    tip.className = "tip"; spot.className = "spot"; tip.hidden = spot.hidden = true;
    plot.append(spot, tip);
    const hide = () => { tip.hidden = spot.hidden = true; };
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const found = nearest(chart, plot, event.clientX - box.left, event.clientY - box.top);
      if (!found || found.far > 60 ** 2) { hide(); return; }
      const { line, i, a, b } = found;
      const ends = line.lo && line.lo[i] !== null ? ` (${full(line.lo[i])} to ${full(line.hi[i])})` : "";
      tip.textContent = `${line.n}: ${full(b)}${ends} at ${full(a)} ${chart.axes[chart.at]}`;
      tip.hidden = spot.hidden = false;
      spot.style.left = found.x + "px"; spot.style.top = found.y + "px";
      const right = found.x > box.width / 2;
      tip.style.left = right ? "auto" : found.x + 10 + "px";
      tip.style.right = right ? box.width - found.x + 10 + "px" : "auto";
      tip.style.top = Math.max(0, found.y - 44) + "px";
    });
  }
  const quoted = (v) => {
    const text = v === null || v === undefined ? "" : String(v);
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  function csv(chart) {
    const axes = Object.keys(chart.axes), rows = [["line", ...axes, "value", "low", "high"]];
    for (const line of chart.lines) {
      line.y.forEach((y, i) => rows.push([line.n, ...axes.map((axis) => (line.x[axis] || [])[i]), y,
        line.lo ? line.lo[i] : null, line.hi ? line.hi[i] : null]));
    }
    return rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  }
  for (const button of document.querySelectorAll("button[data-csv]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([csv(charts[button.dataset.csv])], { type: "text/csv" }));
      link.download = button.dataset.csv + ".csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("pre");
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text);
        button.textContent = "Selected: copy it with your keys";
      }
    });
  }
  root.dataset.ready = "yes";
})();
