"""A Hugging Face model folder: its tensors by name, checked before use, and a new one written tensor by tensor.

Tensors are read one at a time into memory of their own: a memory-mapped file would stay resident beside the model
made from it.
"""

import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavar.models.dims import ModelDims
from megavar.models.ops import Operator, names_at, pieces

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPARED_BYTES = 2**24
WRITTEN_BYTES = 2**18
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
TIED_HEAD = "lm_head.weight"
"""The output table, which a folder of tied embeddings may hold as a copy of the embedding."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class FileInParts(io.FileIO):
    """A file that takes what it is given a part at a time.

    For a large write the kernel takes large pages, which cost ten times as much where memory has to be fetched from a
    host first: 0.34 against 3.8 GB/s on a virtual machine.
    """

    def write(self, data: Any) -> int:
        """Write all of it; returns its bytes."""
        left = memoryview(data).cast("B")
        done = 0
        while done < len(left):
            done += super().write(left[done : done + WRITTEN_BYTES])
        return done


class HuggingFaceFolder:
    """Read access to the tensors of a folder.

    Raises:
        ValueError: naming the file, if an index or safetensors file is missing, truncated or not consistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place_of: dict[str, tuple[str, int]] = {}
        self._info_of: dict[str, TensorInfo] = {}
        indexed = self._read_index()
        for file in sorted(set(indexed.values())) if indexed is not None else [SINGLE]:
            self._read_header(file)
        for key, file in (indexed or {}).items():
            if self._place_of.get(key, ("", 0))[0] != file:
                raise ValueError(f"{path / file} lacks {key}, which {INDEX} places there; copy the folder anew.")
        if indexed is not None and (stray := sorted(self._place_of.keys() - indexed.keys())):
            raise ValueError(f"{path / self._place_of[stray[0]][0]} holds {stray[0]}, which {INDEX} does not name.")

    def _read_index(self) -> dict[str, str] | None:
        if not (self.path / INDEX).is_file():
            if not (self.path / SINGLE).is_file():
                raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}; give a folder with safetensors files.")
            return None
        try:
            return dict(json.loads((self.path / INDEX).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path / INDEX} is no index of safetensors files ({error}); copy it anew."
            ) from error

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.path / file, framework="pt"):
                pass  # safetensors checks the header against the file's size
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path / file} is missing, truncated or no safetensors file ({error}); copy it anew."
            ) from error
        with open(self.path / file, "rb") as data:
            length = int.from_bytes(data.read(8), "little")
            rows: dict[str, Any] = json.loads(data.read(length))
        rows.pop("__metadata__", None)
        for key, row in rows.items():
            if row["dtype"] not in DTYPES:
                raise ValueError(f"{self.path / file}: {key} is of type {row['dtype']}; known are {', '.join(DTYPES)}.")
            if key in self._place_of:
                raise ValueError(f"{self.path / file} holds {key}, as {self._place_of[key][0]} does; remove one.")
            self._place_of[key] = (file, 8 + length + row["data_offsets"][0])
            self._info_of[key] = TensorInfo(DTYPES[row["dtype"]], tuple(row["shape"]))

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._info_of)

    def info(self, key: str) -> TensorInfo:
        """dtype and shape of a tensor."""
        return self._info_of[key]

    def tensor(self, key: str) -> Tensor:
        """A tensor, in the file's dtype, on the CPU."""
        (file, start), info = self._place_of[key], self._info_of[key]
        found = torch.empty(info.shape, dtype=info.dtype)
        with open(self.path / file, "rb") as data:
            data.seek(start)
            num_bytes = data.readinto(bytes_of(found))
        if num_bytes != found.nbytes:
            raise ValueError(f"{self.path / file} ended inside {key}; it changed while being read.")
        return found

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors of one size hold the same bytes; neither is held whole."""
        if self.info(first) != self.info(second):
            return False
        (file, start), (other_file, other_start) = self._place_of[first], self._place_of[second]
        num_bytes = self.info(first).num_bytes
        with open(self.path / file, "rb") as data, open(self.path / other_file, "rb") as other:
            data.seek(start)
            other.seek(other_start)
            while num_bytes > 0:
                part = data.read(min(num_bytes, COMPARED_BYTES))
                if not part or part != other.read(len(part)):
                    return False
                num_bytes -= len(part)
        return True

    def check(self, operators: list[Operator], dims: ModelDims) -> None:
        """Compare names and shapes with what the model's operators expect.

        Raises:
            ValueError: naming the first missing, unknown or misshapen tensor and its file.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for operator, index in pieces(operators, dims):
            expected.update(zip(names_at(operator, index), operator.hf_shapes(dims), strict=True))
        tied_copy = {TIED_HEAD} if dims.tied_embeddings else set()
        missing, extra = sorted(expected.keys() - self.names()), sorted(self.names() - expected.keys() - tied_copy)
        if missing or extra:
            name = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
            raise ValueError(
                f"{self.path} {name} ({len(missing)} missing, {len(extra)} unknown); "
                f"its config.json says {dims.family} with {dims.num_layers} layers."
            )
        if dims.tied_embeddings and TIED_HEAD in self.names():
            expected[TIED_HEAD] = (dims.vocab_size, dims.hidden_size)
        for name, shape in expected.items():
            if self.info(name).shape != shape:
                raise ValueError(
                    f"{self.path / self._place_of[name][0]}: {name} is {self.info(name).shape}, "
                    f"config.json implies {shape}."
                )


