"""Hugging Face model folders: validated reading of tensors by name, streaming writing, atomic creation of folders.

Tensors are read one at a time into newly allocated memory. Pages of a memory-mapped file would stay resident in
addition to the model built from them.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavar.checksums import CHECKSUMS
from megavar.disk import make_folder, sync
from megavar.models.dims import ModelDims
from megavar.models.ops import Operator, names_at, pieces

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPARE_CHUNK_BYTES = 2**24
WRITE_CHUNK_BYTES = 2**18
SYNC_BYTES = 2**27
"""After so many the disk is told to write them, while the next are made; otherwise it would wait for the last fsync."""
KEPT_BYTES = 2**28
"""Tensors of up to so many leave their memory to others of the same size; larger ones are few."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
TIED_HEAD = "lm_head.weight"
"""The output layer. A folder with tied embeddings may contain it as a copy of the embedding."""


@dataclass(frozen=True)
class TensorInfo:
    """Metadata of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class ChunkedFile(io.FileIO):
    """A file that splits large writes into chunks, hashes them meanwhile, and has the disk begin with them early.

    For one large write the kernel allocates large pages, which is ten times slower on virtual machines whose memory is
    provided on demand (measured: 0.34 against 3.8 GB/s).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._sha256 = hashlib.sha256()
        self._threads = ThreadPoolExecutor(2)  # one hashes, one syncs
        self._last_sync: Future[None] | None = None
        self._num_unsynced_bytes = 0

    def write(self, data: Any) -> int:
        """Write all of `data`; returns the number of bytes."""
        view = memoryview(data).cast("B")
        hashing = self._threads.submit(self._sha256.update, view) if len(view) > WRITE_CHUNK_BYTES else None
        done = 0
        try:
            while done < len(view):
                done += super().write(view[done : done + WRITE_CHUNK_BYTES])
        finally:
            if hashing is None:
                self._sha256.update(view)
            else:
                hashing.result()  # it reads the caller's memory
        self._num_unsynced_bytes += done
        if self._num_unsynced_bytes >= SYNC_BYTES and (self._last_sync is None or self._last_sync.done()):
            self._check_last_sync()
            self._last_sync, self._num_unsynced_bytes = self._threads.submit(os.fdatasync, self.fileno()), 0
        return done

    def close(self) -> None:
        """Close the file; raises OSError if the disk refused what was written to it until now."""
        self._threads.shutdown()
        super().close()
        self._check_last_sync()

    def _check_last_sync(self) -> None:
        """The kernel tells of an error once: who syncs the file later does not learn of it."""
        if self._last_sync is not None:
            self._last_sync.result()

    @property
    def digest(self) -> str:
        """SHA-256 of what was written, which must have been in order."""
        return self._sha256.hexdigest()


