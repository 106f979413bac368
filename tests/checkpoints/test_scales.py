"""The scales that Transformer Engine pickles are read without running what they name."""

import os
import pickle

import pytest
import torch

from megavar.checkpoints.safe_pickle import load_scales

RECIPE = """
import os
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

class Range(NamedTuple):
    forward: float

class Format(Enum):
    HYBRID = Range(448.0)

@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A module of the shape of Transformer Engine's, whose own needs CUDA."""
    for folder in ("transformer_engine", "transformer_engine/common"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "transformer_engine/common/recipe.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    import transformer_engine.common.recipe as module

    yield module
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"):
        monkeypatch.delitem(__import__("sys").modules, name)


def test_scales_and_recipe_come_back(recipe):
    state = {
        "recipe": recipe.DelayedScaling(margin=2),
        "scale_fwd": torch.tensor([3.0, 0.5]),
        "amax_history_fwd": torch.arange(6.0).view(3, 2),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1},
    }
    found = load_scales(pickle.dumps(state))
    assert found["recipe"] == state["recipe"] and found["extra_fp8_variables"] == state["extra_fp8_variables"]
    for name in ("scale_fwd", "amax_history_fwd"):
        assert torch.equal(found[name], state[name])


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "content",
    [
        lambda: pickle.dumps({"recipe": Runs()}),
        lambda: b"\x80\x04\x8c\x20transformer_engine.common.recipe\x8c\x09os.system\x93\x8c\x09touch ran\x85R.",
        lambda: b"\x80\x04\x8c\x20transformer_engine.common.recipe\x8c\x02os\x93.",
        lambda: b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93C" + bytes([len(pickle.dumps(Runs()))])
        + pickle.dumps(Runs()) + b"\x85R.",
        lambda: b"not a pickle",
    ],
)  # fmt: skip
def test_what_else_a_checkpoint_names_is_refused_and_not_run(recipe, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the state of an FP8 layer"):
        load_scales(content())
    assert not (tmp_path / "ran").exists()
