// Show the samples of one kind; without JavaScript all are shown.
const filters = document.querySelector(".filters");
filters.hidden = false;
filters.addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  for (const other of filters.children) other.setAttribute("aria-pressed", other === button);
  const { change, source } = button.dataset;
  for (const sample of document.querySelectorAll(".sample")) {
    sample.hidden = (change && sample.dataset.change !== change) || (source && sample.dataset.source !== source);
  }
});