class Memory:
    """Memory for tensors on the CPU: that of earlier ones of the same size which are gone, or new.

    The kernel clears new memory, which takes about as long as reading a file into it. It comes in large pages where
    Linux has them, for which numpy asks and torch does not (measured for reading 2 GiB: 0.65 against 1.5 s).
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def empty(self, info: TensorInfo) -> Tensor:
        """An uninitialised tensor; its memory is taken back once it and all its views are gone."""
        free = self._free[info.num_bytes]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(info.num_bytes, dtype=np.uint8)
        lent = memory[:]
        if info.num_bytes <= KEPT_BYTES:
            weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(info.dtype).view(info.shape)


class HuggingFaceFolder:
    """Read access to the tensors of a Hugging Face folder; opening reads the headers only.

    Raises:
        ValueError: naming the file, if an index or safetensors file is missing, truncated or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._memory = Memory()
        self._location_of: dict[str, tuple[str, int]] = {}
        self._info_of: dict[str, TensorInfo] = {}
        indexed = self._read_index()
        for file in sorted(set(indexed.values())) if indexed is not None else [SINGLE]:
            self._read_header(file)
        for key, file in (indexed or {}).items():
            if self._location_of.get(key, ("", 0))[0] != file:
                raise ValueError(f"{path / file} lacks {key}, which {INDEX} maps to it; re-download the folder.")
        if indexed is not None and (stray := sorted(self._location_of.keys() - indexed.keys())):
            raise ValueError(
                f"{path / self._location_of[stray[0]][0]} contains {stray[0]}, which {INDEX} does not list; "
                "re-download the folder."
            )

    def _read_index(self) -> dict[str, str] | None:
        if not (self.path / INDEX).is_file():
            if not (self.path / SINGLE).is_file():
                raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}; give a folder with safetensors files.")
            return None
        try:
            return dict(json.loads((self.path / INDEX).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path / INDEX} is not a valid safetensors index ({error}); re-download it."
            ) from error

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.path / file, framework="pt"):
                pass  # safetensors checks the header against the file's size
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path / file} is missing, truncated or not a safetensors file ({error}); re-download it."
            ) from error
        with open(self.path / file, "rb") as data:
            length = int.from_bytes(data.read(8), "little")
            rows: dict[str, Any] = json.loads(data.read(length))
        rows.pop("__metadata__", None)
        for key, row in rows.items():
            if row["dtype"] not in DTYPES:
                raise ValueError(
                    f"{self.path / file}: {key} has dtype {row['dtype']}; supported are {', '.join(DTYPES)}."
                )
            if key in self._location_of:
                raise ValueError(
                    f"{key} is in both {self.path / file} and {self._location_of[key][0]}; remove one of the files."
                )
            self._location_of[key] = (file, 8 + length + row["data_offsets"][0])
            self._info_of[key] = TensorInfo(DTYPES[row["dtype"]], tuple(row["shape"]))

    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self._info_of)

    def info(self, key: str) -> TensorInfo:
        """dtype and shape of a tensor; raises KeyError for an unknown name."""
        return self._info_of[key]

    def tensor(self, key: str) -> Tensor:
        """Read a tensor, in the file's dtype, on the CPU."""
        return self.tensors([key])[0]

    def tensors(self, keys: list[str]) -> list[Tensor]:
        """Read tensors; those of one dtype lie behind one another in memory, where `models.ops.joined` finds them."""
        infos = [self._info_of[key] for key in keys]
        if len({info.dtype for info in infos}) > 1:
            return [self.tensor(key) for key in keys]
        sizes = [torch.Size(info.shape).numel() for info in infos]
        parts = self._memory.empty(TensorInfo(infos[0].dtype, (sum(sizes),))).split(sizes)
        tensors = [part.view(info.shape) for part, info in zip(parts, infos, strict=True)]
        for key, tensor in zip(keys, tensors, strict=True):
            file, start = self._location_of[key]
            with open(self.path / file, "rb") as data:
                data.seek(start)
                num_bytes = data.readinto(bytes_of(tensor))
            if num_bytes != tensor.nbytes:
                raise ValueError(f"{self.path / file} ends within {key}: it changed while being read; re-download it.")
        return tensors

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors have equal dtype, shape and bytes; compares in chunks."""
        if self.info(first) != self.info(second):
            return False
        (file, start), (other_file, other_start) = self._location_of[first], self._location_of[second]
        num_bytes = self.info(first).num_bytes
        with open(self.path / file, "rb") as data, open(self.path / other_file, "rb") as other:
            data.seek(start)
            other.seek(other_start)
            while num_bytes > 0:
                chunk = data.read(min(num_bytes, COMPARE_CHUNK_BYTES))
                if not chunk or chunk != other.read(len(chunk)):
                    return False
                num_bytes -= len(chunk)
        return True

    def check(self, operators: list[Operator], dims: ModelDims) -> None:
        """Check names and shapes against those that the model's operators expect.

        Raises:
            ValueError: naming the first missing or unknown tensor, or the first with the wrong shape and its file.
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
                f"config.json describes {dims.family} with {dims.num_layers} layers; fix it or re-download the folder."
            )
        if dims.tied_embeddings and TIED_HEAD in self.names():
            expected[TIED_HEAD] = (dims.vocab_size, dims.hidden_size)
        for name, shape in expected.items():
            if self.info(name).shape != shape:
                raise ValueError(
                    f"{self.path / self._location_of[name][0]}: {name} has shape {self.info(name).shape}, config.json "
                    f"implies {shape}; fix config.json or re-download the folder."
                )


