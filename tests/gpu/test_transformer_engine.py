"""What needs CUDA and Transformer Engine: packed TE attention, bf16 against float32, FP8 recipes against bf16."""

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
BF16_TOLERANCE = 0.05
"""Largest difference of a log-prob, nats: bf16 has 8 bits, and these models' logits reach tens."""
FP8_TOLERANCE = 0.5
LOSS_TOLERANCE = 0.03
"""Relative, of each loss of eight training steps."""
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
model, sequences, out, recipe = sys.argv[1:]
parallel.start(ParallelConfig())
scorer = Scorer(Model(Path(model)), ParallelConfig(), PrecisionConfig(recipe))
given = pickle.loads(Path(sequences).read_bytes())
found = scorer.score(in_memory(given), range(len(given)), 1.0, 512)
Path(out).write_bytes(pickle.dumps([found[index] for index in range(len(given))]))
parallel.stop()
"""
TRAIN = """
import pickle, sys
from pathlib import Path
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.training import loop, parallel
from megavar.sequences import in_memory
model, sequences, out, recipe = sys.argv[1:]
parallel.start(ParallelConfig())
given, losses = pickle.loads(Path(sequences).read_bytes()), []
train = TrainConfig(num_steps=8, batch_sequences=len(given), microbatch_tokens=512, learning_rate=1e-3)
loop.train_model(Path(model), in_memory(given), train, ParallelConfig(), PrecisionConfig(recipe), 1,
                 Path(out + "-checkpoints"), lambda step, steps, metrics: losses.append(metrics["loss"]))
Path(out).write_bytes(pickle.dumps(losses))
parallel.stop()
"""


def run(script: str, folder: Path, name: str, recipe: str) -> list:
    """What `script` writes of the model and sequences in `folder`, in a process of its own."""
    out = folder / name
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": "0"}  # fmt: skip
    arguments = [str(folder / "model"), str(folder / "sequences.pkl"), str(out), recipe]
    subprocess.run([sys.executable, str(folder / "script.py"), *arguments], check=True, env=environment)
    return pickle.loads(out.read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    model = save_tiny_model(path / "model", "qwen3", tied=False, **SIZES)
    sequences = random_sequences(16, longest=120)
    (path / "sequences.pkl").write_bytes(pickle.dumps(sequences))
    with torch.no_grad():
        reference = [reference_logps(model, sequence).numpy() for sequence in sequences]
    return path, reference


def largest(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def test_packed_transformer_engine_layers_in_bf16_equal_float32_transformers(folder):
    if not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    path, reference = folder
    assert largest(run(SCORE, path, "bf16", "bf16"), reference) <= BF16_TOLERANCE


def skip_without(recipe: str) -> None:
    try:
        check_recipe("precision.recipe", recipe)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("recipe", ["fp8_current", "fp8_blockwise", "mxfp8"])
def test_fp8_scores_stay_close_to_bf16(folder, recipe):
    skip_without(recipe)
    path, reference = folder
    found = run(SCORE, path, recipe, recipe)
    assert largest(found, reference) <= FP8_TOLERANCE
    assert largest(found, run(SCORE, path, "bf16-again", "bf16")) > 0  # FP8 was really used


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.values])
def test_losses_of_training_in_fp8_stay_close_to_bf16(folder, recipe):
    skip_without(recipe)
    losses, expected = (run(TRAIN, folder[0], f"train-{name}", name) for name in (recipe, "bf16"))
    assert losses == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert losses != expected  # FP8 was really used
