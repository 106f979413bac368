"""One training job of a stage: sequences in, checkpoints and metrics out."""

import shutil
from pathlib import Path

from megavar.config.schema import TrainConfig
from megavar.progress import ProgressLine
from megavar.ranks import barrier, from_rank_zero, is_rank_zero
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics
from megavar.training.checkpoint import list_checkpoints, step_of
from megavar.training.hardware import release_memory
from megavar.training.loop import train_model
from megavar.training.sequence_files import Make, shared_sequences


def train_stage(
    run: Run,
    stage: str,
    init: Path,
    make_sequences: Make,
    train: TrainConfig,
    folder: Path,
) -> None:
    """Train from the Hugging Face folder `init`; checkpoints go to `folder`/checkpoints. Every rank calls it.

    Args:
        make_sequences: yields the data set some sequences at a time; called on rank 0 only, which writes it to
            `folder`/sequences for all.
    """
    name, checkpoints, config = run.entry(stage), folder / "checkpoints", run.config
    key = from_rank_zero(lambda: Manifest(run.folder).made_from(name))
    sequences = shared_sequences(folder / "sequences", key, make_sequences)

    def work(progress: ProgressLine | None, metrics: Metrics | None) -> None:
        def report(step: int, num_steps: int, values: dict[str, float]) -> None:
            if metrics and (step % train.log_interval == 0 or step == num_steps):
                metrics.log(name, step, values)
            if progress:
                speed = f"{values['tokens_per_second']:,.0f} tokens/s"
                progress.update(step, num_steps, f"steps, loss {values['loss']:.4f}, {speed}")

        train_model(init, sequences, train, config.parallel, config.precision, config.seed, checkpoints, report)
        release_memory()
        barrier()

    if not is_rank_zero():
        work(None, None)
        return
    existing = list_checkpoints(checkpoints)
    steps_before = step_of(existing[-1]) if existing else 0
    metrics = Metrics(run.folder, config.logging, config.name)
    metrics.drop(name, range(steps_before + 1, train.steps_of(len(sequences)) + 1))
    with ProgressLine(name, steps_before) as progress:
        work(progress, metrics)
    metrics.close()
    shutil.rmtree(folder / "sequences")
