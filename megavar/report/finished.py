"""Read-only view of a run's folder: its settings, its last complete round, its evaluated models.

Nothing here needs torch, and nothing is written. Which stages a figure needs is decided here, once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavar.config.load import load_config
from megavar.config.schema import RunConfig
from megavar.data.questions import read_questions
from megavar.records import Answer, Question, Record, Score, Trace, Weight, read_records
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics
from megavar.runs.plan import stages_of

_ROUND_RECORDS = ("traces", "verified", "scores", "weights")


@dataclass(frozen=True)
class Round:
    """The records of one round, in the order of their identities."""

    folder: Path
    questions: list[Question]
    traces: list[Trace]
    answers: list[Answer]
    scores: list[Score]
    weights: list[Weight]


@dataclass(frozen=True)
class FinishedRun:
    """Read-only view of a run's folder."""

    folder: Path
    config: RunConfig

    @property
    def run(self) -> Run:
        """The run in its last round with weights; it is where it lies now, not where it was made."""
        config = replace(self.config, runs_dir=str(self.folder.parent), name=self.folder.name)
        return Run(config, round_index=max(1, len(self.rounds())))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return Metrics.read(self.folder)

    @property
    def stages(self) -> list[str]:
        """The run's stages of all rounds, in order."""
        return [run.entry(stage.name) for stage, run in stages_of(self.config)]

    def unfinished(self) -> list[str]:
        """Those that are not finished."""
        entries = Manifest(self.folder).entries()
        return [name for name in self.stages if entries.get(name, {}).get("status") != "finished"]

    def evaluated(self) -> dict[str, list[Answer]]:
        """The verified answers of every evaluated policy, pi_0 first."""
        files = {file.parents[1].name: file for file in self.folder.glob("eval/*/verified/data.parquet")}
        order = sorted(files, key=lambda name: (len(name), name))
        return {name: read_records(files[name], Answer) for name in order}

    def eval_questions(self) -> list[Question]:
        """The held-out questions; they must lie where the run found them."""
        assert self.config.data.eval is not None, "a model was evaluated without data.eval"
        return _questions(self.config.data.eval, "data.eval")

    def rounds(self) -> list[Path]:
        """The folders of the rounds whose traces have weights, in order."""
        entries = Manifest(self.folder).entries()
        found = []
        for index, folder in enumerate(sorted(self.folder.glob("round_*")), start=1):
            weighed = entries.get(Run(self.config, index).entry("weigh"), {}).get("status") == "finished"
            if weighed and all((folder / name / "data.parquet").is_file() for name in _ROUND_RECORDS):
                found.append(folder)
        return found

    def round_folder(self) -> Path:
        """The last round with weights.

        Raises:
            ValueError: naming the first stage that is missing.
        """
        found = self.rounds()
        if found:
            return found[-1]
        for stage in self.stages[: self.stages.index("weigh") + 1]:
            Manifest(self.folder).digest(stage)
        raise ValueError(
            f"{self.folder}: every stage up to weigh is finished, but no round_* folder holds "
            f"{', '.join(_ROUND_RECORDS)}; restore the files, or remove the stages' entries in manifest.json "
            "and run them again."
        )

    def last_round(self) -> Round:
        """The records of the last round with weights.

        Raises:
            ValueError: if no round has weights yet, or the questions are not where the run found them.
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


def open_run(folder: Path) -> FinishedRun:
    """Open a run's folder.

    Raises:
        ValueError: if it is not the folder of a run.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.yaml; give one such as runs/demo.")
    return FinishedRun(folder.resolve(), load_config(folder / "config.yaml", []))


def labels(runs: Sequence[FinishedRun]) -> dict[str, FinishedRun]:
    """Runs by what figures call them: the folder's name, or its path where two have the same name."""
    names = Counter(run.folder.name for run in {run.folder: run for run in runs}.values())
    return {run.folder.name if names[run.folder.name] == 1 else str(run.folder): run for run in runs}


def _questions(file: str, key: str) -> list[Question]:
    try:
        return read_questions(Path(file))
    except ValueError as error:
        raise ValueError(f"{key}: {error} A relative path is read from the folder the run was started in.") from error
