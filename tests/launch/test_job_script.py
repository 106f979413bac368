"""The script of a job, as bash reads it, and what is refused before anything is submitted; none of it needs Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megavar.config.load import load_config, load_settings
from megavar.launch.slurm import SlurmSettings, job_script

ROOT = Path(__file__).parents[2]
RUN = f"""
name: a
model: {ROOT}/examples/base/qwen3-tiny
data: {{train: t.jsonl, max_sequence_tokens: 160}}
precision: {{recipe: fp32}}
parallel: {{tensor: 2}}
sample: {{sampler: policy, max_trace_tokens: 80, max_answer_tokens: 16}}
objective: {{ratio: none}}
rollout: {{mode: external, urls: [http://127.0.0.1:9]}}
"""
NODES = "nodes: 2\ngpus_per_node: 0\nranks_per_node: 1\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "a", "question": "1+1", "answer": "2", "trace": "1+1=2;"}))
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "nodes.yaml").write_text(NODES)
    return tmp_path


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without Slurm on the PATH."""
    return subprocess.run(
        [sys.executable, "-m", "megavar", "launch", "--config", "run.yaml", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/nowhere"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def script(folder: Path, settings: str, *overrides: str) -> str:
    (folder / "odd.yaml").write_text(settings)
    config = load_config(folder / "run.yaml", list(overrides))
    return job_script(config, load_settings(SlurmSettings, folder / "odd.yaml"), 20, Path("run.yaml"), overrides)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def bash(text: str, names: str) -> list[str]:
    """The values that bash has for arrays or variables before the part of the script that needs a job."""
    head = text.partition("\nattempt=")[0]
    shown = subprocess.run(["bash", "-euc", f'{head}\nprintf "%s\\0" {names}'], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.split("\0")[:-1]


def test_the_script_asks_for_what_the_settings_say_and_flags_win(folder):
    settings = f"{NODES}account: me\npartition: large\ncpus_per_node: 16\nwarn_seconds: 90\nsbatch: [--qos=low]\n"
    (folder / "nodes.yaml").write_text(settings)
    printed = launch(folder, "--executor", "nodes.yaml", "--dry-run", "--nodes", "4", "--time", "1-00:00:00")
    assert printed.returncode == 0 and not (folder / "runs").exists()
    assert options(printed.stdout) == [
        "--job-name=a", "--account=me", "--partition=large", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=16",
        "--time=1-00:00:00", "--signal=TERM@90", f"--chdir={folder}", "--output=/dev/null", "--requeue", "--qos=low",
    ]  # fmt: skip
    assert "--exclusive" in options(script(folder, NODES))
    assert "--gpus-per-node=2" in options(script(folder, "gpus_per_node: 2\n"))


def test_bash_reads_the_arguments_and_the_environment_as_they_were_given(folder):
    odd = 'templates.system=say "it\'s" $HOME \\n #1'
    settings = f"{NODES}environment: {{GREETING: 'a $b \"c\" ''d'''}}\nsetup: [export LATER=\"$GREETING!\"]\n"
    text = script(folder, settings, odd)
    assert bash(text, '"${arguments[@]}"') == ["--ranks", "1", "--config", "run.yaml", odd]
    assert bash(text, '"${agent[@]}"') == [sys.executable, "-u", "-m", "megavar.launch.node"]
    assert bash(text, '"$GREETING" "$LATER" "$run"') == ["a $b \"c\" 'd'", "a $b \"c\" 'd'!", str(folder / "runs/a")]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_container_gets_the_working_directory_the_runs_and_the_mounts(folder):
    settings = f"{NODES}container_image: image.sqsh\ncontainer_mounts: [/data:/data]\npython: /opt/venv/bin/python\n"
    text = script(folder, settings)
    assert bash(text, '"${container[@]}"') == [
        "--container-image=image.sqsh",
        f"--container-mounts={folder}:{folder},{folder}/runs:{folder}/runs,/data:/data",
        f"--container-workdir={folder}",
    ]
    assert bash(text, '"${agent[0]}"') == ["/opt/venv/bin/python"]


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ("nodez: 2\n", (), "odd.yaml: nodez: Key 'nodez' not in 'SlurmSettings'"),
        ("nodes: two\n", (), "odd.yaml: nodes: Value 'two' of type 'str' could not be converted to Integer"),
        (NODES, ("--nodes", "3"), "nodes=3 x 1 ranks = 3 ranks do not fit the parallel layout: tensor 2 x pipeline 1"),
        (NODES, ("--nodes", "0"), "nodes=0 is too small; the least is 1."),
        ("gpus_per_node: 0\n", (), "gpus_per_node=0 and ranks_per_node=None leave no rank on a node; set one of them."),
        ("gpus_per_node: 2\nranks_per_node: 4\n", (), "ranks_per_node=4 is more than gpus_per_node=2; each rank needs"),
        (f"{NODES}python: none/python\n", (), "python=none/python is not an executable; set python to the interpreter"),
        (f"{NODES}python: /usr/bin/env\n", (), "python=/usr/bin/env cannot import megavar; set python to the"),
        (f"{NODES}time: 4:00:00\n", (), "time='14400' is not [DAYS-]HOURS:MINUTES:SECONDS; in a file it needs"),
        (f"{NODES}environment: {{A-B: x}}\n", (), "environment has 'A-B', which is not the name of a variable."),
        (f"{NODES}sbatch: [qos]\n", (), "sbatch='qos' is not an option of one line, such as --qos=low."),
        (NODES, ("rollout.mode=managed", "rollout.urls=[]"), "rollout.python=.venv-sglang/bin/python is not an exec"),
        (f"{NODES}", ("model=none",), "none has no config.json; give a Hugging Face model folder."),
        (NODES, (), "sbatch is not on PATH; use a login node of the cluster."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_left_to_submit(folder, settings, arguments, message):
    (folder / "odd.yaml").write_text(settings)
    done = launch(folder, "--executor", "odd.yaml", *arguments)
    assert done.returncode == 2
    assert done.stdout.startswith(f"error: {message}") and done.stdout.count("\n") == 1
    assert not (folder / "runs" / "a" / "launch" / "job_id").exists()


def test_an_unknown_executor_names_those_that_there_are(folder):
    (folder / "conf" / "launch").mkdir(parents=True)
    (folder / "conf" / "launch" / "big.yaml").write_text(NODES)
    done = launch(folder, "--executor", "bigg")
    assert (done.returncode, done.stdout) == (
        2,
        "error: --executor bigg: there is no conf/launch/bigg.yaml; use one of local, big, or give a YAML file.\n",
    )
    assert launch(folder, "--executor", "big", "--dry-run").returncode == 0


def test_local_is_the_default_and_its_error_is_the_last_line(folder):
    done = launch(folder, "--dry-run")
    assert done.stdout == "torchrun --standalone --nproc-per-node 2 -m megavar run --config run.yaml\n"
    done = launch(folder, "--nodes", "2")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1) and done.stdout.startswith("error: --nodes is for a")
    done = launch(folder, "parallel.tensor=3")
    assert done.returncode == 2 and done.stdout.startswith("error: parallel.tensor=3 does not divide ")


def test_a_run_that_was_never_submitted_has_no_job(folder):
    look = [sys.executable, "-m", "megavar", "launch"]
    for action in ("status", "cancel"):
        done = subprocess.run([*look, action, "runs/a"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout.startswith("error: runs/a has no job: there is no ")


def test_the_example_is_sound(folder):
    settings = load_settings(SlurmSettings, ROOT / "examples" / "slurm" / "slurm.yaml")
    assert settings.num_ranks == 16 and settings.time == SlurmSettings().time
