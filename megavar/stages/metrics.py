"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases by configuration; rank 0 only."""

import json
import time
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megavar.config.schema import LoggingConfig
from megavar.records import write_aside


class Metrics:
    """Appends rows {stage, step, time, ...values}; steps that a restart repeats replace what was written."""

    def __init__(self, folder: Path, config: LoggingConfig, run_name: str) -> None:
        self.file = folder / "metrics.jsonl"
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard")
        if config.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project, name=run_name, id=run_name, dir=str(folder), resume="allow"
            )

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """All rows of a run; a last line that a kill cut short is left out."""
        file = folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def drop_from(self, stage: str, step: int) -> None:
        """Forget a stage's rows at and after `step`, which is about to be done again."""
        rows = [row for row in self.read(self.file.parent) if row["stage"] != stage or row["step"] < step]
        with write_aside(self.file) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Write one row."""
        with self.file.open("a") as lines:
            lines.write(json.dumps({"stage": stage, "step": step, "time": time.time(), **values}) + "\n")
        named = {f"{stage}/{key}": value for key, value in values.items()}
        if self._tensorboard:
            for key, value in named.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log({**named, f"{stage}/step": step})

    def close(self) -> None:
        """Flush what is buffered."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class TrainingProgress:
    """One line: stage, bar, steps, loss, tokens/s, elapsed and remaining time."""

    def __init__(self, stage: str) -> None:
        columns = [TextColumn(stage), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}")]
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), refresh_per_second=2)
        self._task = self._bar.add_task(stage, total=None, state="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, num_steps: int, values: dict[str, float]) -> None:
        """Show a finished step."""
        state = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tok/s"
        self._bar.update(self._task, completed=step, total=num_steps, state=state)


class ByteProgress:
    """One line: what is written, bar, bytes, rate, elapsed and remaining time."""

    def __init__(self, description: str) -> None:
        columns = [TextColumn(description), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), refresh_per_second=2)
        self._task = self._bar.add_task(description, total=None)

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, num_bytes: int, total_bytes: int) -> None:
        """Show that more bytes are done; the line appears with the first."""
        self._bar.start()
        self._bar.update(self._task, advance=num_bytes, total=total_bytes)
