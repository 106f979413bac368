"""A Megatron checkpoint (format `torch_dist`) read and written piece by piece, without Megatron and without a model.

The format is torch's distributed checkpoint: `.metadata` says which chunk of a tensor is where in the `.distcp` files.
Megatron loads it at any grid, each rank reading what it needs. Beside the weights stand `megavar.json` (what was
converted) and `huggingface/` (configuration and tokenizer), so that the way back needs nothing else.
"""

import json
import pickle
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megavar.checkpoints.huggingface import FileInParts, TensorInfo
from megavar.models.dims import ModelDims
from megavar.models.ops import Index, Operator, leading_axes, piece_shape

CHUNK_BYTES = 2**28
"""A larger piece is stored as several chunks of rows, which bounds the memory that reading one takes."""
FILE_BYTES = 2**32
"""A file ends after the chunk that makes it larger."""
DESCRIPTION = "megavar.json"
SIDE_FILES = "huggingface"
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = {"common_backend": "torch", "common_backend_version": 1}
_WEIGHTS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class Description:
    """What `megavar.json` says of a checkpoint beyond its tensors."""

    tied_head_written: bool
    """Whether the Hugging Face source held a copy of its tied embedding as lm_head.weight."""
    source_digest: str | None
    """Digest of the source's tensors (`convert.Digest`), or None for weights that were trained."""

    def write(self, checkpoint: Path) -> None:
        """Put the description into a checkpoint."""
        (checkpoint / DESCRIPTION).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, checkpoint: Path) -> "Description | None":
        """The description in a checkpoint, or None if there is none.

        Raises:
            ValueError: if it is damaged.
        """
        file = checkpoint / DESCRIPTION
        try:
            return cls(**json.loads(file.read_text())) if file.is_file() else None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); remove it and give --hf-template.") from error


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint in `path`: itself, or the newest that Megatron's `latest_checkpointed_iteration.txt` names."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        name = tracker.read_text().strip()
        path = path / (f"iter_{int(name):07d}" if name.isdigit() else name)
    return path if (path / ".metadata").is_file() else None


