"""A run through NeMo-Run: executors that functions of a file return, and what became of their jobs.

The only importer of nemo_run. Its SlurmExecutor gets the rule of our own script for time limits, preemptions and
failures; other executors run one node, without that rule.
"""

import importlib.util
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from megavar.config.schema import RunConfig
from megavar.disk import make_folder
from megavar.launch.jobs import JobState, reason, remember
from megavar.launch.slurm import SlurmSettings, start_and_end
from megavar.ranks import ExplainedFailure
from megavar.rollout.sglang_servers import visible_gpus
from megavar.runs.folder import Run

HOME = "NEMORUN_HOME"
_OVER = {"SUCCEEDED": "COMPLETED", "FAILED": "FAILED", "CANCELLED": "CANCELLED"}
"""NeMo-Run's words for an ended job, in Slurm's."""


def executors_file(given: Path | None) -> Path:
    """The file whose functions `--executor` names: the given one, else executors.py in NeMo-Run's home."""
    return given or Path(os.environ.get(HOME, "~/.nemo_run")).expanduser() / "executors.py"


def load_executor(file: Path, name: str, arguments: dict[str, Any], folder: Path) -> Any:
    """Call a function of a file, which returns a NeMo-Run executor.

    Args:
        arguments: what the command line says instead of the function's own defaults.
        folder: of the run; NeMo-Run keeps its files in launch/nemo of it, unless NEMORUN_HOME says otherwise.

    Raises:
        ValueError: for whatever is wrong with the file, the function or what it returns.
    """
    run = _nemo_run(_home(folder))
    if not file.is_file():
        raise ValueError(f"--executor {name}: there is no {file}; name a file of executors with --executors FILE.")
    functions = {key: value for key, value in vars(_load(file)).items() if callable(value) and key[0] != "_"}
    if name not in functions:
        raise ValueError(f"--executor {name}: {file} has no such function; it has {', '.join(functions) or 'none'}.")
    try:
        executor = functions[name](**arguments)
    except Exception as error:
        raise ValueError(f"{file}: {name}({_listed(arguments)}): {_line(error)}") from error
    if not isinstance(executor, run.Executor):
        raise ValueError(f"{file}: {name} returned {executor!r:.100}, which is not an executor of NeMo-Run.")
    _check(run, executor, f"{file}: {name}")
    return executor


def _home(folder: Path) -> Path:
    return Path(os.environ.get(HOME, folder / "launch" / "nemo")).expanduser().absolute()


