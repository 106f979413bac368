"""One training stage: sequences in, checkpoints and metrics out, and the result as a Hugging Face folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from megavar.config.schema import RunConfig, TrainConfig
from megavar.models.convert import MAX_SHARD_BYTES, to_hugging_face
from megavar.progress import ProgressLine, in_megabytes
from megavar.records import TrainSequence
from megavar.stages.metrics import Metrics
from megavar.training.checkpoint import list_checkpoints, step_of
from megavar.training.loop import num_training_steps, train_model
from megavar.training.parallel import is_rank_zero, on_rank_zero


def train_stage(
    stage: str,
    init: Path,
    sequences: Sequence[TrainSequence],
    train: TrainConfig,
    config: RunConfig,
    folder: Path,
    run_folder: Path,
) -> None:
    """Train from the Hugging Face folder `init`; checkpoints go to `folder`/checkpoints. Every rank calls it."""
    checkpoints = folder / "checkpoints"

    def run(progress: ProgressLine | None, metrics: Metrics | None) -> None:
        def report(step: int, num_steps: int, values: dict[str, float]) -> None:
            if metrics and (step % train.log_interval == 0 or step == num_steps):
                metrics.log(stage, step, values)
            if progress:
                speed = f"{values['tokens_per_second']:,.0f} tokens/s"
                progress.update(step, num_steps, f"steps, loss {values['loss']:.4f}, {speed}")

        train_model(init, sequences, train, config.parallel, config.precision, config.seed, checkpoints, report)

    if not is_rank_zero():
        run(None, None)
        return
    done = list_checkpoints(checkpoints)
    steps_before = step_of(done[-1]) if done else 0
    metrics = Metrics(run_folder, config.logging, config.name)
    metrics.drop(stage, range(steps_before + 1, num_training_steps(len(sequences), train) + 1))
    with ProgressLine(stage, steps_before) as progress:
        run(progress, metrics)
    metrics.close()


def export_stage(folder: Path, target: Path) -> None:
    """Write the newest checkpoint of `folder` as the Hugging Face folder `target`; rank 0 does. Every rank calls it.

    Raises:
        ValueError: if there is no checkpoint.
    """
    done = list_checkpoints(folder / "checkpoints")
    if not done:
        raise ValueError(f"{folder}/checkpoints holds no checkpoint; run the training stage first.")

    def convert() -> None:
        with ProgressLine("export") as line:
            to_hugging_face(done[-1], target, None, MAX_SHARD_BYTES, overwrite=True, progress=in_megabytes(line))

    on_rank_zero(convert)


def link(place: Path, folder: Path) -> None:
    """Make `place` lead to `folder` beside or below it, whatever it led to before, at once.

    Raises:
        ValueError: if there is a folder at `place`.
    """
    if place.is_dir() and not place.is_symlink():
        raise ValueError(f"{place} is a folder of its own, and should become a link to {folder}; move it away.")
    aside = place.with_name(f".{place.name}.link")
    aside.unlink(missing_ok=True)
    aside.symlink_to(folder.relative_to(place.parent))
    os.replace(aside, place)