class HuggingFaceWriter:
    """Writes the safetensors files of a folder as a stream of tensors; holds none.

    Args:
        folder: an existing folder. Configuration and tokenizer files are left to the caller.
        tensors: name, dtype and shape of all tensors, in the order in which they will be written.
        max_shard_bytes: maximum size of a file; a larger tensor gets a separate file.
    """

    def __init__(self, folder: Path, tensors: Sequence[tuple[str, TensorInfo]], max_shard_bytes: int) -> None:
        self._folder = folder
        self._remaining = list(tensors)
        self._total_bytes = sum(info.num_bytes for _, info in tensors)
        shards: list[list[tuple[str, TensorInfo]]] = [[]]
        shard_bytes = 0
        for key, info in tensors:
            if shards[-1] and shard_bytes + info.num_bytes > max_shard_bytes:
                shards.append([])
                shard_bytes = 0
            shards[-1].append((key, info))
            shard_bytes += info.num_bytes
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        self._shards = list(zip(names if len(shards) > 1 else [SINGLE], shards, strict=True))
        self._shard_starting_with = {shard[0][0]: (file, shard) for file, shard in self._shards}
        self._data: ChunkedFile | None = None
        self.digest_of: dict[Path, str] = {}
        """SHA-256 of each finished file."""

    def write(self, key: str, tensor: Tensor) -> None:
        """Write the next tensor; name, dtype and shape must be those announced."""
        expected, info = self._remaining.pop(0)
        given = TensorInfo(tensor.dtype, tuple(tensor.shape))
        assert (key, given) == (expected, info), f"got {key} {given}, expected {expected} {info}"
        if key in self._shard_starting_with:
            self._open_shard(*self._shard_starting_with[key])
        assert self._data is not None
        self._data.write(bytes_of(tensor.contiguous()))

    def finish(self) -> None:
        """Close the last file and, if there are several, write the index."""
        assert not self._remaining, f"{len(self._remaining)} tensors not written, first {self._remaining[0][0]}"
        self._close()
        if len(self._shards) > 1:
            file_of = {key: file for file, shard in self._shards for key, _ in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(file_of.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _open_shard(self, file: str, shard: list[tuple[str, TensorInfo]]) -> None:
        self._close()
        names = {dtype: name for name, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for key, info in shard:
            end = start + info.num_bytes
            header[key] = {"dtype": names[info.dtype], "shape": info.shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # safetensors aligns tensor data to 8 bytes
        self._data = ChunkedFile(self._folder / file)
        self._data.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        if self._data is not None:
            self._data.close()
            self.digest_of[Path(str(self._data.name))] = self._data.digest


def bytes_of(tensor: Tensor) -> Any:
    """Writable buffer over the memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def copy_side_files(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy the non-weight files (configuration, tokenizer), without README.md, .gitattributes and SHA256SUMS.

    config.json gets the RoPE base and scaling under the keys of both transformers 4 and transformers 5.

    Args:
        dtype: to set in config.json; None keeps what it says.
    """
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in ("README.md", ".gitattributes", CHECKSUMS):
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        # transformers 4 reads these keys only, and would silently use its default base of 10000 without scaling.
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def name_end_token(folder: Path, end_token: int) -> None:
    """Let a folder's config.json and generation_config.json name the token that a trained model ends its texts with.

    Of the base's generation_config.json only the other token ids are kept: its sampling settings are of another model.
    """
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end_token}, indent=2) + "\n")
    file = folder / "generation_config.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    kept = {key: old[key] for key in ("bos_token_id", "pad_token_id", "transformers_version") if key in old}
    file.write_text(json.dumps({**kept, "eos_token_id": end_token}, indent=2) + "\n")


@contextmanager
def atomic_folder(target: Path, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """Context manager: yields a temporary folder, renamed to `target` on success and removed on failure.

    A target that is overwritten is first renamed to `.NAME.replaced` and deleted after the new one is there. If the
    process is killed between these two renames, the next call restores it. Leftovers of killed calls are removed. The
    renames are synced before: a power cut that undid them would put what is removed back under the target's name.

    Args:
        overwrite: replace an existing model or checkpoint at `target`.
        num_bytes: approximate size of the output; checked against the free disk space.

    Raises:
        ValueError: if `target` exists and may not be overwritten, another process is writing it, writing fails, or
            there is not enough free disk space.
    """
    target = Path(os.path.abspath(target))
    partial, replaced = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    try:
        make_folder(target.parent)
        with _locked(partial):
            if replaced.exists() and not target.exists():
                os.replace(replaced, target)
            sync(target.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            _check_target(target, overwrite)
            free = shutil.disk_usage(partial).free
            if free < num_bytes:
                raise ValueError(
                    f"{target} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; free some "
                    "or choose another target."
                )
            yield partial
            _sync(partial)
            if target.exists():
                os.replace(target, replaced)
            try:
                os.replace(partial, target)
            except OSError:
                if replaced.exists():
                    os.replace(replaced, target)
                raise
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{target} could not be written: {error}; no partial output is left.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create or empty `folder` and lock it for this process; on exit it is removed if it still exists."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            mine = False
        except OSError as error:
            mine = error.errno in _NO_LOCKS  # some network file systems have no locks
            if not mine:
                raise
        if not mine:
            raise ValueError(f"another process is writing {folder}; wait for it, or choose another target.")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield
        finally:
            # After the rename, another process may have created its own folder at this path.
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _check_target(target: Path, overwrite: bool) -> None:
    """Reject a target that must not be overwritten: anything but a model or checkpoint without other folders in it."""
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} already exists; choose another folder or pass --overwrite.")
    if not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder; choose another target, or remove it first.")
    entries = {path.name for path in target.iterdir()}
    model, checkpoint = {"config.json"} < entries and bool({SINGLE, INDEX} & entries), ".metadata" in entries
    if entries and not model and not checkpoint:
        raise ValueError(
            f"{target} contains neither a model nor a checkpoint, so it is not overwritten; remove it first."
        )
    others = sorted(path.name for path in target.iterdir() if path.is_dir() and path.name != "huggingface")
    if others:
        raise ValueError(
            f"{target} contains another folder, {others[0]}, so it is not overwritten; remove that folder first."
        )


def _sync(folder: Path) -> None:
    """fsync a folder, its files and its subfolders."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