def _nemo_run(home: Path) -> Any:
    os.environ[HOME] = str(home)  # read when it is imported
    try:
        import nemo_run
    except ImportError as error:
        raise ValueError(
            f"NeMo-Run cannot be imported ({error}); install it with `make nemo`, and use .venv-nemo/bin/python."
        ) from error
    return nemo_run


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("megavar_executors", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be executed: {_line(error)}") from error
    return module


def _listed(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def _line(error: Exception) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _check(run: Any, executor: Any, source: str) -> None:
    if executor.retries:
        raise ValueError(
            f"{source}: retries={executor.retries} would start a job again after any exit code; leave it out, "
            "--max-requeues bounds the restarts of a job that was stopped or made progress."
        )
    if executor.launcher is not None:
        raise ValueError(f"{source}: launcher={executor.launcher!r:.100}: megavar starts the ranks; leave it out.")
    if isinstance(executor, run.SlurmExecutor):
        if not isinstance(executor.tunnel, run.LocalTunnel):
            raise ValueError(
                f"{source}: its tunnel leads to another machine; submit on a login node, by a LocalTunnel."
            )
        if executor.heterogeneous or executor.array is not None:
            raise ValueError(f"{source}: heterogeneous jobs and arrays are not for one run; leave them out.")
    elif executor.nnodes() != 1:
        raise ValueError(
            f"{source}: a {type(executor).__name__} runs one node here, not {executor.nnodes()}; "
            "several nodes need a SlurmExecutor."
        )


def is_slurm(executor: Any) -> bool:
    """Whether the executor's job is one of Slurm."""
    import nemo_run

    return isinstance(executor, nemo_run.SlurmExecutor)


def _is_local(executor: Any) -> bool:
    import nemo_run

    return isinstance(executor, nemo_run.LocalExecutor)


def settings_of(executor: Any) -> SlurmSettings:
    """What an executor says of nodes, ranks, GPUs and containers, for `check_job`."""
    is_local = _is_local(executor)
    gpus = len(visible_gpus()) if is_local else getattr(executor, "gpus_per_node", None)
    image = getattr(executor, "container_image", None)
    elsewhere = None if is_local or is_slurm(executor) else type(executor).__name__
    return SlurmSettings(
        nodes=executor.nnodes(),
        gpus_per_node=gpus or 0,
        ranks_per_node=executor.nproc_per_node(),
        container_image=image or elsewhere,
    )


def prepare(executor: Any, config: RunConfig, max_requeues: int, config_file: Path, overrides: Sequence[str]) -> str:
    """Complete the executor; returns the lines of bash that its job runs on every node."""
    settings, folder = settings_of(executor), Run(config).folder.absolute()
    python = sys.executable if settings.container_image is None else "python"
    agent = [python, "-u", "-m", "megavar.launch.node", "--ranks", str(settings.num_ranks_per_node)]
    command = shlex.join([*agent, "--config", str(config_file), *overrides])
    if not is_slurm(executor):
        code_file = shlex.quote(str(_code_file(folder)))
        return f"{command}\ncode=$?\necho $code 2>/dev/null >{code_file}\nexit $code\n"
    import nemo_run

    executor.packager = nemo_run.Packager()  # the code is in the environment
    executor.poll_estimated_start_time = False
    executor.torchrun_nproc_per_node = settings.num_ranks_per_node
    if executor.cpus_per_task is not None:
        executor.cpus_per_task *= executor.ntasks_per_node
    executor.ntasks_per_node = 1  # an agent, which starts the ranks
    executor.signal = executor.signal or f"TERM@{SlurmSettings.warn_seconds}"
    here = Path.cwd()
    if executor.container_image is not None:
        executor.container_mounts = [
            *executor.container_mounts, f"{here}:{here}", f"{folder.parent}:{folder.parent}"
        ]  # fmt: skip
    start = start_and_end(folder, max_requeues)
    lines = [
        executor.setup_lines or "",
        "{ set +xv; } 2>/dev/null",
        start,
        "export logs",
        "trap 'code=$?; set +e; end $code' EXIT",
    ]
    executor.setup_lines = "\n".join(lines)
    # exec: with a shell between, process tracking by cgroups kills the ranks before they have saved.
    return f'cd {shlex.quote(str(here))}\nexec {command} --logs "$logs" >>"$logs/node_$SLURM_NODEID.log" 2>&1\n'


def render(executor: Any, config: RunConfig, script: str) -> str:
    """What NeMo-Run would hand to Slurm, and what its job runs on every node; other executors only have the latter."""
    with tempfile.TemporaryDirectory() as folder:
        with _experiment_of(executor, config, script, base_dir=folder) as experiment:
            experiment.dryrun(log=False, delete_exp_dir=False)
        rendered = [file.read_text() for file in Path(folder).rglob("*_sbatch.sh")]
    return "\n".join([*rendered, f"# on every node\n{script}"])


def submit(executor: Any, config: RunConfig, script: str, wait: bool) -> str:
    """Hand the job to NeMo-Run; returns Slurm's id of it, or for other executors the folder of NeMo-Run's experiment.

    Args:
        wait: print the log until the job has ended, if it is not one of Slurm; a job of this machine is always
            waited for.

    Raises:
        ValueError: if Slurm refuses the job.
    """
    folder, slurm = Run(config).folder.absolute(), is_slurm(executor)
    make_folder(folder / "launch")
    _code_file(folder).unlink(missing_ok=True)
    with _experiment_of(executor, config, script) as experiment:
        if not slurm and not _is_local(executor):  # a job of this machine ends with this process
            remember(experiment._exp_dir, folder)
        try:
            experiment.run(detach=slurm or not wait, tail_logs=not slurm)
        except Exception as error:
            if slurm and hasattr(error, "result"):  # of a command that failed
                raise ValueError(f"sbatch refused the job: {reason(error.result.stderr)}.") from error
            raise
    if not slurm:
        return str(experiment._exp_dir)
    (shown,) = experiment.status(return_dict=True).values()
    return str(shown["job_id"])


@contextmanager
def _experiment_of(executor: Any, config: RunConfig, script: str, **options: Any) -> Iterator[Any]:
    import nemo_run

    quiet = {"log_level": "ERROR", "clean_mode": True, "skip_status_at_exit": True, "enable_goodbye_message": False}
    with nemo_run.Experiment(config.name, **quiet, **options) as experiment:
        experiment.add(nemo_run.Script(inline=script), executor=executor, name=config.name)
        yield experiment


def state_of(experiment: str, folder: Path) -> JobState:
    """Ask NeMo-Run for the state of the job of an experiment, given by its folder; `folder` is the run's.

    Raises:
        ExplainedFailure: if its files are gone.
    """
    (shown,) = _experiment(experiment).status(return_dict=True).values()
    word = str(getattr(shown["status"], "name", shown["status"]))
    name = _OVER.get(word, word)
    file = _code_file(folder)
    code = int(file.read_text()) if file.is_file() else 1
    return JobState(Path(experiment).name, name, "", 0 if name == "COMPLETED" else code or 1)


def cancel(experiment: str) -> None:
    """Ask NeMo-Run to end the job of an experiment, given by its folder."""
    found = _experiment(experiment)
    for job in found.jobs:
        found.cancel(job.id)


def _experiment(folder: str) -> Any:
    path = Path(folder)
    run = _nemo_run(path.parents[2])
    if not path.is_dir():
        raise ExplainedFailure(f"NeMo-Run's files of the job are gone: there is no {path}.")
    return run.Experiment.from_id(path.name)


def _code_file(folder: Path) -> Path:
    return folder / "launch" / "exit_code"
