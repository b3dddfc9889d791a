/* Points at the nearest step of every curve; without it each point still has its title. */
for (const chart of document.querySelectorAll("svg.chart")) {
  const said = chart.closest("figure").querySelector("output");
  const curves = [...chart.querySelectorAll("g")].map((curve) => [...curve.querySelectorAll("circle")]);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const width = chart.viewBox.baseVal.width, height = chart.viewBox.baseVal.height;
  line.setAttribute("class", "cross");
  line.setAttribute("y1", 0);
  line.setAttribute("y2", height);
  const at = (circle) => Number(circle.getAttribute("cx"));
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    const near = curves.map((circles) => circles.reduce((a, b) => Math.abs(at(a) - x) < Math.abs(at(b) - x) ? a : b));
    const nearest = near.reduce((a, b) => Math.abs(at(a) - x) <= Math.abs(at(b) - x) ? a : b);
    line.setAttribute("x1", at(nearest));
    line.setAttribute("x2", at(nearest));
    chart.append(line);
    said.textContent = near.map((circle) => circle.textContent).join(" · ");
  });
  chart.addEventListener("pointerleave", () => { line.remove(); said.textContent = ""; });
}
