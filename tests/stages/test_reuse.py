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
from megavar.runs.manifest import Manifest, digest_of
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
            "eval: {models: [policy], suites: [suite.jsonl], num_samples: 2, num_bootstrap: 10}\n"
            "verify: {num_workers: 1}\n"
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
        if name != "base":
            made.append(Path("runs") / name)
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
    """Relative path -> SHA-256 of what a run has made, but for what differs by its name, its clock, or torch."""
    left_out = {"config.yaml", "manifest.json", "metrics.jsonl", "results.json", ".metadata"}
    return {
        str(file.relative_to(folder)): file_digest(file)
        for file in folder.rglob("*")
        if file.is_file()
        and not left_out & {file.name}
        and "tensorboard" not in file.parts
        and not (file.name == "SHA256SUMS" and "checkpoints" in file.parts)
    }


def suites_of(folder):
    """The results of the evaluation, without the paths of the models."""
    return json.loads((folder / "eval" / "results.json").read_text()) | {"models": {}}


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
    assert rows_of(folders[0]) == rows_of(folders[1]) and suites_of(folders[0]) == suites_of(folders[1])
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
    assert suites_of(folder) == suites_of(OTHER)
    of_new, of_other = (summarize(Run(config, 2)) for config in (config, load(name="base", other=None)))
    assert of_new | {"reused_from": {}} == of_other


def test_with_another_seed_nothing_is_reused_and_the_message_names_it(load, capsys):
    config = load("seed=2")
    forecast, obstacles = reuse.forecast_reuse(config)
    assert forecast == {} and obstacles == {"sft": f"{OTHER}: seed is 2 here, 1 there"}
    assert not take(config, "sft") and entries(config) == {}
    assert capsys.readouterr().out == f"sft: not reused: {OTHER}: seed is 2 here, 1 there\n"


def test_a_later_stage_that_reads_nothing_of_an_earlier_one_is_reused_without_it(load):
    gold = ["posterior.source=gold", "rounds=1"]
    stage, run = find_stage(load(*gold, name="gold"), "posterior")
    run.open()
    shutil.copytree(OTHER / "round_01/posterior/hf", run.posterior / "hf")
    Manifest(run.folder).begin("posterior", stage.settings(run))
    Manifest(run.folder).finish("posterior", 5.0, stage.outputs(run))
    taken, obstacles = reuse.forecast_reuse(load(*gold, other=run.folder))
    assert taken == {"posterior": run.folder} and obstacles == {"sft": f"{run.folder}: the stage is not finished there"}


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lie(other, **values):
    manifest = Manifest(other)
    all_entries = manifest.entries()
    all_entries["sft"] |= values
    manifest.file.write_text(json.dumps(all_entries))


