// The trace browser: a list of questions to search, filter and sort, and the traces of the selected question.
// Its data is the JSON in #data (browser.py). All text is inserted as text nodes, never as markup.
"use strict";
const questions = JSON.parse(document.getElementById("data").textContent);
const byId = new Map(questions.map((question) => [question.id, question]));
const [search, filter, sort, list, detail, count] =
  ["search", "filter", "sort", "list", "detail", "count"].map((id) => document.getElementById(id));

// index.html#question=ID opens the page at that question.
const linked = new URLSearchParams(location.hash.slice(1)).get("question");
let chosen = linked;

const LOW_ESS = 2;
const FILTERS = {
  all: () => true,
  none: (question) => question.num_correct === 0,
  low: (question) => question.ess > 0 && question.ess <= LOW_ESS,
  mixed: (question) => question.num_correct > 0 && question.num_correct < question.num_answers,
  truncated: (question) => question.traces.some((trace) => trace.status === "truncated"),
};
const SORTS = {
  order: () => 0,
  id: (a, b) => (a.id < b.id ? -1 : 1),
  ess: (a, b) => a.ess - b.ess,
  correct: (a, b) => share(a) - share(b),
};

const share = (row) => (row.num_answers ? row.num_correct / row.num_answers : 0);
const number = (value, digits) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

function matches(question) {
  const wanted = search.value.trim().toLowerCase();
  const text = [question.id, question.question, question.hint].join("\n").toLowerCase();
  return text.includes(wanted) && FILTERS[filter.value](question);
}

function showList() {
  const listed = questions.filter(matches).sort(SORTS[sort.value]);
  list.replaceChildren(...listed.map((question) => {
    const numbers = `ESS ${number(question.ess, 1)} · ${question.num_correct} of ${question.num_answers} correct`;
    const button = element("button", "question", element("span", "name", question.id),
      element("span", "excerpt", question.question.slice(0, 90)), element("span", "numbers", numbers));
    button.dataset.id = question.id;
    button.onclick = () => choose(question.id);
    return button;
  }));
  count.textContent = `${listed.length} of ${questions.length} questions listed.`;
  if (listed.length && !listed.some((question) => question.id === chosen)) choose(listed[0].id);
  else mark();
}

function choose(id) {
  chosen = id;
  history.replaceState(null, "", "#question=" + encodeURIComponent(id));
  mark();
}

function mark() {
  for (const button of list.children) button.classList.toggle("chosen", button.dataset.id === chosen);
  const question = byId.get(chosen);
  if (question) showQuestion(question);
}

function showQuestion(question) {
  const best = Math.max(...question.traces.map((trace) => trace.weight), 1e-9);
  const traces = [...question.traces].sort((a, b) => b.weight - a.weight);
  detail.replaceChildren(
    element("h3", "", question.id),
    element("pre", "text", question.question),
    element("p", "hint", "hint: ", element("strong", "", question.hint)),
    ...traces.map((trace) => showTrace(trace, best)),
  );
}

function showTrace(trace, best) {
  const bar = element("span", "bar");
  bar.style.width = `${(100 * trace.weight) / best}%`;
  const facts = [`log-ratio ${number(trace.log_ratio, 4)}`, `${trace.num_correct} of ${trace.num_answers} correct`,
    trace.tokens === null ? "gold trace" : `${trace.tokens} tokens`,
    ...(trace.leakage === null ? [] : [`leakage ${number(trace.leakage, 2)} nats`])];
  return element("article", "trace",
    element("header", "",
      element("span", "name", trace.index < 0 ? "gold" : `trace ${trace.index}`),
      element("span", "weight", element("span", "track", bar), number(trace.weight, 3)),
      ...facts.map((fact) => element("span", "fact", fact)),
      element("span", `status ${trace.status}`, trace.status.replaceAll("_", " "))),
    element("pre", "text", trace.text),
    element("ul", "answers", ...trace.answers.map(showAnswer)));
}

function showAnswer(answer) {
  const kind = ["correct", "wrong"].includes(answer.verdict) ? answer.verdict : "other";
  const times = answer.count > 1 ? ` × ${answer.count}` : "";
  return element("li", "", element("span", `verdict ${kind}`, answer.verdict + times),
    element("code", "", answer.text.trim() || "(empty)"));
}

list.onkeydown = (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const buttons = [...list.children];
  const next = buttons[buttons.indexOf(document.activeElement) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
  choose(next.dataset.id);
};
for (const control of [search, filter, sort]) control.oninput = showList;
showList();
if (byId.has(linked)) document.getElementById("browser").scrollIntoView();
