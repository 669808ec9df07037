// Values under the pointer, or under the arrow keys. The page is complete without this script.
(() => {
  "use strict";
  const charts = JSON.parse(document.getElementById("data").textContent);

  const element = (name, parent) => {
    const made = document.createElement("div");
    made.className = name;
    made.hidden = true;
    return parent.appendChild(made);
  };
  const nearest = (steps, step) => steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
  const text = (value) => (value === null ? "not finite" : String(Number(value.toPrecision(5))));

  for (const [key, { span, lines }] of Object.entries(charts)) {
    const plot = document.querySelector(`#${key} .plot`);
    const cursor = element("cursor", plot);
    const tip = element("tip", plot);
    tip.setAttribute("aria-live", "polite");
    const [first, last] = span;
    const width = Math.max(last - first, 1);
    const stops = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
    let index = stops.length - 1;

    const hide = () => { cursor.hidden = tip.hidden = true; };
    const show = (at) => {
      index = Math.min(Math.max(at, 0), stops.length - 1);
      const step = stops[index];
      const share = (step - first) / width;
      const rows = [`step ${step.toLocaleString("en")}`];
      for (const line of lines) {
        const i = nearest(line.steps, step);
        if (Math.abs(line.steps[i] - step) <= width / 100) rows.push(`${line.label} ${text(line.values[i])}`.trim());
      }
      tip.replaceChildren(...rows.flatMap((row, i) => (i ? [document.createElement("br"), row] : [row])));
      cursor.style.left = `${share * 100}%`;
      tip.style.left = share < 0.5 ? `calc(${share * 100}% + 0.5rem)` : "auto";
      tip.style.right = share < 0.5 ? "auto" : `calc(${100 - share * 100}% + 0.5rem)`;
      cursor.hidden = tip.hidden = false;
    };

    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      show(nearest(stops, first + ((event.clientX - box.left) / box.width) * width));
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const target = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: stops.length - 1 }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      show(target);
    });
  }
})();
