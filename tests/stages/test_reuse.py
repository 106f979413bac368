"""`reuse`: what another run has finished under the same settings is linked, checked, and everything else is run.

The runs are real but for the serving engine, which answers every question in the same way (`helpers/parrot.py`).
"""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from helpers.parrot import BASE, ParrotService

from megavar.checksums import file_digest
from megavar.config.load import load_config
from megavar.disk import atomic_write
from megavar.report.summary import summarize, summary_rows
from megavar.runs import reuse
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics
from megavar.runs.owner import owned
from megavar.runs.plan import find_stage, stages_of
from megavar.stages import runner
from megavar.training import parallel

OTHER = Path("runs/base")
SHARED = ["sft", "rollouts", "posterior", "sample", "verify", "score"]
"""What does not depend on the objective."""
ANOTHER_OBJECTIVE = ["rounds=1", "objective.ratio=sequence", "objective.num_traces=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of two rounds, in the working folder: `runs/base`."""
    folder = tmp_path_factory.mktemp("reuse")
    rows = [{"id": f"q{n}", "question": f"1+1+{n}", "answer": answer, "trace": "7+3\n0\n"}
            for n, answer in enumerate("2223")]  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(runner, "RolloutService", ParrotService)
        for name, some in (("train", rows), ("eval", rows[1:]), ("suite", rows[:2])):
            Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
        Path("run.yaml").write_text(
            f"name: base\nmodel: {BASE}\nrounds: 2\n"
            "data: {train: train.jsonl, eval: eval.jsonl, max_sequence_tokens: 160}\n"
            "precision: {recipe: fp32}\nsft: &train {num_steps: 2, batch_sequences: 4}\n"
            "posterior: {source: rollout, num_rollouts: 2, train: *train}\npolicy: {train: *train}\n"
            "sample: {num_traces: 2, num_answers: 2, max_trace_tokens: 64, max_answer_tokens: 16}\n"
            "eval: {suites: [suite.jsonl], num_samples: 2, num_bootstrap: 10}\n"
        )
        parallel.start_alone()
        runner.run_pipeline(load_config(Path("run.yaml"), []))
        yield folder
        parallel.stop()


@pytest.fixture
def other(base):
    """A copy of that run which a test may spoil."""
    copy = Path("runs/other")
    shutil.copytree(OTHER, copy, symlinks=True)
    yield copy
    shutil.rmtree(copy, ignore_errors=True)


@pytest.fixture
def load(base):
    """The configuration of a new run with overrides; what it writes is removed."""
    made = []

    def load_new(*overrides, name="new", other=OTHER):
        made += [Path("runs") / name] if name != "base" else []
        return load_config(Path("run.yaml"), [f"name={name}", *([f"reuse={other}"] if other else []), *overrides])

    yield load_new
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def entries(config):
    return Manifest(Run(config).folder).entries()


def reused(config):
    return [name for name, entry in entries(config).items() if "reused_from" in entry]


def take(config, name):
    """Reuse one stage without running anything; whether it was."""
    stage, run = find_stage(config, name)
    run.open()
    return reuse.reuse_stage(run, stage, stage.settings(run), lambda: None)


def digests_of(folder):
    """Relative path -> SHA-256 of everything a run has made, but for what differs by its name and clock."""
    left_out = {"config.yaml", "manifest.json", "metrics.jsonl"}
    return {
        str(file.relative_to(folder)): file_digest(file)
        for file in folder.rglob("*")
        if file.is_file() and file.name not in left_out and "tensorboard" not in file.parts
    }


def rows_of(folder, *left_out):
    """Rows of metrics without what a clock decides."""
    clocks = ("seconds", "_per_second", "mfu", "memory", "time")
    return [{key: value for key, value in row.items() if not any(clock in key for clock in clocks)}
            for row in Metrics.read(folder) if row["stage"] not in left_out]  # fmt: skip


def test_with_another_objective_only_what_depends_on_it_runs_and_the_results_are_the_same(load, capsys):
    linked, alone = load(*ANOTHER_OBJECTIVE), load(*ANOTHER_OBJECTIVE, name="alone", other=None)
    forecast, obstacles = reuse.forecast_reuse(linked)
    assert forecast == dict.fromkeys(SHARED, OTHER)
    assert obstacles == {"weigh": f"{OTHER}: objective.num_traces is 1 here, None there"}
    runner.run_pipeline(linked)
    printed = capsys.readouterr().out
    assert reused(linked) == SHARED and [*entries(linked)] == [*SHARED, "weigh", "policy", "export", "eval"]
    assert f"sample: reused from {OTHER}\n" in printed
    assert f"weigh: not reused: {OTHER}: objective.num_traces is 1 here, None there\n" in printed
    assert f"policy: not reused: {OTHER}: it reads another weigh there\n" in printed
    runner.run_pipeline(alone)
    folders = Run(linked).folder, Run(alone).folder
    of_linked, of_alone = map(digests_of, folders)
    unlinked = {path for path in of_alone if path.startswith(("sft/checkpoints", "round_01/posterior/checkpoints"))}
    assert unlinked and of_linked == {path: of_alone[path] for path in of_alone.keys() - unlinked}
    assert rows_of(folders[0]) == rows_of(folders[1])
    assert (folders[0] / "hf").resolve() == (folders[0] / "round_01/policy/hf").resolve()
    of_linked, of_alone = (summarize(Run(config)) for config in (linked, alone))
    assert of_linked["reused_from"] == dict.fromkeys(SHARED, str(OTHER)) and of_alone["reused_from"] == {}
    assert of_linked["accuracy"] == of_alone["accuracy"] != {}
    assert "reused from runs/base" in dict(summary_rows(of_linked)[2])["sft, seconds"]


def test_a_whole_run_of_two_rounds_is_linked_and_has_its_report(load, monkeypatch):
    config = load()
    monkeypatch.setattr(runner, "_execute", lambda run, stage, service: pytest.fail(f"{stage.name} ran"))
    runner.run_pipeline(config)
    folder = Run(config).folder
    assert reused(config) == [run.entry(stage.name) for stage, run in stages_of(config)] and len(reused(config)) == 19
    assert {name: entry["digest"] for name, entry in entries(config).items()} == {
        name: entry["digest"] for name, entry in Manifest(OTHER).entries().items()
    }
    there = digests_of(OTHER)
    assert digests_of(folder) == {path: there[path] for path in there
                                  if "checkpoints" not in path or "policy/checkpoints/step_000002" in path}  # fmt: skip
    assert sorted(map(str, rows_of(folder))) == sorted(map(str, rows_of(OTHER)))
    assert (folder / "hf").resolve() == (folder / "round_02/policy/hf").resolve()
    assert (folder / "round_02/traces/data.parquet").samefile(OTHER / "round_02/traces/data.parquet")
    of_new, of_other = (summarize(Run(config, 2)) for config in (config, load(name="base", other=None)))
    assert of_new | {"reused_from": {}} == of_other