class ShardedCheckpoint:
    """Read access to the weights of a checkpoint; other state in it (optimizer) is not touched.

    Raises:
        ValueError: naming the file that is missing, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        found = find_checkpoint(path)
        if found is None:
            raise ValueError(f"{path} holds no Megatron checkpoint of format torch_dist: there is no .metadata in it.")
        self.path = found
        self._reader = FileSystemReader(found)
        try:
            metadata = self._reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError, TypeError) as error:
            raise ValueError(f"{found / '.metadata'} is damaged ({error}); copy the checkpoint anew.") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(_WEIGHTS)
        }
        self._chunks_at: dict[str, dict[Index, list[ChunkStorageMetadata]]] = {}
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            if not (found / name).is_file() or (found / name).stat().st_size < end:
                raise ValueError(f"{found / name} is missing or truncated; copy the checkpoint anew.")

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of a parameter with its leading axes."""
        entry = self._tensors[name]
        return TensorInfo(entry.properties.dtype, tuple(entry.size))

    def piece(self, operator: Operator, index: Index, dims: ModelDims) -> Tensor:
        """One piece of a parameter, on the CPU; rows that pad the vocabulary are left out.

        Raises:
            ValueError: naming the parameter, if the checkpoint's files do not hold all of it.
        """
        name, shape = operator.megatron_name, piece_shape(operator, dims)
        entry = self._near(name, index)
        found = torch.empty(shape, dtype=entry.properties.dtype)
        target = found.view(*[1] * len(index), *shape)
        origin = torch.Size([*index, *[0] * len(shape)])
        wanted = [ChunkStorageMetadata(offsets=origin, sizes=target.shape)]
        reads = create_read_items_for_chunk_list(name, entry, wanted)
        if sum(read.lengths.numel() for read in reads) != found.numel():
            raise ValueError(f"{self.path} holds only a part of {name}{list(index)}; was every rank's file copied?")
        try:
            self._reader.read_data(LoadPlan(reads), _Into(target))
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path}: {name}{list(index)} cannot be read: {error}; copy it anew.") from error
        return found

    def _near(self, name: str, index: Index) -> TensorStorageMetadata:
        """A parameter's entry with those of its chunks that reach into one piece; torch looks at every one given."""
        if name not in self._chunks_at:
            found: dict[Index, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self._tensors[name].chunks:
                bounds = zip(chunk.offsets[: len(index)], chunk.sizes[: len(index)], strict=True)
                for place in product(*(range(start, start + size) for start, size in bounds)):
                    found[place].append(chunk)
            self._chunks_at[name] = found
        return replace(self._tensors[name], chunks=self._chunks_at[name].get(index, []))

    def check(self, operators: list[Operator], dims: ModelDims) -> None:
        """Compare names and shapes with what the model's operators expect.

        Raises:
            ValueError: naming the first missing, unknown or misshapen parameter.
        """
        expected = {row.megatron_name: (*leading_axes(row, dims), *piece_shape(row, dims)) for row in operators}
        missing, extra = sorted(expected.keys() - self._tensors.keys()), sorted(self._tensors.keys() - expected.keys())
        if missing or extra:
            name = f"lacks {missing[0]}" if missing else f"has an unknown parameter {extra[0]}"
            raise ValueError(
                f"{self.path} {name} ({len(missing)} missing, {len(extra)} unknown); its Hugging Face configuration "
                f"says {dims.family} with {dims.num_layers} layers, "
                f"{'tied' if dims.tied_embeddings else 'untied'} embeddings."
            )
        for name, shape in expected.items():
            given = self.info(name).shape
            padded = name in ("embedding.word_embeddings.weight", "output_layer.weight") and given[0] > shape[0]
            if given[padded:] != shape[padded:]:
                raise ValueError(f"{self.path}: {name} is {given}, its Hugging Face configuration implies {shape}.")


class _Into(DefaultLoadPlanner):
    """Tells torch's reader where chunks go: into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        found = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(axis, start, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class ShardedWriter:
    """Writes the pieces of a model as one checkpoint, in any order; none is held.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path, dims: ModelDims) -> None:
        self._folder, self._dims = folder, dims
        self._metadata = Metadata(state_dict_metadata={}, storage_data={})
        self._data: FileInParts | None = None
        self._num_files = 0

    def write(self, operator: Operator, index: Index, piece: Tensor, dtype: torch.dtype) -> None:
        """Write a piece, cast to `dtype`."""
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
            if part.untyped_storage().nbytes() != part.nbytes:  # torch.save would write all of a view's storage
                part = part.clone()
            offsets = torch.Size([*index, start, *[0] * (piece.dim() - 1)])
            sizes = torch.Size([*[1] * len(index), *part.shape])
            entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            place = MetadataIndex(name, offset=offsets, index=len(entry.chunks) - 1)
            self._metadata.storage_data[place] = self._append(part.view(sizes))
        if ".linear_" in name and name.endswith(".weight"):
            self._write_extra_state(name.removesuffix("weight"), index, leading_axes(operator, self._dims))
        if ".linear_qkv.weight" in name:
            attention = name.removesuffix("linear_qkv.weight") + "core_attention."
            self._write_extra_state(attention, index, leading_axes(operator, self._dims))

    def _write_extra_state(self, module: str, index: Index, sizes: Index) -> None:
        """An empty extra state (scales of FP8), which Megatron wants to find for every layer that can have one."""
        key = f"{module}_extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
        self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self._metadata.storage_data[MetadataIndex(key)] = self._append([None])

    def finish(self) -> None:
        """Write what makes the files a checkpoint."""
        if self._data is not None:
            self._data.close()
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps({**_BACKEND, **_COMMON}))
        with open(self._folder / ".metadata", "wb") as file:
            pickle.dump(self._metadata, file)

    def _append(self, value: Tensor | list[None]) -> _StorageInfo:
        if self._data is None or self._data.tell() > FILE_BYTES:
            if self._data is not None:
                self._data.close()
            self._data = FileInParts(self._folder / f"__0_{self._num_files}.distcp", "w")
            self._num_files += 1
        start = self._data.tell()
        checked = torch.serialization.get_crc32_options()
        try:
            torch.serialization.set_crc32_options(False)  # torch never looks at them, and they take most of the time
            torch.save(value, self._data)
        except RuntimeError as error:
            # When a write fails, torch's zip writer complains of its length on the way out: that hides the cause.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        finally:
            torch.serialization.set_crc32_options(checked)
        return _StorageInfo(Path(self._data.name).name, start, self._data.tell() - start)
