"""What a training stage leaves of a GPU's memory for the servers of the next stage."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16,
         "head_dim": 128, "num_hidden_layers": 8}  # fmt: skip
"""Half a billion parameters, 9 GB with gradients and optimizer."""
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from helpers.tiny_models import random_sequences
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.hardware import release_memory
from megavar.training.loop import train_model
folder = Path(sys.argv[1])
parallel.start(ParallelConfig())
before, total = torch.cuda.mem_get_info()
train = TrainConfig(num_steps=2, batch_sequences=2)
train_model(folder / "model", in_memory(random_sequences(4)), train, ParallelConfig(), PrecisionConfig(), 1,
            folder / "checkpoints", lambda *_: None)
held = torch.cuda.memory_reserved()
release_memory()
after, _ = torch.cuda.mem_get_info()
(folder / "memory.json").write_text(json.dumps({"before": before, "held": held, "after": after}))
parallel.stop()
"""


def test_training_gives_its_memory_back_to_the_driver(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3", tied=False, **SIZES)
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": "0", "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, env=environment)
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert memory["held"] > 0.05 * memory["before"]  # else nothing would show
    assert memory["after"] >= 0.95 * memory["before"]
