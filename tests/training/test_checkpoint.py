"""What a checkpoint cannot be resumed with is refused by name, and a disk that is too small for one."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.tiny_models import random_sequences, save_tiny_model

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.ranks import ExplainedFailure
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.loop import train_model


@pytest.mark.parametrize("distributed", [True, False])
def test_the_other_kind_of_optimizer_is_refused_and_the_same_resumes(tmp_path, distributed):
    save_tiny_model(tmp_path / "model", "qwen3", tied=False)
    parallel.start_alone()
    steps = []

    def train(config: TrainConfig) -> None:
        train_model(
            tmp_path / "model", in_memory(random_sequences(4)), config, ParallelConfig(),
            PrecisionConfig(recipe="fp32"), 1,
            tmp_path / "checkpoints", lambda step, *_: steps.append(step),
        )  # fmt: skip

    first = TrainConfig(num_steps=1, batch_sequences=2, distributed_optimizer=distributed)
    train(first)
    message = rf"saved with distributed_optimizer={distributed}, now it is {not distributed}; set it back"
    with pytest.raises(ValueError, match=message):
        train(replace(first, num_steps=2, distributed_optimizer=not distributed))
    train(replace(first, num_steps=2))
    parallel.stop()
    assert steps == [1, 2]


def train_until_the_disk_is_full(folder: Path, free_bytes: int | None) -> None:
    """On each of two ranks: after the first of two checkpoints something else takes most of the disk."""
    parallel.start(ParallelConfig(tensor=2))
    rank = os.environ["RANK"]

    def fill(step: int, *_: object) -> None:
        if step == 2 and rank == "0" and free_bytes is not None:
            (folder / "disk" / "filler").write_bytes(bytes(shutil.disk_usage(folder / "disk").free - free_bytes))

    train = TrainConfig(num_steps=2, batch_sequences=2, save_interval=1, keep_checkpoints=1)
    try:
        train_model(
            folder / "model", in_memory(random_sequences(4)), train, ParallelConfig(tensor=2),
            PrecisionConfig(recipe="fp32"), 1,
            folder / "disk" / "checkpoints", fill,
        )  # fmt: skip
        message = ""
    except ExplainedFailure as error:
        message = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(message))


@pytest.mark.parametrize(
    "too_small", ["from the start", "before the second checkpoint", "within the second checkpoint"]
)
def test_a_full_disk_is_one_line_on_every_rank_and_training_goes_on_after_it(tmp_path, too_small):
    save_tiny_model(tmp_path / "model", "qwen3", tied=False)
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options, "none", disk]).returncode == 0

    if os.geteuid() or not mount("-t", "tmpfs", "-o", f"size={'100k' if too_small == 'from the start' else '20m'}"):
        pytest.skip("cannot mount a tmpfs here")
    # Known beforehand are the sizes of the tensors; the files are a little larger.
    checkpoint_bytes = 3 * Model(tmp_path / "model").num_bytes
    free = {
        "before the second checkpoint": checkpoint_bytes // 2,
        "within the second checkpoint": checkpoint_bytes + 2**17,
    }
    try:
        run_ranks(2, train_until_the_disk_is_full, tmp_path, free.get(too_small))
        messages = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
        start = (
            "a checkpoint could not be written to" if too_small.startswith("within") else f"{disk}/checkpoints needs"
        )
        assert all(message.startswith(start) and "\n" not in message for message in messages), messages
        assert all(" MB free" in message and "the same command goes on" in message for message in messages)
        found = sorted(path.name for path in (disk / "checkpoints").iterdir())
        assert found == ([] if too_small == "from the start" else ["step_000001"])
        (disk / "filler").unlink(missing_ok=True)
        assert mount("-o", "remount,size=30m")
        run_ranks(2, train_until_the_disk_is_full, tmp_path, None)
        assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["step_000002"]
    finally:
        subprocess.run(["umount", disk], check=True)
