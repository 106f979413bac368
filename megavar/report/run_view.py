"""Read-only view of a run folder: its configuration, last complete round and evaluated models.

Writes nothing and needs no torch. Which outputs a report needs is defined here only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavar.config.load import load_config
from megavar.config.schema import RunConfig
from megavar.data.questions import read_questions
from megavar.evaluation.results import Results, read_results
from megavar.record_files import read_records
from megavar.records import Answer, Question, Record, Score, Trace, Weight
from megavar.report.suites import FILE
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics
from megavar.runs.plan import stages_of

_ROUND_RECORDS = ("traces", "verified", "scores", "weights")


@dataclass(frozen=True)
class Round:
    """The records of one round, sorted by identity."""

    folder: Path
    questions: list[Question]
    traces: list[Trace]
    answers: list[Answer]
    scores: list[Score]
    weights: list[Weight]


@dataclass(frozen=True)
class RunView:
    """Read-only view of a run folder."""

    folder: Path
    config: RunConfig

    @property
    def run(self) -> Run:
        """The run in its last round with weights, at its current path (it may have been moved)."""
        config = replace(self.config, runs_dir=str(self.folder.parent), name=self.folder.name)
        return Run(config, round_index=max(1, len(self.rounds())))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        return Metrics.read(self.folder)

    @property
    def stages(self) -> list[str]:
        """Stages of all rounds, in order, as named in the manifest."""
        return [run.entry(stage.name) for stage, run in stages_of(self.config)]

    def unfinished(self) -> list[str]:
        """Stages that are not finished, in order."""
        entries = Manifest(self.folder).entries()
        return [name for name in self.stages if entries.get(name, {}).get("status") != "finished"]

    def evaluated(self) -> dict[str, list[Answer]]:
        """Model -> verified answers to the held-out questions, for every evaluated policy; pi_0 first."""
        files = {file.parents[1].name: file for file in self.folder.glob("eval/*/verified/data.parquet")}
        order = sorted(files, key=lambda name: (len(name), name))
        return {name: read_records(files[name], Answer) for name in order}

    def suites(self) -> Results | None:
        """Results of the evaluated policies on data.eval and eval.suites; None before the first evaluation."""
        file = self.folder / "eval" / FILE
        return read_results(file) if file.exists() else None

    def eval_questions(self) -> list[Question]:
        """The held-out questions, from `data.eval`.

        Raises:
            ValueError: if the file was moved or changed to an invalid one.
        """
        assert self.config.data.eval is not None, "a model was evaluated without data.eval"
        return _questions(self.config.data.eval, "data.eval")

    def rounds(self) -> list[Path]:
        """Folders of the rounds that finished `weigh`, in order."""
        entries = Manifest(self.folder).entries()
        folders = []
        for index, folder in enumerate(sorted(self.folder.glob("round_*")), start=1):
            finished = entries.get(Run(self.config, index).entry("weigh"), {}).get("status") == "finished"
            if finished and all((folder / name / "data.parquet").is_file() for name in _ROUND_RECORDS):
                folders.append(folder)
        return folders

    def round_folder(self) -> Path:
        """Folder of the last round that finished `weigh`.

        Raises:
            ValueError: if there is none, naming the first unfinished stage.
        """
        folders = self.rounds()
        if folders:
            return folders[-1]
        for stage in self.stages[: self.stages.index("weigh") + 1]:
            Manifest(self.folder).digest(stage)
        raise ValueError(
            f"{self.folder}: all stages up to weigh are finished, but no round_* folder contains "
            f"{', '.join(_ROUND_RECORDS)}; restore the files, or remove the stages' entries from manifest.json and "
            "rerun them."
        )

    def last_round(self) -> Round:
        """Read the records of the last round that finished `weigh`.

        Raises:
            ValueError: if there is none, or the question file was moved.
        """
        folder = self.round_folder()

        def read(name: str, record_type: type[Record]) -> list[Record]:
            return read_records(folder / name / "data.parquet", record_type)

        return Round(
            folder,
            self.run.take_questions(_questions(self.config.data.train, "data.train")),
            read("traces", Trace),
            read("verified", Answer),
            read("scores", Score),
            read("weights", Weight),
        )


def open_run(folder: Path) -> RunView:
    """Open a run folder.

    Raises:
        ValueError: if it has no config.yaml.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml; give a folder such as runs/demo.")
    return RunView(folder.resolve(), load_config(folder / "config.yaml", []))


def labels(runs: Sequence[RunView]) -> dict[str, RunView]:
    """Runs by their label in figures: the folder's name, or its path if several runs have that name."""
    names = Counter(run.folder.name for run in {run.folder: run for run in runs}.values())
    return {run.folder.name if names[run.folder.name] == 1 else str(run.folder): run for run in runs}


def _questions(file: str, key: str) -> list[Question]:
    try:
        return read_questions(Path(file))
    except ValueError as error:
        raise ValueError(f"{key}: {error} Relative paths start at the folder the run was started in.") from error