WEIGHTS = "sft/hf/model.safetensors"
DAMAGES = {
    "weights flipped": (lambda other: flip(other / WEIGHTS), f"{WEIGHTS} has another checksum"),
    "weights missing": (lambda other: (other / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "sums cut": (lambda other: cut(other / "sft/hf/SHA256SUMS"), "sft/hf/SHA256SUMS has "),
    "sums flipped": (lambda other: flip(other / "sft/hf/SHA256SUMS"), "sft/hf/SHA256SUMS"),
    "folder missing": (lambda other: shutil.rmtree(other / "sft"), "sft/hf/SHA256SUMS is missing"),
    "nothing listed": (lambda other: lie(other, outputs={}), "manifest.json was changed"),
    "other settings": (lambda other: lie(other, settings={}), "here, None there"),
    "begun": (lambda other: lie(other, status="begun"), "the stage is not finished there"),
    "metrics": (lambda other: (other / "metrics.jsonl").write_text("odd\n{}\n"), "line 1 is not a row of metrics"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_lying_run_is_named_and_not_reused(load, other, capsys, damage, message):
    damage(other)
    config = load(other=other)
    assert not take(config, "sft") and entries(config) == {}
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.startswith(f"sft: not reused: {other}: ") and message in printed
    assert {path.name for path in Run(config).folder.iterdir()} == {"config.yaml"}


def test_a_row_of_metrics_without_its_time_is_named_before_anything_is_taken(load, other, capsys):
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({key: row[key] for key in row if key != "time"}) + "\n" for row in rows)
    (other / "metrics.jsonl").write_text(text)
    config = load(other=other)
    assert not take(config, "sft") and entries(config) == {}
    assert "metrics.jsonl, line 1 is not a row of metrics (KeyError: 'time')" in capsys.readouterr().out


def test_a_run_of_before_a_setting_that_is_null_is_reused_whole(load, other, monkeypatch):
    manifest, digest_of_old, older = Manifest(other), dict[str, str](), {}
    for name, entry in manifest.entries().items():
        settings = {key: digest_of_old.get(value, value) if isinstance(value, str) else value
                    for key, value in entry["settings"].items() if value is not None}  # fmt: skip
        older[name] = entry | {"settings": settings, "digest": digest_of(settings, entry["outputs"])}
        digest_of_old[entry["digest"]] = older[name]["digest"]
    assert any(old != new for old, new in digest_of_old.items())
    manifest.file.write_text(json.dumps(older))
    config = load(other=other)
    assert reuse.forecast_reuse(config)[0].keys() == older.keys()
    monkeypatch.setattr(runner, "_execute", lambda run, stage, service: pytest.fail(f"{stage.name} ran"))
    runner.run_pipeline(config)
    assert reused(config) == [*older]


def test_an_undamaged_run_is_taken_where_another_one_is_damaged(load, other):
    flip(other / WEIGHTS)
    config = load(f"reuse=[{other},{OTHER}]", other=None)
    assert take(config, "sft") and entries(config)["sft"]["reused_from"] == str(OTHER)


def test_the_other_run_may_be_gone_from_then_on(load, other, monkeypatch):
    config = load(*ANOTHER_OBJECTIVE, other=other)
    for name in SHARED:
        assert take(config, name)
    shutil.rmtree(other)
    runner.run_stage(config, "weigh")
    assert list(entries(config)) == [*SHARED, "weigh"]
    monkeypatch.setattr(runner, "_execute", lambda run, stage, service: pytest.fail(f"{stage.name} ran"))
    for name in [*SHARED, "weigh"]:
        Manifest(Run(config).folder).check_outputs(name)
        runner.run_stage(config, name)


MOMENTS = [(reuse, "_link_aside"), (Manifest, "begin"), (reuse, "_place"), (reuse, "_log_again"), (Manifest, "finish")]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("holder", "name"), MOMENTS, ids=[name for _, name in MOMENTS])
def test_killed_at_any_moment_the_rerun_has_the_same_result(load, holder, name, after):
    config = load()
    work = getattr(holder, name)

    def killed(*arguments, **named):
        if after:
            work(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    for stage in ("sft", "rollouts"):
        child = os.fork()
        if child == 0:
            setattr(holder, name, killed)
            take(config, stage)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        if (name, after) != ("finish", True):
            assert entries(config).get(stage, {}).get("status") != "finished"
            reuse.clear_aside(Run(config).folder)
            assert take(config, stage)
    folder, there = Run(config).folder, Manifest(OTHER).entries()
    assert [entry["digest"] for entry in entries(config).values()] == [there[key]["digest"] for key in entries(config)]
    files = {"sft/hf", "round_01/rollouts"}
    expected = {path: digest for path, digest in digests_of(OTHER).items() if path.startswith(tuple(files))}
    assert {path: digest for path, digest in digests_of(folder).items() if not path.startswith(".")} == expected
    assert rows_of(folder) == [row for row in rows_of(OTHER) if row["stage"] == "sft"] + [
        row for row in rows_of(OTHER) if (row["stage"], row["step"]) == ("rollouts", 1)
    ]


def test_other_settings_are_refused_after_a_kill(load, monkeypatch):
    monkeypatch.setattr(reuse, "_place", lambda *_: os._exit(1))
    config = load()
    if (child := os.fork()) == 0:
        take(config, "sft")
    os.waitpid(child, 0)
    with pytest.raises(ValueError, match="stage sft was begun with seed=1, now it is 2"):
        runner.run_stage(load("seed=2"), "sft")


def test_what_a_running_run_has_finished_is_used_and_what_it_does_later_changes_nothing(load, other):
    manifest, config = Manifest(other), load(other=other)
    running = manifest.entries()
    running["rollouts"]["status"] = "begun"
    manifest.file.write_text(json.dumps(running))
    with owned(other):
        assert take(config, "sft") and not take(config, "rollouts")
        before = digests_of(Run(config).folder), rows_of(Run(config).folder)
        with atomic_write(other / WEIGHTS) as temporary:
            temporary.write_text("another model")
        Metrics(other, config.logging, "other").log("sft", 3, {"loss": 9.0})
        assert (digests_of(Run(config).folder), rows_of(Run(config).folder)) == before
        Manifest(Run(config).folder).check_outputs("sft")


def test_what_the_run_has_begun_itself_goes_on(load, capsys):
    config = load(other=None)
    stage, run = find_stage(config, "sft")
    run.open()
    Manifest(run.folder).begin("sft", stage.settings(run))
    assert not take(load(), "sft") and "it was begun in this run, and goes on" in capsys.readouterr().out
    assert not (run.folder / "sft").exists() and "sft" not in reuse.forecast_reuse(load())[0]


def test_files_are_copied_from_another_file_system(load):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        far = Path(memory) / "far"
        shutil.copytree(OTHER, far, symlinks=True)
        config = load(other=far)
        if os.stat(memory).st_dev == os.stat("runs").st_dev:
            pytest.skip("there is no second file system")
        assert take(config, "sft") and take(config, "rollouts")
    own = digests_of(Run(config).folder)
    assert own == {path: digest for path, digest in digests_of(OTHER).items() if path in own} and len(own) > 8
    assert (Run(config).folder / WEIGHTS).stat().st_nlink == 1


def test_a_run_that_is_none_and_the_run_itself_are_refused_before_it_begins(load):
    with pytest.raises(ValueError, match=r"reuse=runs/typo is not the folder of a run: it has no manifest\.json"):
        reuse.open_others(load(other="runs/typo"))
    with pytest.raises(ValueError, match=r"reuse=runs/new is this run itself"):
        reuse.open_others(load(other="runs/new"))


def test_questions_that_were_left_out_come_with_the_stages(load, other):
    file = Path("left_out") / "0.json"
    (other / "left_out").mkdir()
    (other / file).write_text('["q0"]')
    config = load(other=other)
    assert take(config, "sft") and (Run(config).folder / file).read_text() == '["q0"]'
    (other / file).write_text('["q1"]')
    assert not take(config, "rollouts") and (Run(config).folder / file).read_text() == '["q0"]'