class HuggingFaceWriter:
    """Writes tensors, in the order of `tensors`, as the safetensors files of a folder; no tensor is held.

    Args:
        folder: exists; config and tokenizer files are the caller's.
        tensors: everything that will be written.
        max_shard_bytes: a file ends before it would grow over this; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, tensors: Sequence[tuple[str, TensorInfo]], max_shard_bytes: int) -> None:
        self._folder = folder
        self._left = list(tensors)
        self._total_bytes = sum(info.num_bytes for _, info in tensors)
        shards: list[list[tuple[str, TensorInfo]]] = [[]]
        held = 0
        for key, info in tensors:
            if shards[-1] and held + info.num_bytes > max_shard_bytes:
                shards.append([])
                held = 0
            shards[-1].append((key, info))
            held += info.num_bytes
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        self._shards = list(zip(names if len(shards) > 1 else [SINGLE], shards, strict=True))
        self._begins = {shard[0][0]: (file, shard) for file, shard in self._shards}
        self._data: FileInParts | None = None

    def write(self, key: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        expected, info = self._left.pop(0)
        given = TensorInfo(tensor.dtype, tuple(tensor.shape))
        assert (key, given) == (expected, info), f"{key} {given} came for {expected} {info}"
        if key in self._begins:
            self._begin(*self._begins[key])
        assert self._data is not None
        self._data.write(bytes_of(tensor.contiguous()))

    def finish(self) -> None:
        """Close the last file, write the index."""
        assert not self._left, f"{len(self._left)} tensors were not written, first {self._left[0][0]}"
        self._close()
        if len(self._shards) > 1:
            placed = {key: file for file, shard in self._shards for key, _ in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(placed.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, file: str, shard: list[tuple[str, TensorInfo]]) -> None:
        self._close()
        names = {dtype: name for name, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for key, info in shard:
            end = start + info.num_bytes
            header[key] = {"dtype": names[info.dtype], "shape": info.shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
        self._data = FileInParts(self._folder / file, "w")
        self._data.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        if self._data is not None:
            self._data.close()


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, as a buffer."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def copy_side_files(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Carry over everything but weights: tokenizer and configuration, with its dtype set if one is given.

    The configuration names the RoPE base where transformers 5 and where transformers 4 looks for it.
    """
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in ("README.md", ".gitattributes"):
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    if "rope_theta" in (config.get("rope_parameters") or {}):
        # transformers 4 knows this place only, and would silently run with a base of 10000.
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def new_folder(target: Path, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well and vanishes when it fails.

    A target that is replaced stands aside until the new one is in its place; if a kill comes between the two, the next
    call puts it back. What a killed call left is removed.

    Args:
        num_bytes: about what will be written; checked against the free space.

    Raises:
        ValueError: if `target` exists and may not be overwritten, is being written by another process, cannot be
            written, or there is not enough space.
    """
    target = Path(os.path.abspath(target))
    aside, replaced = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(aside):
            if replaced.exists() and not target.exists():
                os.replace(replaced, target)
            shutil.rmtree(replaced, ignore_errors=True)
            _check_target(target, overwrite)
            free = shutil.disk_usage(aside).free
            if free < num_bytes:
                raise ValueError(
                    f"{target} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; "
                    "choose another."
                )
            yield aside
            _sync(aside)
            if target.exists():
                os.replace(target, replaced)
            try:
                os.replace(aside, target)
            except OSError:
                if replaced.exists():
                    os.replace(replaced, target)
                raise
        shutil.rmtree(replaced, ignore_errors=True)
        _sync_entry(target.parent)
    except OSError as error:
        raise ValueError(f"{target} could not be written: {error}; nothing half done is left.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make `folder` anew and hold it for this process; it is removed if it is still there in the end."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            mine = False
        except OSError as error:
            mine = error.errno in _NO_LOCKS  # some shared file systems have none
            if not mine:
                raise
        if not mine:
            raise ValueError(f"another process is filling {folder}; wait for it, or choose another target.")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield
        finally:
            # After it was renamed, another process may have made its own in the same place.
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that may not be replaced: only a model or a checkpoint may, and nothing beside it."""
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists already; choose another folder, or say --overwrite.")
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose another target, or remove it first.")
    entries = {path.name for path in target.iterdir()}
    model, checkpoint = {"config.json"} < entries and bool({SINGLE, INDEX} & entries), ".metadata" in entries
    if entries and not model and not checkpoint:
        raise ValueError(f"{target} holds neither a model nor a checkpoint; it is not overwritten, remove it first.")
    others = sorted(path.name for path in target.iterdir() if path.is_dir() and path.name != "huggingface")
    if others:
        raise ValueError(
            f"{target} holds the folder {others[0]} beside its model; it is not overwritten, remove it first."
        )


def _sync(folder: Path) -> None:
    """Put a folder's files and entries on disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
