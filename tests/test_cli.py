"""What the command line prints, and what it does not import."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.processes import runs

from megavar.cli import main
from megavar.ranks import process_exists
from megavar.runs.plan import STAGES

ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_help_lists_every_command_with_one_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("run", *(stage.name for stage in STAGES), "report", "show"):
        assert len([line for line in lines if re.match(rf"  {name} +\S", line)]) == 1


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stages_help_says_what_it_reads_and_writes(stage, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([stage.name, "--help"])
    said = capsys.readouterr().out
    assert f"reads:   {stage.reads}" in said and f"writes:  {stage.writes}" in said


@pytest.mark.parametrize("mistake", ["no file", "setting", "question"])
def test_a_mistake_in_configuration_or_data_is_said_before_torch_is_imported(tmp_path, mistake):
    row = {
        "id": "a",
        "question": "1+1",
        "answer": "2",
        "trace": "1+1=2;",
        **({"odd": 1} if mistake == "question" else {}),
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    setting = "objective: {name: odd}" if mistake == "setting" else ""
    if mistake != "no file":
        (tmp_path / "run.yaml").write_text(f"name: a\nmodel: {BASE}\ndata: {{train: t.jsonl}}\n{setting}\n")
    call = "main(['weigh', '--config', 'run.yaml'])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(f"import sys; from megavar.cli import main; print({call}, 'torch' in sys.modules)", tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0  # seconds of CPU time
    message, result = done.stdout.splitlines()
    expected = {"no file": "No config file", "setting": "objective.name='odd'", "question": "unknown field 'odd'"}
    assert message.startswith("error: ") and expected[mistake] in message
    assert result == "2 False" and done.stderr == ""


def test_stages_that_neither_train_nor_score_do_not_import_megatron():
    stages = [stage.name for stage in STAGES if not stage.all_ranks]
    code = f"""
import sys
from importlib import import_module
import megavar.stages.runner, megavar.stages.check
for name in {stages}:
    import_module(f"megavar.stages.{{name}}")
print(any(name.split(".")[0] == "megatron" for name in sys.modules))
"""
    assert len(stages) >= 6 and python(code).stdout == "False\n"


def train(tmp_path, name: str, level: str, umask: int = -1) -> list[str]:
    """What two steps of sft under torchrun print."""
    row = {"id": "a", "question": "1+1", "answer": "2", "trace": "1+1=2;"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    (tmp_path / "run.yaml").write_text(
        f"name: a\nruns_dir: {tmp_path}/runs\nmodel: {BASE}\ndata: {{train: {tmp_path}/t.jsonl, "
        "max_sequence_tokens: 160}\nprecision: {recipe: fp32}\nsft: {num_steps: 2}\n"
        "sample: {max_trace_tokens: 80, max_answer_tokens: 16}\nrollout: {mode: external, urls: [http://127.0.0.1:9]}\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    overrides = ["--config", f"{tmp_path}/run.yaml", f"name={name}", f"logging.level={level}"]
    done = subprocess.run(
        [*torchrun, "-m", "megavar", "sft", *overrides],
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, umask=umask,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_a_good_stage_prints_only_our_lines_and_debug_brings_those_of_libraries_back(tmp_path):
    ours = ("sft: train pi_0 from the base model", "sft: 2 of 2 steps, loss ", "export: ")
    quiet = train(tmp_path, "quiet", "info")
    assert len(quiet) == len(ours) and all(line.startswith(start) for line, start in zip(quiet, ours, strict=True))
    assert any("Falling back" in line for line in train(tmp_path, "loud", "debug"))


def test_nobody_else_can_write_the_files_of_a_run_whatever_the_umask(tmp_path):
    train(tmp_path, "open", "info", umask=0)
    made = [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    assert len(made) > 10 and not [path for path in made if path.stat().st_mode & 0o022]
    assert (tmp_path / "runs" / "open" / "manifest.json").stat().st_mode & 0o044 == 0o044  # reading is not our concern


def test_a_stage_of_one_process_runs_once_however_many_ranks_torchrun_starts(tmp_path):
    (tmp_path / "run.yaml").write_text(f"name: a\nruns_dir: {tmp_path}\nmodel: {BASE}\ndata: {{train: none.jsonl}}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "megavar", "weigh", "--config", f"{tmp_path}/run.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("error: No question file none.jsonl") == 1


def test_what_a_rank_forks_ends_with_it():
    """Megatron forks the writers of a checkpoint; killed in between, a rank would leave them waiting for ever."""
    rank = "import os, time; from megavar.cli import end_with_agent; end_with_agent(); end_with_agent()\n"
    rank += "pid = os.fork()\n"
    rank += "print(pid, flush=True) if pid else None\n"
    rank += "time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    forked = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.2)
    assert runs(forked)
    process.kill()
    process.wait()
    limit = time.monotonic() + 5
    while runs(forked) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not runs(forked)


@pytest.mark.parametrize("has_agent", [True, False])
def test_a_rank_ends_with_the_process_that_started_it_if_that_is_an_agent(tmp_path, has_agent):
    """It executes nothing at that moment: the kernel ends it."""
    rank = "import time; from megavar.cli import end_with_agent; end_with_agent()\n"
    rank += "print('ready', flush=True); time.sleep(30)"
    agent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {rank!r}])\n"
    agent += "print(p.pid, flush=True); p.wait()"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    if has_agent:
        environment["TORCHELASTIC_RUN_ID"] = "x"
    command = [sys.executable, "-c", agent]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    lines = sorted([process.stdout.readline().strip(), process.stdout.readline().strip()])
    assert lines[1] == "ready"
    process.kill()
    process.wait()
    time.sleep(0.5)
    assert process_exists(int(lines[0])) != has_agent
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(lines[0]), signal.SIGKILL)


@pytest.mark.parametrize(
    "call",
    [
        "main(['--help'])",  # short: it is written when the process ends
        "reported(lambda: print('x' * 10**6))",
        "main(['show', 'rows.jsonl', '--limit', '9'])",
    ],
)
def test_a_command_whose_output_nobody_reads_ends_quietly(tmp_path, call):
    """As in `megavar ... | head`."""
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1"}\n' * 9)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", f"import sys; from megavar.cli import main, reported; sys.exit({call})"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write_end)
    assert done.stderr == ""
    assert done.returncode in ((1, 141) if "show" in call else (141,))  # 128 + SIGPIPE; rich ends with 1
