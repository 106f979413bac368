"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases by configuration; rank 0 only."""

import json
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

from megavar.config.schema import LoggingConfig
from megavar.disk import atomic_write, sync


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
        """All rows of a run; what a kill truncated or a power cut tore (zeros, where a block was lost) is left out.

        Raises:
            ValueError: naming file and line, if another line before the last is not a row.
        """
        file = folder / "metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.exists() else []
        rows = []
        for number, line in enumerate(lines, start=1):
            if b"\0" in line:
                continue
            try:
                row = json.loads(line)
                if not (isinstance(row["stage"], str) and type(row["step"]) is int):
                    raise ValueError("its stage or step is of another type")
                row |= {key: float(row[key]) for key in ("time", *row) if key not in ("stage", "step")}
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{file}, line {number} is not a row of metrics ({type(error).__name__}: {error}); remove the line "
                    "(docs/troubleshooting.md#damaged-files)."
                ) from error
            rows.append(row)
        return rows

    def drop(self, stage: str, steps: Container[int]) -> None:
        """Forget a stage's rows of these steps, which are about to be done again."""
        rows = [row for row in self.read(self.file.parent) if row["stage"] != stage or row["step"] not in steps]
        with atomic_write(self.file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def log(self, stage: str, step: int, values: dict[str, float], at: float | None = None) -> None:
        """Write one row.

        Args:
            at: Unix seconds; None: now.
        """
        at = time.time() if at is None else at
        with self.file.open("a") as lines:
            lines.write(json.dumps({"stage": stage, "step": step, "time": at, **values}) + "\n")
        named = {f"{stage}/{key}": value for key, value in values.items()}
        if self._tensorboard:
            for key, value in named.items():
                self._tensorboard.add_scalar(key, value, step, at)
        if self._wandb:
            self._wandb.log({**named, f"{stage}/step": step})

    def close(self) -> None:
        """Flush what is buffered; the rows that `log` wrote are synced."""
        if self.file.exists():
            sync(self.file)
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
