"""What a checkpoint cannot be resumed with is refused by name."""

from dataclasses import replace

import pytest
from helpers.tiny_models import random_sequences, save_tiny_model

from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.training import parallel
from megavar.training.loop import train_model


@pytest.mark.parametrize("distributed", [True, False])
def test_the_other_kind_of_optimizer_is_refused_and_the_same_resumes(tmp_path, distributed):
    save_tiny_model(tmp_path / "model", "qwen3", tied=False)
    parallel.start_alone()
    steps = []

    def train(config: TrainConfig) -> None:
        train_model(
            tmp_path / "model", random_sequences(4), config, ParallelConfig(), PrecisionConfig(dtype="fp32"), 1,
            tmp_path / "checkpoints", lambda step, *_: steps.append(step),
        )  # fmt: skip

    first = TrainConfig(num_steps=1, batch_sequences=2, distributed_optimizer=distributed)
    train(first)
    message = rf"saved with distributed_optimizer={distributed}, now it is {not distributed}; set it back"
    with pytest.raises(ValueError, match=message):
        train(replace(first, num_steps=2, distributed_optimizer=not distributed))
    train(replace(first, num_steps=2))
    parallel.stop()
    assert steps == [1, 2]
