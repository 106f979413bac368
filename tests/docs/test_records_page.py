"""docs/records.md names every file, column and metric that a run writes, and nothing else."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.small_run import make_run, write_eval

from megavar.records import Answer, Bound, Question, Score, Trace, Weight, schema_of
from megavar.report.page import write_page
from megavar.report.summary import print_summary, summarize
from megavar.runs.metrics import Metrics
from megavar.runs.plan import STAGES
from megavar.training.loop import _utilisation

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "records.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
TYPES = {"double": "float64", "float": "float32"}


def rows(section: str) -> list[list[str]]:
    """The cells of all tables in a section, without their heads."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row, after in zip(cells, [*cells[1:], [""]], strict=True) if not (row[0] + after[0]).count("---")]


def names(section: str) -> list[str]:
    """What the first cells of a section's tables name."""
    return [name for row in rows(section) for name in re.findall(r"`([^`]+)`", row[0])]


def type_name(field) -> str:
    kind = field.type.value_type if hasattr(field.type, "value_type") else field.type
    name = TYPES.get(str(kind), str(kind))
    name = name if kind is field.type else f"list<{name}>"
    return f"{name} or null" if field.nullable else name


def pattern_of(path: str) -> re.Pattern[str]:
    """A path of the page as a pattern: N stands for a number, a last slash or three dots for anything below."""
    text = re.sub(r"N+", lambda found: r"\d" + ("+" if len(found[0]) == 1 else f"{{{len(found[0])}}}"), re.escape(path))
    return re.compile(text.replace("…", ".*") + (".*" if path.endswith("/") else ""))


FILES = {path: re.findall(r"`(\w+)`", row[1]) for row in rows("Files") for path in re.findall(r"`([^`]+)`", row[0])}


@pytest.mark.parametrize(
    ("section", "record_type"),
    [
        ("Questions", Question), ("Traces", Trace), ("Answers", Answer),
        ("Scores", Score), ("Weights", Weight), ("Bounds", Bound),
    ],
)  # fmt: skip
def test_columns_are_those_of_the_record(section, record_type):
    documented = [(row[0].strip("`"), row[1]) for row in rows(section)]
    schema = schema_of(record_type)
    assert documented == [(name, type_name(schema.field(name))) for name in schema.names]


def test_every_value_of_an_enum_column_is_named():
    for section, record_type in (("Traces", Trace), ("Answers", Answer), ("Weights", Weight)):
        for item in fields(record_type):
            if hasattr(item.type, "__members__"):
                (meaning,) = [row[2] for row in rows(section) if row[0] == f"`{item.name}`"]
                missing = [str(value) for value in item.type if f"`{value}`" not in meaning]
                assert missing == (["gold"] if item.name == "sampler" else []), item.name  # gold traces are not sampled


def test_every_output_that_a_stage_declares_is_listed_with_its_writer():
    for stage in STAGES:
        outputs = re.findall(r"(?:\w+/)+|(?<=symlink )\w+", stage.writes)
        assert outputs, stage.name
        for output in outputs:
            listed = [path for path, writers in FILES.items() if path.startswith(output) and stage.name in writers]
            assert listed, f"{stage.name} writes {output}"
    known = {stage.name for stage in STAGES} | {"run", "report"}
    assert {writer for writers in FILES.values() for writer in writers} <= known


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run with its table and its page."""
    found = make_run(tmp_path_factory.mktemp("run"))
    for model in ("pi_0", "pi_1"):
        write_eval(found, model, {"easy": 3, "mixed": 1, "hard": 0, "cut": 0})
    print_summary(found)
    write_page([found.folder])
    return found


def test_every_file_of_a_run_is_listed(run):
    files = [str(file.relative_to(run.folder)) for file in run.folder.rglob("*") if file.is_file()]
    assert len(files) > 12
    assert [file for file in files if not any(pattern_of(path).fullmatch(file) for path in FILES)] == []


def test_the_keys_of_metrics_are_those_that_are_logged(run):
    documented = names("metrics.jsonl")
    loop = ast.parse((ROOT / "megavar" / "training" / "loop.py").read_text())
    (logged,) = [
        node.value
        for node in ast.walk(loop)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metrics"
    ]
    groups = [[ast.literal_eval(key)] if key else [*_utilisation(1.0, 1.0), "mfu"] for key in logged.keys]
    training = list(dict.fromkeys(key for group in groups for key in group))  # "mfu" twice where there is a GPU
    assert documented[: len(training)] == training
    (row,) = [row for row in Metrics.read(run.folder) if row["stage"] == "weigh"]
    found = set()
    for key in row.keys() - {"stage", "step", "time"}:
        (name,) = [
            name
            for name in documented[len(training) :]
            if re.fullmatch(name.replace("STATUS", r"[a-z_]+").replace("K", r"\d+"), key)
        ]
        found.add(name)
    # Logged only at equal temperatures of sampling and scoring, where traces were scored twice, or some left out.
    unlogged = {"largest_engine_difference", "log_ratio_noise", "weight_noise", "leaky_weight"}
    assert found == set(documented[len(training) :]) - unlogged


def test_the_keys_of_the_manifest_and_of_the_summary_are_listed(run):
    entries = json.loads((run.folder / "manifest.json").read_text())
    assert sorted(names("manifest.json")) == sorted([*entries["weigh"], "reused_from"])
    assert sorted(names("report/summary.json")) == sorted(summarize(run))
