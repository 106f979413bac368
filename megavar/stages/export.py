"""Writes the round's policy as a Hugging Face folder."""

import os
from pathlib import Path

from megavar.checkpoints.convert import MAX_SHARD_BYTES, to_hugging_face
from megavar.checkpoints.megatron import SIDE_FILES
from megavar.data.decode import end_token
from megavar.progress import ProgressLine, in_megabytes
from megavar.ranks import on_rank_zero
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stopping import stop_if_requested


def execute(run: Run, service: RolloutService) -> None:
    """Export the round's policy; the run's symlink `hf` then points to it, unless a later round has one already."""
    export_newest(run.policy, run.policy / "hf")
    on_rank_zero(lambda: conclude(run))


def conclude(run: Run) -> None:
    """Have the run's symlink point to the exported policy; rank 0 only."""
    if not Run(run.config, run.round_index + 1).policy.exists():
        point_to(run.final, run.policy / "hf")


def export_newest(folder: Path, target: Path) -> None:
    """Write the newest checkpoint of `folder` as the Hugging Face folder `target`; rank 0 does. Every rank calls it.

    Raises:
        ValueError: if there is no checkpoint.
    """
    checkpoints = sorted((folder / "checkpoints").glob("step_*"))
    if not checkpoints:
        raise ValueError(f"{folder}/checkpoints holds no checkpoint; run the training stage first.")

    def convert() -> None:
        with ProgressLine("export") as line:
            show = in_megabytes(line)

            def advance(num_bytes: int, total_bytes: int) -> None:
                stop_if_requested("the checkpoint is complete, its export is made anew")
                show(num_bytes, total_bytes)

            token = end_token(checkpoints[-1] / SIDE_FILES)
            to_hugging_face(checkpoints[-1], target, None, MAX_SHARD_BYTES, True, advance, token)

    on_rank_zero(convert)


def point_to(link: Path, target: Path) -> None:
    """Atomically create or replace the symlink `link`, pointing to `target` in the same folder or below it.

    Raises:
        ValueError: if `link` is a folder.
    """
    if link.is_dir() and not link.is_symlink():
        raise ValueError(f"{link} is a folder, and should become a symlink to {target}; move it away.")
    aside = link.with_name(f".{link.name}.link")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.relative_to(link.parent))
    os.replace(aside, link)
