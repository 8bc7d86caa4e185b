"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // The figures come without colours of text, axes and grids: those of the theme are added.
  function themed(layout) {
    const result = structuredClone(layout);
    const ink = colour("--ink"), line = colour("--line");
    result.paper_bgcolor = result.plot_bgcolor = "rgba(0,0,0,0)";
    result.font = { ...result.font, color: ink, size: 11 };
    for (const key of Object.keys(result)) {
      if (/^[xy]axis/.test(key)) {
        result[key] = { gridcolor: line, linecolor: line, ...result[key] };
      }
    }
    for (const menu of result.updatemenus || []) {
      Object.assign(menu, { bgcolor: colour("--panel"), bordercolor: line, active: -1, showactive: false });
    }
    return result;
  }

  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  function draw(place) {
    const figure = data.figures[place.dataset.figure];
    Plotly.react(place, figure.data, themed(figure.layout), config).then(() => {
      if (place.dataset.figure === "map" && !place.dataset.hovers) {
        place.dataset.hovers = "yes";
        addHover(place);
      }
      place.dataset.drawn = "yes";
    });
  }

  // All text is set as text, never as HTML: it comes from the data.
  function paragraph(text, className) {
    const element = document.createElement("p");
    element.textContent = text;
    element.className = className;
    return element;
  }

  function addHover(place) {
    const box = document.getElementById("hover");
    place.on("plotly_hover", (event) => {
      const sample = data.samples[event.points[0].customdata];
      box.replaceChildren();
      for (const value of sample.values) {
        if (value.image) {
          const image = document.createElement("img");
          image.src = value.image;
          image.alt = value.modality;
          box.append(image);
        }
      }
      for (const value of sample.values) {
        if (value.text) {
          box.append(paragraph(`${value.modality}: ${value.text}`, ""));
        }
      }
      box.append(paragraph(sample.title, "key"), paragraph(sample.note, "note"));
      box.hidden = false;
      const { clientX, clientY } = event.event;
      box.style.left = `${Math.min(clientX + 16, window.innerWidth - box.offsetWidth - 8)}px`;
      box.style.top = `${Math.min(clientY + 16, window.innerHeight - box.offsetHeight - 8)}px`;
    });
    place.on("plotly_unhover", () => { box.hidden = true; });
  }

  // A page may have a hundred figures: each is drawn when it comes near the window.
  const places = [...document.querySelectorAll(".plot")];
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        observer.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "600px" });
  places.forEach((place) => observer.observe(place));
  dark.addEventListener("change", () => places.filter((place) => place.dataset.drawn).forEach(draw));
  window.addEventListener("beforeprint", () => places.filter((place) => !place.dataset.drawn).forEach(draw));
})();
