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

// Words that only the later of two answers has, marked when the answers come into view.
const LONGEST = 600;
const ALIKE = 0.5;

function words(element) {
  const found = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode())
    for (const match of node.data.matchAll(/\S+/g)) found.push({ node, start: match.index, text: match[0] });
  return found;
}

// The words of `after` outside the longest common subsequence; null for texts that are long or have little in common.
function onlyIn(after, before) {
  const [n, m] = [after.length, before.length];
  if (!n || !m || n > LONGEST || m > LONGEST) return null;
  const lengths = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      lengths[i][j] = after[i].text === before[j].text
        ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  if (lengths[0][0] < ALIKE * Math.max(n, m)) return null;
  const others = [];
  for (let i = 0, j = 0; i < n;) {
    if (j < m && after[i].text === before[j].text) { i++; j++; }
    else if (j < m && lengths[i][j + 1] >= lengths[i + 1][j]) j++;
    else others.push(after[i++]);
  }
  return others;
}

function markDifferences(sample) {
  const [base, tuned, ...others] = [...sample.querySelectorAll(".side")].map((side) => side.querySelector(".said"));
  const against = sample.querySelector(".pair").dataset.against === "first" ? base : tuned;
  const found = [[tuned, base], ...others.map((other) => [other, against])]
    .filter(([after, before]) => after && before)
    .flatMap(([after, before]) => onlyIn(words(after), words(before)) ?? []);
  // From the end, so that what is before in the same text stays where it is.
  for (const { node, start, text } of found.reverse()) {
    const rest = node.splitText(start);
    rest.splitText(text.length);
    const mark = document.createElement("ins");
    rest.replaceWith(mark);
    mark.append(rest);
  }
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    markDifferences(target);
  }
}, { rootMargin: "400px" });
for (const sample of samples) seen.observe(sample);
