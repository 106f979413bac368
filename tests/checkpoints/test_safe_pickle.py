"""Nothing that a checkpoint names is run, whichever of its files names it; what real checkpoints hold is read."""

import io
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import random_sequences, save_tiny_model
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megavar.checkpoints.convert import Model, to_hugging_face, to_megatron
from megavar.checkpoints.safe_pickle import check_pickles, only_known_classes, read_metadata
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.loop import train_model


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def calls(marker: Path) -> list[Call]:
    """Ways to leave a file behind by being unpickled."""
    return [
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(getattr, Call(subprocess.Popen, ["touch", str(marker)]), "pid"),
        Call(Path.touch, marker),
        Call(torch.save, {}, str(marker)),
        Call(exec, f"open('{marker}', 'w')"),
    ]


@pytest.fixture
def checkpoint(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3", tied=False)
    to_megatron(tmp_path / "model", tmp_path / "checkpoint", None, True)
    (tmp_path / "checkpoint" / "SHA256SUMS").unlink()  # who changes files changes their checksums too
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("number", range(6))
def test_a_call_in_metadata_is_refused_by_its_name_and_not_made(checkpoint, tmp_path, number):
    marker = tmp_path / "marker"
    hostile = calls(marker)[number]
    metadata = read_metadata(checkpoint)
    for content in (hostile, [hostile], metadata):
        metadata.planner_data = hostile if content is metadata else None
        (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"\.metadata names \S+, which no checkpoint needs and which may run code"):
            Model(checkpoint)
        with pytest.raises(ValueError, match="may run code"):
            to_hugging_face(checkpoint, tmp_path / "out", None, 10**9, False)
        assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("place", ["common.pt", "byte entry"])
def test_a_call_in_what_training_reads_is_refused_and_not_made(checkpoint, tmp_path, number, place, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some clusters set it
    marker = tmp_path / "marker"
    saved = io.BytesIO()
    torch.save({"x": calls(marker)[number]}, saved)
    if place == "common.pt":
        (checkpoint / "common.pt").write_bytes(saved.getvalue())
    else:
        metadata = read_metadata(checkpoint)
        key = next(
            key for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)
        )
        stored = metadata.storage_data[MetadataIndex(key)]
        stored.relative_path, stored.offset, stored.length = "extra.distcp", 0, len(saved.getvalue())
        (checkpoint / "extra.distcp").write_bytes(saved.getvalue())
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="which no checkpoint needs and which may run code"):
        check_pickles(checkpoint)
    assert not marker.exists() and os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_megatrons_own_reader_runs_nothing_either(checkpoint, tmp_path):
    from torch.distributed.checkpoint import FileSystemReader

    marker = tmp_path / "marker"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    with only_known_classes(), pytest.raises(ValueError, match=r"posix\.system"):
        FileSystemReader(checkpoint).read_metadata()
    assert not marker.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/b", ""])
def test_a_file_outside_of_the_checkpoint_is_refused(checkpoint, path):
    metadata = read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = path
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="which is not a file in its folder"):
        Model(checkpoint)


def test_a_resumed_training_refuses_a_call_in_its_checkpoint(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3", tied=False)
    parallel.start_alone()

    def train(num_steps: int) -> None:
        train_model(
            tmp_path / "model", in_memory(random_sequences(4)), TrainConfig(num_steps=num_steps, batch_sequences=2),
            ParallelConfig(), PrecisionConfig(recipe="fp32"), 1, tmp_path / "checkpoints", lambda *_: None,
        )  # fmt: skip

    train(1)
    checkpoint, marker = tmp_path / "checkpoints" / "step_000001", tmp_path / "marker"
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=checkpoint).returncode == 0
    check_pickles(checkpoint)
    train(2)
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    whole = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    with pytest.raises(ValueError, match=r"\.metadata has another checksum"):
        train(3)
    (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"\.metadata names posix\.system"):
        train(3)
    assert not marker.exists()
    (checkpoint / ".metadata").write_bytes(whole)
    train(3)
    parallel.stop()
