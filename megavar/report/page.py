"""`megavar report`: one self-contained HTML page of a finished run, with its figures as PNG files beside it.

Reads what `finished.py` opens, and writes only the run's report/ folder. Everything the page needs is in it, and its
content security policy forbids it to ask for more.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from megavar.data.decode import Decoder, open_decoder
from megavar.records import atomic_write
from megavar.report.browser import MOST_CHARACTERS, browser_data
from megavar.report.exhibits import Exhibit, PassCurves, evaluated_curves, make_exhibits
from megavar.report.finished import FinishedRun, Round, labels, open_run
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
_SORTS = {"order": "in the run's order", "id": "by id", "ess": "by effective sample size", "correct": "by accuracy"}


def write_page(folders: Sequence[Path]) -> Path:
    """Write the page and the figures of the first run, with the other runs beside it in the curves.

    Returns:
        The page, report/index.html in the first run's folder.

    Raises:
        ValueError: if a folder is not that of a run, if the first run has no weights yet, naming the missing stage, or
            if the questions or a tokenizer are not where the runs found them.
    """
    runs = labels([open_run(folder) for folder in folders])
    label, run = next(iter(runs.items()))
    found = run.last_round()
    traces = browser_data(found, _decoder(run))
    passes = evaluated_curves(runs)
    exhibits = make_exhibits(runs, found, passes)
    images = {exhibit.name: _png(exhibit) for exhibit in exhibits}
    page = run.folder / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    for name, image in images.items():
        with atomic_write(page.with_name(f"{name}.png")) as temporary:
            temporary.write_bytes(image)
    body = [
        _head(label, run, found, list(runs)[1:]),
        _results(run, found, passes),
        '<div id="figures">',
        *(_figure(exhibit, images[exhibit.name]) for exhibit in exhibits),
        "</div>",
        _browser(len(traces), len(found.questions)),
    ]
    with atomic_write(page) as temporary:
        temporary.write_text(_document(f"megavar: {label}", "\n".join(body), json.dumps(traces)), encoding="utf-8")
    return page


def _document(title: str, body: str, data: str) -> str:
    here = Path(__file__)
    style, script = (here.with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # Inside a script element only "<" can end it or open a comment, and JSON may write it as an escape.
    inert = data.replace("<", "\\u003c")
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
<script type="application/json" id="data">{inert}</script>
<script>
{script}</script>
</body>
</html>
"""


def _head(label: str, run: FinishedRun, found: Round, others: Sequence[str]) -> str:
    config = run.config
    facts = (
        f"{found.folder.name} · {len(found.questions)} questions · K = {config.num_traces} traces · "
        f"n = {config.sample.num_answers} answers · objective {config.objective.name}"
    )
    beside = f"<br>Beside it in the curves: {escape(', '.join(others))}" if others else ""
    missing = run.unfinished()
    note = f"Not finished yet: {', '.join(missing)}. What needs them is left out."
    settings = escape((run.folder / "config.yaml").read_text(encoding="utf-8"))
    return "\n".join(
        [
            f"<h1>{escape(label)}</h1>",
            f'<p class="soft">{escape(facts)}<br>{escape(str(run.folder))}{beside}</p>',
            f'<p class="note">{escape(note)}</p>' if missing else "",
            '<nav><a href="#results">Results</a><a href="#figures">Figures</a><a href="#browser">Traces</a></nav>',
            f"<details><summary>Settings</summary><pre>{settings}</pre></details>",
        ]
    )


def _results(run: FinishedRun, found: Round, passes: PassCurves) -> str:
    sections = summary_rows(summarize(run.run))
    summary = "".join(f"<tbody>{_rows(section)}</tbody>" for section in sections if section)
    compared = [
        (name, model, f"{point.k}", f"{point.mean:.3f}  [{point.low:.3f}, {point.high:.3f}]")
        for name, models in passes.items()
        for model, points in models.items()
        for point in (points[0], points[-1])
    ]
    heads = "".join(f"<th>{name}</th>" for name in ("run", "model", "k", "pass@k [95 % interval]"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{_rows(compared)}</tbody></table>" if compared else ""
    return f'<h2 id="results">Results</h2>\n<div class="tables"><table>{summary}</table>{table}</div>'


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)


def _figure(exhibit: Exhibit, image: bytes) -> str:
    width = round(exhibit.figure.get_figwidth() * _PIXELS_PER_INCH)
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return (
        f"<h2>{escape(exhibit.title)}</h2>\n<figure><figcaption>{escape(exhibit.caption)}</figcaption>"
        f'<img alt="{escape(exhibit.title)}" width="{width}" src="{source}"></figure>'
    )


def _browser(shown: int, total: int) -> str:
    which = (
        f"All {total} questions" if shown == total else f"{shown} of {total} questions, evenly chosen over their order"
    )
    return f"""<h2 id="browser">Traces</h2>
<p class="soft">{which}; the text of one is cut in the middle beyond {MOST_CHARACTERS} characters. Traces are in
the order of their weights; bars are relative to the largest. <span id="count"></span></p>
<noscript><p class="note">The browser of traces needs JavaScript.</p></noscript>
<div class="controls"><input id="search" type="search" placeholder="search id, question or hint" aria-label="search">
{_select("filter", _FILTERS)}
{_select("sort", _SORTS)}</div>
<div class="browser"><div id="list"></div><div id="detail"></div></div>"""


def _select(name: str, options: Mapping[str, str]) -> str:
    rows = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options.items())
    return f'<select id="{name}" aria-label="{name}">{rows}</select>'


def _png(exhibit: Exhibit) -> bytes:
    image = io.BytesIO()
    exhibit.figure.savefig(image, format="png")
    return image.getvalue()


def _decoder(run: FinishedRun) -> Decoder:
    """By the tokenizer of what the run trained or, where those folders were removed, of its base."""
    places = [run.run.sft / "hf", run.run.final]
    return open_decoder(next((place for place in places if (place / "tokenizer.json").is_file()), run.run.base))
