// Show the samples of one kind that hold a text; without JavaScript all are shown.
const filters = document.querySelector(".filters");
const search = filters.querySelector("input");
const samples = [...document.querySelectorAll(".sample")];
const texts = new Map();
let chosen = {};
filters.hidden = false;

function show() {
  const wanted = search.value.trim().toLowerCase();
  for (const sample of samples) {
    if (wanted && !texts.has(sample)) texts.set(sample, sample.textContent.toLowerCase());
    const { change, source } = chosen;
    sample.hidden = (change && sample.dataset.change !== change) || (source && sample.dataset.source !== source)
      || (wanted && !texts.get(sample).includes(wanted));
  }
}

search.addEventListener("input", show);
filters.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  for (const other of filters.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
  chosen = button.dataset;
  show();
});
