// Show the examples that hold a text and are of one source; without JavaScript all are shown.
const filters = document.querySelector(".filters");
const [search, source] = filters.querySelectorAll("input, select");
const samples = [...document.querySelectorAll(".sample")].map((element) => [element, element.textContent.toLowerCase()]);
filters.hidden = false;
filters.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  let shown = 0;
  for (const [element, text] of samples) {
    element.hidden = !text.includes(wanted) || (source.value !== "" && element.dataset.source !== source.value);
    shown += !element.hidden;
  }
  filters.querySelector("span").textContent = wanted || source.value ? `${shown} of ${samples.length}` : "";
  document.querySelector(".none").hidden = shown > 0;
});
