"""`megavar report`: a self-contained HTML page of a run, and its figures as PNG files in the same folder.

Reads run folders (`run_view.py`) and writes only the run's report/ folder. The page loads nothing from elsewhere; its
content security policy enforces that.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megavar.data.answer_in_trace import AnswerFinder
from megavar.data.decode import open_decoder
from megavar.disk import atomic_write
from megavar.evaluation.results import Results, read_results
from megavar.report.browser import MAX_CHARACTERS, browser_data
from megavar.report.figure_list import PassCurves, ReportFigure, evaluated_curves, make_figures, of_suites
from megavar.report.run_view import Round, RunView, labels, open_run
from megavar.report.suites import CAPTION, FILE, is_evaluation, metrics_of, rows_of, title_of
from megavar.report.summary import summarize, summary_rows

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PIXELS_PER_INCH = 96
_FILTERS = {
    "all": "all questions",
    "none": "no correct trace",
    "low": "effective sample size up to 2",
    "mixed": "some answers correct",
    "truncated": "with truncated traces",
}
_SORTS = {"order": "in run order", "id": "by id", "ess": "by effective sample size", "correct": "by accuracy"}


def write_page(folders: Sequence[Path]) -> Path:
    """Write the report of the first run, or of an evaluation; the curves of a run also show the other runs.

    Returns:
        Path of the page, report/index.html in the first run's folder.

    Raises:
        ValueError: if a folder is not a run folder, the first run has not finished `weigh` (names the unfinished
            stage), or question files or the tokenizer were moved.
    """
    if is_evaluation(folders[0]) and len(folders) == 1:
        return _write_evaluation(folders[0])
    runs = labels([open_run(folder) for folder in folders])
    label, run = next(iter(runs.items()))
    last_round = run.last_round()
    tokenizer = _tokenizer(run)
    traces = browser_data(last_round, open_decoder(tokenizer))
    passes = evaluated_curves(runs)
    figures = make_figures(runs, last_round, passes, AnswerFinder(tokenizer))
    head = [_head(label, run, last_round, list(runs)[1:]), _results(run, passes)]
    if (results := run.suites()) is not None:
        head.append(_suites(results))
    tail = [_browser(len(traces), len(last_round.questions)), _script(traces)]
    return _write(run.folder, label, head, figures, tail)


def _write_evaluation(folder: Path) -> Path:
    """The page of an evaluation without a run."""
    results = read_results(folder / FILE)
    models = " · ".join(f"{name}: {model}" for name, model in results.models.items())
    settings = (folder / "evaluation.yaml").read_text(encoding="utf-8")
    head = [
        f"<h1>{escape(folder.resolve().name)}</h1>",
        f'<p class="soft">{escape(models)}<br>{results.num_samples} samples a question</p>',
        f"<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>",
        _suites(results),
    ]
    return _write(folder, folder.resolve().name, head, [of_suites(results)], [])


def _write(folder: Path, label: str, head: Sequence[str], figures: Sequence[ReportFigure], tail: Sequence[str]) -> Path:
    """Write the figures and the page into report/ of a folder."""
    images = {figure.name: _png(figure) for figure in figures}
    page = folder / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    for name, image in images.items():
        with atomic_write(page.with_name(f"{name}.png")) as temporary:
            temporary.write_bytes(image)
    shown = [_figure(figure, images[figure.name]) for figure in figures]
    body = "\n".join([*head, '<div id="figures">', *shown, "</div>", *tail])
    with atomic_write(page) as temporary:
        temporary.write_text(_document(f"megavar: {label}", body), encoding="utf-8")
    return page


def _document(title: str, body: str) -> str:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _script(traces: Sequence[Any]) -> str:
    """The trace browser with its data."""
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    # Within a script element only "<" can end it or start a comment; JSON allows it to be escaped.
    escaped = json.dumps(traces).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{escaped}</script>\n<script>\n{script}</script>'


def _head(label: str, run: RunView, last_round: Round, others: Sequence[str]) -> str:
    config = run.config
    facts = (
        f"{last_round.folder.name} · {len(last_round.questions)} questions · K = {config.num_traces} traces · "
        f"n = {config.sample.num_answers} answers · objective {config.objective.name}"
    )
    num_read = len({row.question_id for row in last_round.weights})
    if num_read < last_round.num_weighted:
        facts += f" · figures of the round: of {num_read} of its {last_round.num_weighted} weighted questions"
    compared = f"<br>Compared with: {escape(', '.join(others))}" if others else ""
    unfinished = run.unfinished()
    note = f"Not finished yet: {', '.join(unfinished)}. Results that need these stages are omitted."
    settings = escape((run.folder / "config.yaml").read_text(encoding="utf-8"))
    return "\n".join(
        [
            f"<h1>{escape(label)}</h1>",
            f'<p class="soft">{escape(facts)}<br>{escape(str(run.folder))}{compared}</p>',
            f'<p class="note">{escape(note)}</p>' if unfinished else "",
            '<nav><a href="#results">Results</a><a href="#figures">Figures</a><a href="#browser">Traces</a></nav>',
            f"<details><summary>Settings</summary><pre>{settings}</pre></details>",
        ]
    )


def _results(run: RunView, passes: PassCurves) -> str:
    sections = summary_rows(summarize(run.run))
    summary = "".join(f"<tbody>{_rows(section)}</tbody>" for section in sections if section)
    pass_rows = [
        (name, model, f"{point.k}", f"{point.mean:.3f}  [{point.low:.3f}, {point.high:.3f}]")
        for name, models in passes.items()
        for model, points in models.items()
        for point in (points[0], points[-1])
    ]
    heads = "".join(f"<th>{name}</th>" for name in ("run", "model", "k", "pass@k [95 % interval]"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{_rows(pass_rows)}</tbody></table>" if pass_rows else ""
    return f'<h2 id="results">Results</h2>\n<div class="tables"><table>{summary}</table>{table}</div>'


def _suites(results: Results) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("", *metrics_of(results)))
    bodies = "".join(
        f'<tbody><tr><th colspan="{len(metrics_of(results)) + 1}">{escape(title_of(name, suite))}</th></tr>'
        f"{_rows(rows_of(suite))}</tbody>"
        for name, suite in results.suites.items()
    )
    return (
        f'<h2 id="suites">Suites</h2>\n<p class="soft">{escape(CAPTION)} A row of two models is their difference, '
        f"question by question.</p>\n<table><thead><tr>{heads}</tr></thead>{bodies}</table>"
    )


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)


def _figure(figure: ReportFigure, image: bytes) -> str:
    width = round(figure.figure.get_figwidth() * _PIXELS_PER_INCH)
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return (
        f"<h2>{escape(figure.title)}</h2>\n<figure><figcaption>{escape(figure.caption)}</figcaption>"
        f'<img alt="{escape(figure.title)}" width="{width}" src="{source}"></figure>'
    )


def _browser(shown: int, total: int) -> str:
    which = f"All {total} questions" if shown == total else f"{shown} of {total} questions, evenly spaced in run order"
    return f"""<h2 id="browser">Traces</h2>
<p class="soft">{which}. Texts of more than {MAX_CHARACTERS} characters are shortened in the middle. Traces are
sorted by weight; bars are relative to the largest weight. <span id="count"></span></p>
<noscript><p class="note">The trace browser needs JavaScript.</p></noscript>
<div class="controls"><input id="search" type="search" placeholder="search id, question or hint" aria-label="search">
{_select("filter", _FILTERS)}
{_select("sort", _SORTS)}</div>
<div class="browser"><div id="list"></div><div id="detail"></div></div>"""


def _select(name: str, options: Mapping[str, str]) -> str:
    rows = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options.items())
    return f'<select id="{name}" aria-label="{name}">{rows}</select>'


def _png(figure: ReportFigure) -> bytes:
    image = io.BytesIO()
    figure.figure.savefig(image, format="png")
    return image.getvalue()


def _tokenizer(run: RunView) -> Path:
    """Folder with the tokenizer of the run's exported models or, if these were removed, of its base model."""
    folders = [run.run.sft / "hf", run.run.final]
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), run.run.base)
