"""Jobs of a run: submit one to Slurm, ask how one is, follow it, cancel it."""

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from megavar.disk import atomic_write, make_folder
from megavar.ranks import ExplainedFailure
from megavar.runs.owner import refuse_owned

POLL_SECONDS = 2.0
SILENT_SECONDS = 600.0
"""For a Slurm that does not answer, before following a job is given up."""
OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
"""States in which a job has ended and is not requeued."""


@dataclass(frozen=True)
class JobState:
    """What Slurm, or NeMo-Run of a job elsewhere, says of a job."""

    job: str
    name: str
    """A word for the state, such as RUNNING."""
    details: str
    """Why it waits, or where it runs."""
    exit_code: int
    """As a shell has it; of a job that did not complete it is never 0."""

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.name in OVER

    def __str__(self) -> str:
        code = f", exit code {self.exit_code}" if self.is_over else ""
        return f"job {self.job} {self.name}{self.details}{code}"


def submit(script: str, folder: Path) -> str:
    """Write the script into the folder of a run and submit it; returns the job's id.

    Raises:
        ValueError: if Slurm refuses it.
    """
    file = script_of(folder)
    make_folder(file.parent)
    with atomic_write(file) as temporary:
        temporary.write_text(script)
    done = _slurm("sbatch", "--parsable", str(file))
    if done.returncode:
        raise ValueError(f"sbatch refused the job: {reason(done.stderr)}.")
    return done.stdout.strip().split(";")[0]


def remember(job: str, folder: Path) -> None:
    """Note the newest job of a run, for `job_of`."""
    make_folder(folder / "launch")
    with atomic_write(_job_file(folder)) as temporary:
        temporary.write_text(f"{job}\n")


def refuse_second(folder: Path) -> None:
    """Look whether the run is free for a new job.

    Raises:
        ValueError: if a job of this run is waiting or running, or a process somewhere writes its folder.
    """
    job = job_of(folder)
    state = None if job is None else _find_state(job, folder)
    if state is not None and not state.is_over:
        raise ValueError(f"{folder}: {state} already; wait for it, or end it with `megavar launch cancel {folder}`.")
    refuse_owned(folder)


def script_of(folder: Path) -> Path:
    """Where the script of a run's job is."""
    return folder / "launch" / "job.sh"


def job_of(folder: Path) -> str | None:
    """The newest job of a run, if there is one: Slurm's id, which the script writes, too, when it starts, or the
    folder of NeMo-Run's experiment.
    """
    file = _job_file(folder)
    return file.read_text().strip() if file.is_file() else None


def is_slurm(job: str) -> bool:
    """Whether it is Slurm's id of a job."""
    return job.isdigit()


def _job_file(folder: Path) -> Path:
    return folder / "launch" / "job_id"


def require_job(folder: Path) -> str:
    """Id of the newest job of a run.

    Raises:
        ValueError: if there is none.
    """
    job = job_of(folder)
    if job is None:
        raise ValueError(f"{folder} has no job: there is no {_job_file(folder)}; give the folder of a launched run.")
    return job


def state_of(job: str, folder: Path) -> JobState:
    """Ask for the state of a run's job: Slurm's controller, or where that has forgotten it, the accounting.

    Raises:
        ExplainedFailure: if neither knows.
    """
    state = _find_state(job, folder)
    if state is None:
        raise ExplainedFailure(f"Slurm does not know job {job} any more, so how it ended cannot be said.")
    return state


def _find_state(job: str, folder: Path) -> JobState | None:
    """None if Slurm has forgotten the job.

    Raises:
        ExplainedFailure: if Slurm does not answer.
    """
    if not is_slurm(job):
        from megavar.launch import nemo

        return nemo.state_of(job, folder)
    shown = _slurm("scontrol", "--oneliner", "show", "job", job)
    if shown.returncode == 0:
        values = dict(re.findall(r"(?:^| )(\w+)=(\S*)", shown.stdout))
        why, nodes = values.get("Reason", "None"), values.get("NodeList", "")
        details = f" ({why})" if why not in ("None", "") else f" on {nodes}" if nodes not in ("", "(null)") else ""
        restarts = values.get("Restarts", "0")
        details += f", restart {restarts}" if restarts != "0" else ""
        return _state(job, values["JobState"], details, values["ExitCode"])
    if "Invalid job id" not in shown.stderr:
        raise ExplainedFailure(f"Slurm does not answer: {reason(shown.stderr)}.")
    kept = _slurm(
        *("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"),  # a row for each start
        *("--jobs", job, "--format=State,ExitCode"),
    )
    if kept.returncode or not kept.stdout.strip():
        return None
    *earlier, last = kept.stdout.splitlines()
    name, code = last.split("|")
    details = f", restart {len(earlier)}" if earlier else ""
    return _state(job, name.split()[0], details, code)  # without "by USER" of a cancelled one


def _state(job: str, name: str, details: str, exit_code: str) -> JobState:
    code, _, number = exit_code.partition(":")
    shells = 128 + int(number) if int(number or 0) else int(code)
    return JobState(job, name, details, 0 if name == "COMPLETED" else shells or 1)


def cancel(job: str, folder: Path) -> None:
    """Ask Slurm, or NeMo-Run, to end a run's job.

    Raises:
        ValueError: if the job has ended.
    """
    state = state_of(job, folder)
    if state.is_over:
        raise ValueError(f"{state}: there is nothing to cancel.")
    if not is_slurm(job):
        from megavar.launch import nemo

        return nemo.cancel(job)
    done = _slurm("scancel", job)
    if done.returncode:
        raise ExplainedFailure(f"scancel failed: {reason(done.stderr)}.")


def follow(job: str, folder: Path) -> JobState:
    """Print rank 0's log and the job's states until the job is over; returns its last state.

    Raises:
        ExplainedFailure: if Slurm does not answer for long, or knows the job no more.
    """
    said, log, position, heard_at = "", None, 0, time.monotonic()
    while True:
        try:
            state = state_of(job, folder)
            heard_at = time.monotonic()
        except ExplainedFailure:
            if time.monotonic() - heard_at > SILENT_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        newest = rank_zero_log(folder)
        if newest != log:
            log, position = newest, 0
        if log is not None:
            with log.open("rb") as file:
                file.seek(position)
                new = file.read()
            position += len(new)
            print(new.decode(errors="replace"), end="")
        if str(state) != said:
            said = str(state)
            print(*(errors_elsewhere(folder) if state.is_over else []), said, sep="\n", flush=True)
        if state.is_over:
            return state
        time.sleep(POLL_SECONDS)


def rank_zero_log(folder: Path) -> Path | None:
    """The newest attempt's log of the node with rank 0, if it has begun."""
    log = folder / "logs" / "latest" / "node_0.log"
    return log.resolve() if log.is_file() else None


def errors_elsewhere(folder: Path) -> list[str]:
    """What the script and the other nodes than rank 0's reported in the newest attempt, a line each with its file."""
    return [
        f"{log.name}: {line}"
        for log in sorted((folder / "logs" / "latest").glob("*.log"))
        if log.name != "node_0.log"
        for line in log.read_text(errors="replace").splitlines()
        if line.startswith("error: ")
    ]


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not on PATH; use a login node of the cluster.") from error


def reason(stderr: str) -> str:
    """What a command of Slurm printed, as one line."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line).strip(" .") for line in stderr.splitlines()]
    return "; ".join(line for line in lines if line) or "it does not say why"
