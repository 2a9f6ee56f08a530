// Scores over time on a canvas: a dot a frame where there is room, else each pixel's range.

const PAD = { left: 62, right: 12, top: 12, bottom: 26 };

// line: the API's timeline; onpick(i): a frame was chosen.
export function makeChart(canvas, onpick) {
  let line = null, chosen = -1, proposed = null, at = [];
  // light-dark() is only resolved where a color is used, so each is tried on.
  const color = (name) => {
    canvas.style.color = `var(${name})`;
    return getComputedStyle(canvas).color;
  };
  const box = () => ({ width: canvas.clientWidth - PAD.left - PAD.right, height: canvas.clientHeight - PAD.top - PAD.bottom });

  function scales() {
    const [from, to] = [line.captured_at_ms[0], line.captured_at_ms.at(-1)];
    const values = line.score.concat(proposed ?? line.threshold.at(-1));
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b)), room = 0.06 * (high - low || 1);
    const { width, height } = box();
    return {
      low: low - room, high: high + room, from, to,
      x: (ms) => PAD.left + (width * (ms - from)) / (to - from || 1),
      y: (value) => PAD.top + height * (1 - (value - low + room) / (high - low + 2 * room)),
    };
  }

  function draw() {
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "14px system-ui, sans-serif";
    if (!line?.id.length || !canvas.clientWidth) return;
    const to = scales();
    const { width, height } = box();
    axes(pen, to, width, height);
    at = line.captured_at_ms.map(to.x);
    if (at.length > 2 * width) columns(pen, to); else dots(pen, to);
    thresholds(pen, to, width);
    if (chosen >= 0) cursor(pen, to, height);
  }

  function axes(pen, to, width, height) {
    pen.strokeStyle = color("--line");
    pen.fillStyle = color("--soft");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const value = to.low + share * (to.high - to.low), y = to.y(value);
      pen.beginPath(); pen.moveTo(PAD.left, y); pen.lineTo(PAD.left + width, y); pen.stroke();
      pen.fillText(value.toPrecision(3), PAD.left - 8, y);
    }
    pen.textBaseline = "top";
    for (const share of [0, 0.5, 1]) {
      pen.textAlign = ["left", "center", "right"][2 * share];
      const text = new Date(to.from + share * (to.to - to.from)).toLocaleTimeString([], { hour12: false });
      pen.fillText(text, PAD.left + share * width, PAD.top + height + 8);
    }
  }

  const over = (i) => line.score[i] > (proposed ?? line.threshold[i]);

  function dots(pen, to) {
    for (const above of [false, true]) {
      pen.fillStyle = color(above ? "--alert" : "--calm");
      for (let i = 0; i < at.length; i++) {
        if (over(i) !== above) continue;
        pen.beginPath(); pen.arc(at[i], to.y(line.score[i]), above ? 3.5 : 2, 0, 7); pen.fill();
      }
    }
  }

  function columns(pen, to) {
    for (const above of [false, true]) {
      const ranges = new Map();
      for (let i = 0; i < at.length; i++) {
        if (over(i) !== above) continue;
        const x = Math.round(at[i]), range = ranges.get(x), score = line.score[i];
        if (!range) ranges.set(x, [score, score]);
        else { range[0] = Math.min(range[0], score); range[1] = Math.max(range[1], score); }
      }
      pen.fillStyle = color(above ? "--alert" : "--calm");
      for (const [x, [low, high]] of ranges) pen.fillRect(x, to.y(high) - 1, 1.5, to.y(low) - to.y(high) + 2);
    }
  }

  function thresholds(pen, to, width) {
    pen.strokeStyle = color("--text");
    pen.lineWidth = 1.5;
    pen.beginPath();
    line.threshold.forEach((value, i) => {
      if (i) pen.lineTo(at[i], to.y(line.threshold[i - 1]));
      pen.lineTo(at[i], to.y(value));
    });
    pen.stroke();
    if (proposed === null) return;
    pen.strokeStyle = color("--focus");
    pen.setLineDash([7, 5]);
    pen.beginPath(); pen.moveTo(PAD.left, to.y(proposed)); pen.lineTo(PAD.left + width, to.y(proposed)); pen.stroke();
    pen.setLineDash([]);
  }

  function cursor(pen, to, height) {
    pen.strokeStyle = color("--focus");
    pen.lineWidth = 2;
    pen.beginPath(); pen.moveTo(at[chosen], PAD.top); pen.lineTo(at[chosen], PAD.top + height); pen.stroke();
    pen.beginPath(); pen.arc(at[chosen], to.y(line.score[chosen]), 6, 0, 7); pen.stroke();
  }

  canvas.addEventListener("click", (event) => {
    if (!line?.id.length) return;
    const x = event.clientX - canvas.getBoundingClientRect().left;
    let best = 0;
    at.forEach((each, i) => { if (Math.abs(each - x) < Math.abs(at[best] - x)) best = i; });
    onpick(best);
  });
  const watcher = new ResizeObserver(draw);
  watcher.observe(canvas);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", draw);
  return {
    show(next) { line = next; draw(); },
    choose(i) { chosen = i; draw(); },
    propose(value) { proposed = value; draw(); },
    close() { watcher.disconnect(); scheme.removeEventListener("change", draw); },
  };
}
