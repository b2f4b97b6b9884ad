// Says which tables are wider than the screen.
function markWideTables() {
  for (const box of document.querySelectorAll(".scroll")) {
    box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth + 1;
  }
}
addEventListener("resize", markWideTables);
markWideTables();

// Draws the figures in the page's colours, again when these change between light and dark.
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const source = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(source).text();
  document.head.append(script);

  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = matchMedia("(max-width: 600px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set([...document.querySelectorAll(".groups input:not(:checked)")].map((box) => +box.value)); // a reload keeps boxes

  function draw(id) {
    const place = document.getElementById(id);
    if (place.closest("[hidden]")) return;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const { data, layout, height } = figures[id];
    place.style.height = `${height}px`;
    const axis = (given) => ({
      gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true, fixedrange: narrow.matches, ...given,
      title: { ...given?.title, font: { size: 13 } },
    });
    const traces = data.filter((trace) => !hidden.has(trace.meta)).map((trace) => trace.type === "heatmap"
      ? { ...trace, colorscale: [[0, colour("--raised")], [1, colour("--full")]], showscale: !narrow.matches }
      : trace);
    Plotly.react(place, traces, {
      ...layout, height, showlegend: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--text"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 8, r: 8, t: 24, b: 8 },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), ...(layout.yaxis2 && { yaxis2: axis(layout.yaxis2) }),
      shapes: layout.shapes?.map((shape) => ({ layer: "below", ...shape, line: { color: colour("--quiet"), width: 1, ...shape.line } })),
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--text") }, align: "left" },
    }, { responsive: true, displayModeBar: false });
  }
  const drawAll = () => Object.keys(figures).forEach(draw);

  for (const box of document.querySelectorAll(".groups input")) {
    box.addEventListener("change", () => {
      box.checked ? hidden.delete(+box.value) : hidden.add(+box.value);
      drawAll();
    });
  }
  for (const choice of document.querySelectorAll("select")) {
    choice.addEventListener("change", () => [...choice.options].forEach((option) => {
      document.getElementById(option.value).parentElement.hidden = !option.selected;
      if (option.selected) draw(option.value);
    }));
  }
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  drawAll();
  document.documentElement.dataset.drawn = "";
})().catch((error) => {
  const note = document.createElement("p");
  note.className = "error";
  note.textContent = `The figures could not be drawn (${error}); the tables are complete.`;
  document.querySelector("h1").after(note);
  throw error;
});
