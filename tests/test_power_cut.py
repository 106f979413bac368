"""What megavar calls written is there after a power cut, at whatever operation of the file system it comes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from helpers.lossy_fs import Disk, LossyFileSystem, mounted, write_image

from megavar.checkpoints.huggingface import atomic_folder
from megavar.checksums import check_checksums, write_checksums
from megavar.config.schema import LoggingConfig
from megavar.disk import atomic_write, make_folder
from megavar.record_files import RecordWriter, write_records
from megavar.record_files import rows as rows_of
from megavar.records import Answer, identity
from megavar.runs.manifest import Manifest
from megavar.runs.metrics import Metrics

LOSSES = [(0, 0), (0, 1), (1, 0), (1, 1), *[(0.7, 0.5)] * 4]
"""Of names and data: see `Disk.after_power_cut`."""


@dataclass
class Disks:
    """A mounted file system, and what was promised to be on it when."""

    mounted: LossyFileSystem
    promises: list[tuple[int, Any]] = field(default_factory=list)
    """Number of operations so far, promise."""

    @property
    def folder(self) -> Path:
        """Where it is mounted."""
        return self.mounted.folder

    def promise(self, value: Any) -> None:
        """From now on a power cut must leave this."""
        self.promises.append((len(self.mounted.operations()), value))

    def check(self, holds: Callable[[Path, Any], None]) -> None:
        """Call `holds` with a folder as each power cut leaves it, and the last promise before the cut or None."""
        operations, disk, random = self.mounted.operations(), Disk(), Random(0)
        checked = set()
        assert self.promises
        for cut, operation in enumerate(operations, start=1):
            disk.apply(operation)
            promise = next((value for when, value in reversed(self.promises) if when <= cut), None)
            for names, data in LOSSES:
                image = disk.after_power_cut(names, data, random)
                if (case := (frozenset(image.items()), promise)) in checked:
                    continue
                checked.add(case)
                with TemporaryDirectory(dir="/dev/shm") as left:  # in memory, where syncing costs nothing
                    write_image(image, Path(left))
                    try:
                        holds(Path(left), promise)
                    except BaseException as error:
                        error.add_note(f"after {cut} operations, of which the last is {operation!r:.200}")
                        error.add_note(f"kept {names} of names, {data} of data; promised: {promise!r:.200}")
                        raise


@pytest.fixture
def disks(tmp_path):
    """An empty file system that forgets what is not synced."""
    (tmp_path / "mounted").mkdir()
    try:
        with mounted(tmp_path / "mounted") as file_system:
            yield Disks(file_system)
    except OSError as error:
        pytest.skip(f"no file system of our own can be mounted here: {error}")


def answers(start: int, stop: int) -> list[Answer]:
    """Answers whose file takes several blocks."""
    ids = np.random.default_rng(start).integers(0, 2**31, 1500, np.int32)
    return [Answer("q", 0, index, 1, ids + index, f"text {index}", "stop", index) for index in range(start, stop)]


def test_what_is_not_synced_is_lost_and_what_is_synced_is_kept(disks):
    file = disks.folder / "file"
    file.write_bytes(b"a" * 10_000)
    disk = Disk(disks.mounted.operations())
    assert disk.after_power_cut(0, 1, Random(0)) == {}
    assert disk.after_power_cut(1, 0, Random(0)) == {"file": b""}
    assert disk.after_power_cut(1, 1, Random(0)) == {"file": b"a" * 10_000}
    torn = {disk.after_power_cut(1, 0.5, Random(seed))["file"] for seed in range(20)}
    assert b"a" * 4096 + bytes(4096) + b"a" * 1808 in torn
    with file.open("r+b") as content:
        os.fsync(content)
    assert Disk(disks.mounted.operations()).after_power_cut(0, 0, Random(0)) == {}
    handle = os.open(disks.folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    os.replace(file, disks.folder / "renamed")
    disk = Disk(disks.mounted.operations())
    assert disk.after_power_cut(0, 0, Random(0)) == {"file": b"a" * 10_000}
    assert disk.after_power_cut(1, 0, Random(0)) == {"renamed": b"a" * 10_000}


@pytest.mark.parametrize("forgotten", ["fsync of the file", "fsync of the folder"])
def test_an_atomic_write_without_one_of_its_syncs_is_found_out(disks, forgotten):
    temporary, file = disks.folder / "temporary", disks.folder / "file"
    temporary.write_text("content")
    for path in (temporary, disks.folder):
        if path == disks.folder:
            os.replace(temporary, file)
        if (path == temporary) != (forgotten == "fsync of the file"):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    disks.promise("content")

    def holds(folder: Path, promise: str | None) -> None:
        assert promise is None or (folder / "file").read_text() == promise

    with pytest.raises((AssertionError, FileNotFoundError)):
        disks.check(holds)


def test_records_that_were_flushed_survive_parts_and_merges(disks):
    folder = disks.folder / "run" / "round_01" / "answers"
    for first in (0, 6):  # the second writer goes on after a merge
        writer = RecordWriter(folder, Answer, 1e9)
        for start in (first, first + 2):
            writer.append(*answers(start, start + 2))
            writer.flush()
            disks.promise(start + 2)
        writer.append(*answers(first + 4, first + 6))
        writer.finish()
        disks.promise(first + 6)
    written = {identity(row): row.answer_ids.tolist() for start in range(0, 12, 2) for row in answers(start, start + 2)}

    def holds(left: Path, num_promised: int | None) -> None:
        writer = RecordWriter(left / "run" / "round_01" / "answers", Answer, 1e9)
        on_disk = {identity(row): row for table in writer.existing() for row in rows_of(table, Answer)}
        rows = [on_disk[key] for key in sorted(on_disk)]
        assert len(rows) >= (num_promised or 0)
        assert [identity(row) for row in rows] == list(written)[: len(rows)]
        assert all(row.answer_ids.tolist() == written[identity(row)] for row in rows)
        assert not list(left.rglob("*.damaged"))

    disks.check(holds)


def test_an_atomically_written_file_is_the_old_or_the_new_one(disks):
    versions = [str(number) * 10_000 for number in range(3)]
    for version in versions:
        with atomic_write(disks.folder / "file") as temporary:
            temporary.write_text(version)
        disks.promise(version)

    def holds(left: Path, promise: str | None) -> None:
        if promise is None and not (left / "file").exists():
            return
        content = (left / "file").read_text()
        assert content in versions and (promise is None or content >= promise)

    disks.check(holds)


def test_a_stage_that_is_finished_has_its_outputs(disks):
    run = disks.folder / "run"
    make_folder(run)
    manifest = Manifest(run)
    stages = ("sample", "verify", "score")
    for number, stage in enumerate(stages):
        output = run / "round_01" / stage / "data.parquet"
        manifest.begin(stage, {"seed": 1})
        write_records(output, answers(0, number + 1), Answer)
        manifest.finish(stage, 1.0, [output])
        disks.promise(stages[: number + 1])

    def holds(left: Path, promise: tuple[str, ...] | None) -> None:
        found = Manifest(left / "run")
        finished = [stage for stage, entry in found.entries().items() if entry["status"] == "finished"]
        assert set(promise or ()) <= set(finished)
        for stage in finished:
            found.check_outputs(stage)

    disks.check(holds)


def test_metrics_of_a_finished_stage_are_there_and_torn_rows_are_left_out(disks):
    numbers = range(150)  # several blocks
    metrics = Metrics(disks.folder, LoggingConfig(tensorboard=False), "run")
    metrics.drop("sft", numbers)
    for step in numbers:
        metrics.log("sft", step, {"loss": step / 7, "gradient_norm": step / 3})
    metrics.close()
    disks.promise(len(numbers))

    def holds(left: Path, num_promised: int | None) -> None:
        rows = [(row["step"], row["loss"]) for row in Metrics.read(left)]
        assert rows == sorted(rows) and set(rows) <= {(step, step / 7) for step in numbers}
        assert len(rows) >= (num_promised or 0)

    disks.check(holds)


def test_a_model_folder_is_the_old_or_the_new_one_or_put_back(disks):
    target = disks.folder / "models" / "m"
    for version in "12":
        with atomic_folder(target, overwrite=True, num_bytes=0) as partial:
            (partial / "config.json").write_text(version)
            (partial / "model.safetensors").write_bytes(version.encode() * 10_000)
            (partial / "huggingface").mkdir()
            (partial / "huggingface" / "config.json").write_text(version)
            write_checksums(partial)
        disks.promise(version)
    check_model(disks.folder, "2")

    disks.check(check_model)


def test_an_old_model_is_only_removed_once_the_new_one_lasts(disks):
    for name in ("m", "other"):
        with atomic_folder(disks.folder / "models" / name, overwrite=False, num_bytes=0) as partial:
            (partial / "config.json").write_text("1")
            (partial / "model.safetensors").write_bytes(b"1" * 10_000)
            write_checksums(partial)
    disks.promise("1")
    models = disks.folder / "models"
    os.replace(models / "m", models / ".m.replaced")  # as a process does that is killed before it syncs the folder
    os.replace(models / "other", models / "m")
    with pytest.raises(ValueError, match="already exists"), atomic_folder(models / "m", overwrite=False, num_bytes=0):
        pass
    assert not (models / ".m.replaced").exists()

    disks.check(check_model)


def check_model(left: Path, promise: str | None) -> None:
    """The model is whole and at least as new as promised, at the latest after the next call."""
    target = left / "models" / "m"
    try:
        with atomic_folder(target, overwrite=False, num_bytes=0):
            raise KeyboardInterrupt
    except ValueError as error:
        assert "already exists" in str(error)
    except KeyboardInterrupt:
        assert promise is None and not target.exists()
        return
    check_checksums(target)
    versions = {file.read_text()[0] for file in target.rglob("*") if file.name != "SHA256SUMS" and file.is_file()}
    assert (target / "SHA256SUMS").exists() and len(versions) == 1
    assert promise is None or max(versions) >= promise
