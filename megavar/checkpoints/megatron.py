"""Megatron checkpoints (format `torch_dist`): streaming reader and writer that need neither Megatron nor a model.

The format is torch.distributed.checkpoint's: `.metadata` maps each chunk of a tensor to a byte range in a `.distcp`
file. Megatron loads it under any parallel layout; each rank reads its own shards. The checkpoint also contains
`megavar.json` (`Description`) and `huggingface/` (configuration and tokenizer), which converting back needs.
"""

import json
import pickle
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megavar.checkpoints.huggingface import ChunkedFile, Memory, TensorInfo, bytes_of
from megavar.checkpoints.safe_pickle import first_line, read_metadata
from megavar.models.dims import ModelDims
from megavar.models.ops import Index, Operator, leading_axes, piece_shape

CHUNK_BYTES = 2**28
"""Larger pieces are split along rows into chunks of this size, which bounds the memory needed to read one."""
FILE_BYTES = 2**32
"""A new file is started once a file exceeds this size."""
DESCRIPTION = "megavar.json"
SIDE_FILES = "huggingface"
WEIGHTS_SUFFIX = ".distcp"
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}
_WEIGHTS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class Description:
    """Contents of a checkpoint's `megavar.json`."""

    tied_head_written: bool
    """Whether the Hugging Face source contained a copy of its tied embedding as lm_head.weight."""
    source_digest: str | None
    """Digest of the source's tensors (`convert.Digest`); None for a checkpoint saved by training."""

    def write(self, checkpoint: Path) -> None:
        """Write megavar.json into a checkpoint folder."""
        (checkpoint / DESCRIPTION).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, checkpoint: Path) -> "Description | None":
        """Read megavar.json of a checkpoint; None if there is none.

        Raises:
            ValueError: if it is damaged.
        """
        file = checkpoint / DESCRIPTION
        try:
            found = cls(**json.loads(file.read_text())) if file.is_file() else None
            if found and not (
                isinstance(found.tied_head_written, bool) and isinstance(found.source_digest, str | None)
            ):
                raise TypeError("expected a bool tied_head_written, and a text or null source_digest")
            return found
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); remove it and give --hf-template.") from error


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`, or the one its `latest_checkpointed_iteration.txt` points to; None if there is none."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        name = tracker.read_text().strip()
        path = path / (f"iter_{int(name):07d}" if name.isdigit() else name)
    return path if (path / ".metadata").is_file() else None


class ShardedCheckpoint:
    """Read access to the weights of a checkpoint; optimizer state is ignored. Opening reads `.metadata` only.

    Raises:
        ValueError: naming the file that is missing, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        checkpoint = find_checkpoint(path)
        if checkpoint is None:
            raise ValueError(f"{path} is not a Megatron checkpoint of format torch_dist: it has no .metadata.")
        self.path = checkpoint
        self._memory = Memory()
        self._reader = FileSystemReader(checkpoint)
        metadata = read_metadata(checkpoint)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(_WEIGHTS)
        }
        self._chunks_at: dict[str, dict[Index, list[ChunkStorageMetadata]]] = {}
        ends: dict[str, int] = {}
        for stored in metadata.storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, end in ends.items():
            if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size < end:
                raise ValueError(f"{checkpoint / name} is missing or truncated; copy the checkpoint again.")

    def info(self, name: str) -> TensorInfo:
        """dtype and full shape (leading axes included) of a parameter."""
        entry = self._tensors[name]
        return TensorInfo(entry.properties.dtype, tuple(entry.size))

    def piece(self, operator: Operator, index: Index, dims: ModelDims) -> Tensor:
        """Read one piece of a parameter, on the CPU, without the rows that pad the vocabulary.

        Raises:
            ValueError: naming the parameter, if a part of it is missing or cannot be read.
        """
        name, shape = operator.megatron_name, piece_shape(operator, dims)
        entry = self._with_chunks_of(name, index)
        origin, sizes = torch.Size([*index, *[0] * len(shape)]), torch.Size([*[1] * len(index), *shape])
        wanted = [ChunkStorageMetadata(offsets=origin, sizes=sizes)]
        reads = create_read_items_for_chunk_list(name, entry, wanted)
        if sum(read.lengths.numel() for read in reads) != sizes.numel():
            raise ValueError(f"{self.path} contains only a part of {name}{list(index)}; copy the files of all ranks.")
        try:
            piece = self._memory.empty(TensorInfo(entry.properties.dtype, shape))
            for read in reads:
                self._read(read, narrow_tensor_by_index(piece.view(sizes), read.dest_offsets, read.lengths))
        except (OSError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path}: {name}{list(index)} cannot be read: {first_line(error)}; copy it again."
            ) from error
        return piece

    def _read(self, read: ReadItem, target: Tensor) -> None:
        """Read a part of a chunk into a tensor of its shape, directly where both are one range of bytes."""
        info = self._reader.storage_data[read.storage_index]
        with open(self.path / info.relative_path, "rb") as file:
            stored = cast(IO[bytes], _create_file_view(file, info.offset, info.length))
            header: Tensor = torch.load(stored, map_location="meta", weights_only=True)
            if not isinstance(header, Tensor):
                raise OSError(f"{info.relative_path} has something else there")
            place = narrow_tensor_by_index(header, read.storage_offsets, read.lengths)
            if place.is_contiguous() and target.is_contiguous() and place.dtype == target.dtype:
                start = header.untyped_storage()._checkpoint_offset
                assert start is not None, "torch tells where in its file a storage begins"
                stored.seek(start + int(place.storage_offset()) * place.itemsize)
                if stored.readinto(bytes_of(target)) != target.nbytes:  # type: ignore[attr-defined]
                    raise OSError(f"{info.relative_path} ends within it")
            else:
                stored.seek(0)
                chunk: Tensor = torch.load(stored, map_location="cpu", weights_only=True)
                target.copy_(narrow_tensor_by_index(chunk, read.storage_offsets, read.lengths))

    def _with_chunks_of(self, name: str, index: Index) -> TensorStorageMetadata:
        """A parameter's entry, reduced to the chunks that overlap one piece: torch scans all chunks it is given."""
        if name not in self._chunks_at:
            chunks_at: dict[Index, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self._tensors[name].chunks:
                bounds = zip(chunk.offsets[: len(index)], chunk.sizes[: len(index)], strict=True)
                for overlapped in product(*(range(start, start + size) for start, size in bounds)):
                    chunks_at[overlapped].append(chunk)
            self._chunks_at[name] = chunks_at
        return replace(self._tensors[name], chunks=self._chunks_at[name].get(index, []))

    def check(self, operators: list[Operator], dims: ModelDims) -> None:
        """Check names and shapes against those that the model's operators expect.

        Raises:
            ValueError: naming the first parameter that is missing, unknown or of the wrong shape.
        """
        expected = {row.megatron_name: (*leading_axes(row, dims), *piece_shape(row, dims)) for row in operators}
        missing, extra = sorted(expected.keys() - self._tensors.keys()), sorted(self._tensors.keys() - expected.keys())
        if missing or extra:
            name = f"lacks {missing[0]}" if missing else f"has an unknown parameter {extra[0]}"
            raise ValueError(
                f"{self.path} {name} ({len(missing)} missing, {len(extra)} unknown); its Hugging Face configuration "
                f"describes {dims.family} with {dims.num_layers} layers and "
                f"{'tied' if dims.tied_embeddings else 'untied'} embeddings; use the configuration it was saved with."
            )
        for name, shape in expected.items():
            given = self.info(name).shape
            padded = name in ("embedding.word_embeddings.weight", "output_layer.weight") and given[0] > shape[0]
            if given[padded:] != shape[padded:]:
                raise ValueError(
                    f"{self.path}: {name} has shape {given}, its Hugging Face configuration implies {shape}; use the "
                    "configuration it was saved with."
                )


class ShardedWriter:
    """Writes a checkpoint as a stream of pieces, in any order; holds none.

    Args:
        folder: an existing folder.
        dims: sizes of the model.
    """

    def __init__(self, folder: Path, dims: ModelDims) -> None:
        self._folder, self._dims = folder, dims
        self._metadata = Metadata(state_dict_metadata={}, storage_data={})
        self._data: ChunkedFile | None = None
        self._num_files = 0
        self.digest_of: dict[Path, str] = {}
        """SHA-256 of each finished file."""

    def write(self, operator: Operator, index: Index, piece: Tensor, dtype: torch.dtype) -> None:
        """Write one full-size piece, cast to `dtype`, as one or more chunks."""
        name = operator.megatron_name
        entry = self._metadata.state_dict_metadata.setdefault(
            name,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype),
                size=torch.Size([*leading_axes(operator, self._dims), *piece.shape]),
                chunks=[],
            ),
        )
        assert isinstance(entry, TensorStorageMetadata)
        rows = max(1, CHUNK_BYTES * piece.shape[0] // max(1, piece.numel() * dtype.itemsize))
        for start in range(0, piece.shape[0], rows):
            part = piece[start : start + rows].to(dtype).contiguous()
            if part.untyped_storage().nbytes() != part.nbytes:  # torch.save would write the full storage of a view
                part = torch.frombuffer(bytes_of(part), dtype=dtype).view(part.shape)
            offsets = torch.Size([*index, start, *[0] * (piece.dim() - 1)])
            sizes = torch.Size([*[1] * len(index), *part.shape])
            entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            chunk_index = MetadataIndex(name, offset=offsets, index=len(entry.chunks) - 1)
            self._metadata.storage_data[chunk_index] = self._append(part.view(sizes))
        if ".linear_" in name and name.endswith(".weight"):
            self._write_extra_state(name.removesuffix("weight"), index, leading_axes(operator, self._dims))
        if ".linear_qkv.weight" in name:
            attention = name.removesuffix("linear_qkv.weight") + "core_attention."
            self._write_extra_state(attention, index, leading_axes(operator, self._dims))

    def _write_extra_state(self, module: str, index: Index, sizes: Index) -> None:
        """An empty extra state (FP8 scales): Megatron's loader expects one for every module that can have it."""
        key = f"{module}_extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
        self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self._metadata.storage_data[MetadataIndex(key)] = self._append([None])

    def finish(self) -> None:
        """Close the last file and write the checkpoint's metadata."""
        self._close()
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps({**_BACKEND, **_COMMON}))
        with open(self._folder / ".metadata", "wb") as file:
            pickle.dump(self._metadata, file)

    def _close(self) -> None:
        if self._data is not None:
            self._data.close()
            self.digest_of[Path(str(self._data.name))] = self._data.digest

    def _append(self, value: Tensor | list[None]) -> _StorageInfo:
        if self._data is None or self._data.tell() > FILE_BYTES:
            self._close()
            self._data = ChunkedFile(self._folder / f"__0_{self._num_files}{WEIGHTS_SUFFIX}")
            self._num_files += 1
        start = self._data.tell()
        crc32 = torch.serialization.get_crc32_options()
        try:
            torch.serialization.set_crc32_options(False)  # torch.load does not check them; they take most of the time
            torch.save(value, self._data)
        except RuntimeError as error:
            # When a write fails, closing torch's zip writer (torch/serialization.py, _open_zipfile_writer_buffer)
            # raises a RuntimeError about its length, which hides the OSError.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        finally:
            torch.serialization.set_crc32_options(crc32)
        return _StorageInfo(Path(self._data.name).name, start, self._data.tell() - start)
