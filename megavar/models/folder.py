"""A Hugging Face model folder: its tensors by name, checked before use, and a new one written whole.

Tensors are read one at a time into memory of their own: a memory-mapped file would stay resident beside the model
made from it. A folder is written aside and renamed.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavar.models.dims import ModelDims
from megavar.models.ops import Operator

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HuggingFaceFolder:
    """Read access to the tensors of a folder.

    Raises:
        ValueError: naming the file, if an index or safetensors file is missing, truncated or not consistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_of_key = self._read_index()
        self._handles: dict[str, Any] = {}
        self._headers: dict[str, dict[str, tuple[list[int], torch.dtype, int]]] = {}
        for file in sorted(set(self._file_of_key.values())):
            handle = self._open(file)
            lost = [key for key, name in self._file_of_key.items() if name == file and key not in handle.keys()]  # noqa: SIM118
            if lost:
                raise ValueError(f"{path / file} lacks {lost[0]}, which {INDEX} places there; copy the folder anew.")

    def _read_index(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            return dict(json.loads((self.path / INDEX).read_text())["weight_map"])
        if not (self.path / SINGLE).is_file():
            raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}; give a folder with safetensors weights.")
        return dict.fromkeys(self._open_handle(SINGLE).keys(), SINGLE)

    def _open_handle(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path / file} is missing, truncated or no safetensors file ({error}); copy it anew."
            ) from error

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            self._handles[file] = self._open_handle(file)
        return self._handles[file]

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of_key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._open(self._file_of_key[key]).get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        """A tensor, in the file's dtype, on the CPU."""
        file = self._file_of_key[key]
        shape, dtype, start = self._header(file)[key]
        found = torch.empty(shape, dtype=dtype)
        with open(self.path / file, "rb") as data:
            data.seek(start)
            num_bytes = data.readinto(found.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if num_bytes != found.nbytes:
            raise ValueError(f"{self.path / file} ended inside {key}; it changed while being read.")
        return found

    def _header(self, file: str) -> dict[str, tuple[list[int], torch.dtype, int]]:
        """(shape, dtype, first byte in the file) of each tensor of a file."""
        if file not in self._headers:
            with open(self.path / file, "rb") as data:
                length = int.from_bytes(data.read(8), "little")
                rows = json.loads(data.read(length))
            rows.pop("__metadata__", None)
            odd = sorted({row["dtype"] for row in rows.values()} - _DTYPES.keys())
            if odd:
                raise ValueError(f"{self.path / file} holds tensors of type {odd[0]}; known are {', '.join(_DTYPES)}.")
            self._headers[file] = {
                key: (row["shape"], _DTYPES[row["dtype"]], 8 + length + row["data_offsets"][0])
                for key, row in rows.items()
            }
        return self._headers[file]

    def check(self, operators: list[Operator], dims: ModelDims) -> None:
        """Compare names and shapes with what the model's operators expect.

        Raises:
            ValueError: naming the first missing, unknown or misshapen tensor and its file.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for operator in operators:
            for name, shape in zip(operator.hf_names, operator.hf_shapes(dims), strict=True):
                layers = range(dims.num_layers) if "{layer}" in name else range(1)
                expected.update({name.format(layer=layer): shape for layer in layers})
        tied_copy = {"lm_head.weight"} if dims.tied_embeddings else set()
        missing, extra = sorted(expected.keys() - self.keys()), sorted(self.keys() - expected.keys() - tied_copy)
        if missing or extra:
            name = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
            raise ValueError(
                f"{self.path} {name} ({len(missing)} missing, {len(extra)} unknown); "
                f"its config.json says {dims.family} with {dims.num_layers} layers."
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"{self.path / self._file_of_key[name]}: {name} is {self.shape(name)}, config.json implies {shape}."
                )


def copy_side_files(source: Path, target: Path, dtype: str) -> None:
    """Carry everything but weights over (config, generation config, tokenizer), with the config's dtype set."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in ("README.md", ".gitattributes"):
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def sync_folder(folder: Path) -> None:
    """Put a folder's files and its entries on disk."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
