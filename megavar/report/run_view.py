"""Read-only view of a run folder: its configuration, last complete round and evaluated models.

Writes nothing and needs no torch. Which outputs a report needs is defined here only.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megavar.config.load import load_config
from megavar.config.schema import RunConfig
from megavar.data.questions import read_questions
from megavar.evaluation.results import Results, read_results
from megavar.record_files import RecordFile, read_records, rows
from megavar.records import Answer, Question, Record, Score, Trace, Weight
from megavar.report.suites import FILE
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics
from megavar.runs.plan import stages_of

_ROUND_RECORDS = ("traces", "verified", "scores", "weights")
Item = TypeVar("Item")
MOST_QUESTIONS = 2000
"""Of a round, whose records a report reads, however large the round is."""


@dataclass(frozen=True)
class Round:
    """Records of one round, sorted by identity: of all its weighted questions, or of `MOST_QUESTIONS`, evenly spaced.

    What no figure shows is empty: prompts of traces, token ids of answers, log-probs of traces.
    """

    folder: Path
    num_weighted: int
    """Questions that have weights, whether their records are here or not."""
    questions: list[Question]
    """All questions of the round."""
    traces: list[Trace]
    answers: list[Answer]
    scores: list[Score]
    weights: list[Weight]
    rollouts: list[Trace]
    """The policy's own traces of these questions, and their weights for q; none unless q learnt from them."""
    rollout_weights: list[Weight]


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

        def file(name: str, record_type: type[Record], *left_out: str) -> RecordFile[Record]:
            columns = [item.name for item in fields(record_type) if item.name not in left_out]
            return RecordFile(folder / name / "data.parquet", record_type, columns)

        weighted = _weighted_questions(folder / "weights" / "data.parquet")
        chosen = spread(weighted, MOST_QUESTIONS)

        def read(records: RecordFile[Record]) -> list[Record]:
            return list(_of_questions(records, chosen))

        return Round(
            folder,
            len(weighted),
            self.run.take_questions(_questions(self.config.data.train, "data.train")),
            read(file("traces", Trace, "prompt_ids", "logp_engine")),
            read(file("verified", Answer, "answer_ids")),
            read(file("scores", Score, "logp_policy", "logp_posterior")),
            read(file("weights", Weight)),
            *(
                (read(file("rollouts/traces", Trace, "prompt_ids")), read(file("rollouts/weights", Weight)))
                if (folder / "rollouts" / "weights" / "data.parquet").is_file()
                else ([], [])
            ),
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


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """All items if there are at most that many, else that many, evenly spaced from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]


def _weighted_questions(file: Path) -> list[str]:
    """Ids of the questions in a file of weights, in its order."""
    ids: dict[str, None] = {}
    for table in RecordFile(file, Weight, ["question_id"]).tables():
        ids.update(dict.fromkeys(table["question_id"].to_pylist()))
    return list(ids)


def _of_questions(file: RecordFile[Record], question_ids: Sequence[str]) -> Iterator[Record]:
    """The records of these questions."""
    wanted = pa.array(question_ids, pa.string())
    for table in file.tables():
        yield from rows(table.filter(pc.is_in(table["question_id"], wanted)), file.record_type, file.file)


def _questions(file: str, key: str) -> list[Question]:
    try:
        return read_questions(Path(file))
    except ValueError as error:
        raise ValueError(f"{key}: {error} Relative paths start at the folder the run was started in.") from error
