"""What needs CUDA and Transformer Engine: packed TE attention, bf16 against float32, FP8 recipes against bf16.

All precisions share two processes: importing takes most of the time of a small one.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import random_sequences, reference_logps, save_tiny_model

from megavar.training.precision import RECIPES, check_recipe, has_transformer_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SCORED_IN_8_BITS = ("fp8_current", "fp8_blockwise", "mxfp8")
TRAINED_IN_8_BITS = tuple(name for name, recipe in RECIPES.items() if recipe.values)
FP32_TOLERANCE = 1e-4
BF16_TOLERANCE = 0.05
"""Largest difference of a log-prob, nats: bf16 has 8 bits, and these models' logits reach tens."""
FP8_TOLERANCE = 0.5
LOSS_TOLERANCE = 0.03
"""Relative, of each loss of eight training steps."""
RESUMED_TOLERANCE = 1e-3
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
SCORE = """
import pickle, sys
from pathlib import Path
from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.training import parallel
from megavar.sequences import in_memory
from megavar.training.scorer import Scorer
from megavar.checkpoints.convert import Model
folder, out, *recipes = sys.argv[1:]
parallel.start(ParallelConfig())
given, results = pickle.loads((Path(folder) / "sequences.pkl").read_bytes()), {}
for recipe in recipes:
    try:
        scorer = Scorer(Model(Path(folder) / "model"), ParallelConfig(), PrecisionConfig(recipe))
        found = scorer.score(in_memory(given), range(len(given)), 1.0, 512)
        scorer.release()
        results[recipe] = [found[index] for index in range(len(given))]
    except Exception as error:
        results[recipe] = repr(error)
    Path(out).write_bytes(pickle.dumps(results))
parallel.stop()
"""
TRAIN = """
import pickle, shutil, sys
from pathlib import Path
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.training import loop, parallel
from megavar.sequences import in_memory
folder, out, *names = sys.argv[1:]
parallel.start(ParallelConfig())
given, results = pickle.loads((Path(folder) / "sequences.pkl").read_bytes()), {}
def train(name, recipe, **settings):
    losses, checkpoints = [], Path(out + name)
    train = TrainConfig(num_steps=8, batch_sequences=len(given), microbatch_tokens=512, learning_rate=1e-3,
                        save_interval=4, **settings)
    loop.train_model(Path(folder) / "model", in_memory(given), train, ParallelConfig(), PrecisionConfig(recipe), 1,
                     checkpoints, lambda step, steps, metrics: losses.append(metrics["loss"]))
    return losses
for name in names:
    try:
        what, _, again = name.partition("-")
        recipe, moments = ("bf16", "bf16") if what == "moments" else (what, "fp32")
        if again:
            train(name, recipe, optimizer_moments=moments)
            shutil.rmtree(Path(out + name) / "step_000008")
        results[name] = train(name, recipe, optimizer_moments=moments)
    except Exception as error:
        results[name] = repr(error)
    Path(out).write_bytes(pickle.dumps(results))
parallel.stop()
"""


def run(script: str, folder: Path, name: str, *arguments: str) -> dict[str, list]:
    """What `script`, in one process of its own, finds by each argument of the model and sequences in `folder`."""
    out = folder / name
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": "0"}  # fmt: skip
    command = [sys.executable, str(folder / "script.py"), str(folder), str(out), *arguments]
    subprocess.run(command, check=False, env=environment)
    return pickle.loads(out.read_bytes())


def available(*recipes: str) -> list[str]:
    """Those that this machine has."""
    return [recipe for recipe in recipes if not reason_without(recipe)]


def reason_without(recipe: str) -> str:
    try:
        check_recipe("precision.recipe", recipe)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    model = save_tiny_model(path / "model", "qwen3", tied=False, **SIZES)
    sequences = random_sequences(16, longest=120)
    (path / "sequences.pkl").write_bytes(pickle.dumps(sequences))
    with torch.no_grad():
        reference = [reference_logps(model, sequence).numpy() for sequence in sequences]
    return path, reference


@pytest.fixture(scope="module")
def scores(folder):
    return run(SCORE, folder[0], "scores", "fp32", *available("bf16", *SCORED_IN_8_BITS))


@pytest.fixture(scope="module")
def losses(folder):
    names = available("bf16", *TRAINED_IN_8_BITS)
    names += ["fp8_delayed-resumed"] if "fp8_delayed" in names else []
    names += ["moments", "moments-resumed"] if has_transformer_engine() else []
    return run(TRAIN, folder[0], "losses", *names)


def largest(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert not isinstance(found, str), found
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def test_float32_by_linear_attention_equals_transformers(scores, folder):
    assert largest(scores["fp32"], folder[1]) <= FP32_TOLERANCE


def test_packed_transformer_engine_layers_in_bf16_equal_float32_transformers(scores, folder):
    if not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    assert largest(scores["bf16"], folder[1]) <= BF16_TOLERANCE


@pytest.mark.parametrize("recipe", SCORED_IN_8_BITS)
def test_fp8_scores_stay_close_to_bf16(scores, folder, recipe):
    if reason := reason_without(recipe):
        pytest.skip(reason)
    assert largest(scores[recipe], folder[1]) <= FP8_TOLERANCE
    assert largest(scores[recipe], scores["bf16"]) > 0  # FP8 was really used


@pytest.mark.parametrize("recipe", TRAINED_IN_8_BITS)
def test_losses_of_training_in_fp8_stay_close_to_bf16(losses, recipe):
    if reason := reason_without(recipe):
        pytest.skip(reason)
    assert losses[recipe] == pytest.approx(losses["bf16"], rel=LOSS_TOLERANCE)
    assert losses[recipe] != losses["bf16"]  # FP8 was really used


def test_moments_in_bf16_train_alike(losses):
    if not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    assert losses["moments"] == pytest.approx(losses["bf16"], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("what", ["moments", "fp8_delayed"])
def test_a_training_goes_on_where_it_was_stopped(losses, what):
    """Also with optimizer states, and scales, that are not float32 tensors of the model's own."""
    if reason := reason_without("fp8_delayed"):
        pytest.skip(reason)
    assert losses[f"{what}-resumed"] == pytest.approx(losses[what][4:], rel=RESUMED_TOLERANCE)
