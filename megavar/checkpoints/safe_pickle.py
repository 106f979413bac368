"""Reads the pickles of Megatron checkpoints without running what they name.

`.metadata` and the byte entries of a checkpoint are pickles, which can call any function. Here they are read by
unpicklers that know the classes of the format only: nothing but data comes out of a checkpoint, whoever wrote it.
"""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

_OF_METADATA = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_OF_PLANS = ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
_DTYPES = ("bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8",
           "float8_e4m3fn", "float8_e5m2")  # fmt: skip
KNOWN = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in _OF_METADATA),
    *(f"torch.distributed.checkpoint.planner.{name}" for name in _OF_PLANS),
    *(f"torch.{name}" for name in _DTYPES),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",  # looks a name up
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # as Python 3.13 writes it
}
"""All that `.metadata` of real checkpoints names."""
_DAMAGED = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError, TypeError, KeyError, IndexError,
            RuntimeError, OverflowError, MemoryError, RecursionError)  # fmt: skip
"""What unpicklers raise for bytes that are no pickle of theirs."""
MAX_FILE_NAME = 255
_FORCES_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class UnknownClass(ValueError):
    """A pickle names something that is not of the format; reading it could have run code."""


class _KnownClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in KNOWN:
            raise UnknownClass(f"{module}.{name}")
        return super().find_class(module, name)


def load_known(file: Any) -> Any:
    """`pickle.load` of an open file for known classes; raises `UnknownClass` for any other."""
    return _KnownClasses(file).load()


def read_metadata(checkpoint: Path) -> Metadata:
    """Read `.metadata` of a checkpoint.

    Raises:
        ValueError: if it is damaged, names a class that is not of the format, or a file outside of the checkpoint.
    """
    file = checkpoint / ".metadata"
    try:
        with file.open("rb") as content:
            metadata = load_known(content)
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds {type(metadata).__name__}")
        for name, entry in metadata.state_dict_metadata.items():
            _check_entry(name, entry)
        for index, stored in (metadata.storage_data or {}).items():
            _check_stored(index, stored)
    except UnknownClass as error:
        raise _refusal(file, error) from error
    except _DAMAGED as error:
        raise ValueError(f"{file} is damaged ({first_line(error)}); copy the checkpoint again.") from error
    metadata.storage_data = metadata.storage_data or {}
    return metadata


def _check_entry(name: Any, entry: Any) -> None:
    if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
        raise TypeError(f"its entry {name!r:.100} is {type(entry).__name__}")
    if isinstance(entry, TensorStorageMetadata):
        places = [chunk.offsets for chunk in entry.chunks] + [chunk.sizes for chunk in entry.chunks]
        if not all(isinstance(place, torch.Size) and len(place) == len(entry.size) for place in places):
            raise TypeError(f"chunks of {name:.100} are not of its shape")
        if not isinstance(entry.size, torch.Size) or not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{name:.100} has no shape or dtype")


def _check_stored(index: Any, stored: Any) -> None:
    if not isinstance(index, MetadataIndex) or not isinstance(stored, _StorageInfo):
        raise TypeError(f"it maps {type(index).__name__} to {type(stored).__name__}")
    name = stored.relative_path
    if not 0 < len(name) <= MAX_FILE_NAME or Path(name).name != name:
        raise ValueError(f"it refers to {name!r:.100}, which is not a file in its folder")
    if not (isinstance(stored.offset, int) and isinstance(stored.length, int)) or min(stored.offset, stored.length) < 0:
        raise ValueError(f"{stored.relative_path} has bytes {stored.offset!r} + {stored.length!r}")


def _refusal(file: Path | str, error: Exception) -> ValueError:
    return ValueError(
        f"{file} names {error}, which no checkpoint needs and which may run code; it was not read further "
        "(docs/security.md#checkpoints)."
    )


class _Scales(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # which would unpickle anything
            return _load_storage
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        if module == "transformer_engine.common.recipe" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise UnknownClass(f"{module}.{name}")


def _load_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_scales(content: bytes) -> Any:
    """The state that Transformer Engine pickles of delayed scales: tensors, plain values and its recipe.

    Raises:
        ValueError: for anything else, of which nothing is run.
    """
    try:
        return _Scales(io.BytesIO(content)).load()
    except UnknownClass as error:
        raise _refusal("the state of an FP8 layer", error) from error
    except _DAMAGED as error:
        raise ValueError(
            f"the state of an FP8 layer is damaged ({first_line(error)}); copy the checkpoint again."
        ) from error


def first_line(error: Exception) -> str:
    """Name and first line of an exception; torch's go on with a stack."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"


def check_pickles(checkpoint: Path) -> None:
    """Read all that is pickled in a checkpoint besides its tensors, before Megatron does.

    Raises:
        ValueError: naming the file and what it should not name.
    """
    metadata = read_metadata(checkpoint)
    with only_known_classes():
        if (common := checkpoint / "common.pt").is_file():  # megatron-core 0.19 has it among the byte entries
            check_object(common, common.read_bytes())
        for index, stored in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                file = checkpoint / stored.relative_path
                with file.open("rb") as content:
                    content.seek(stored.offset)
                    check_object(file, content.read(stored.length))


def check_object(file: Path | str, content: bytes) -> None:
    """Refuse bytes of torch.save that name more than tensors, plain values and what Megatron declares safe."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), str(error)
        )
        raise _refusal(file, ValueError(reason.strip())) from error
    except _DAMAGED as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); copy the checkpoint again.") from error


@contextmanager
def only_known_classes() -> Iterator[None]:
    """Within it, torch's reader of checkpoints, which Megatron calls, unpickles known classes only.

    torch/distributed/checkpoint/filesystem.py (`read_metadata`) and default_planner.py (`load_bytes`) would run what a
    checkpoint names.
    """
    if not hasattr(filesystem, "pickle") or "load_bytes" not in vars(DefaultLoadPlanner):
        raise RuntimeError(
            f"torch {torch.__version__} reads checkpoints in another way than 2.11 to 2.13 do: "
            "megavar/checkpoints/safe_pickle.py needs to be adapted."
        )
    load_bytes, unsafe = DefaultLoadPlanner.load_bytes, os.environ.pop(_FORCES_UNSAFE, None)

    def load_known_bytes(planner: Any, read_item: Any, value: io.BytesIO) -> None:
        check_object(read_item.dest_index.fqn, value.getvalue())
        load_bytes(planner, read_item, value)  # of the same bytes, which name nothing else

    filesystem.pickle = SimpleNamespace(load=load_known, dump=pickle.dump, dumps=pickle.dumps)
    DefaultLoadPlanner.load_bytes = load_known_bytes  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        filesystem.pickle = pickle
        DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]
        if unsafe is not None:
            os.environ[_FORCES_UNSAFE] = unsafe
