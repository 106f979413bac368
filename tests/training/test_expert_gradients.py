"""Experts under tensor parallelism: their gradients, and their part of the norm that all gradients are clipped by."""

import json

import pytest
import torch
from helpers.engine_cases import run_cases
from helpers.ranks import run_ranks
from helpers.tiny_models import random_sequences, reference_gradients, save_tiny_model
from safetensors.torch import load_file

TOLERANCE = 2e-5
NORMALIZER = 100.0
SEQUENCES = random_sequences(6)
GRIDS = {
    "tp2_ep2": {"tensor": 2, "expert": 2, "sequence": True},
    "tp2_ep1": {"tensor": 2, "expert": 1, "sequence": True},
    "dp2_ep2": {"expert": 2},
}
TRAIN = {"num_steps": 1, "batch_sequences": 6, "microbatch_tokens": 64, "loss_normalizer": NORMALIZER}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with what each grid computes, and the gradients of transformers."""
    root = tmp_path_factory.mktemp("experts")
    model = save_tiny_model(root / "model", "qwen3_moe", tied=False, num_hidden_layers=2)
    common = {"model": str(root / "model"), "microbatch_tokens": 64, "normalizer": NORMALIZER}
    cases = []
    for name, grid in GRIDS.items():
        cases.append({**common, "kind": "gradient", "grid": grid, "out": str(root / f"gradient-{name}")})
        for sharded in (True, False):
            out, train = str(root / f"train-{name}-{sharded}"), {**TRAIN, "distributed_optimizer": sharded}
            cases.append({**common, "kind": "train", "grid": grid, "train": train, "out": out})
    run_ranks(2, run_cases, cases, SEQUENCES)
    return root, reference_gradients(model, SEQUENCES, NORMALIZER).gradients


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sharded", [True, False])
def test_the_gradient_norm_counts_every_expert_once(results, grid, sharded):
    root, gradients = results
    expected = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    (found,) = json.loads((root / f"train-{grid}-{sharded}" / "norms.json").read_text())
    assert found == pytest.approx(expected, rel=TOLERANCE)
    experts = [gradient for name, gradient in gradients.items() if ".experts." in name]
    assert torch.stack([gradient.norm() for gradient in experts]).norm() > 0.1 * expected  # a part that would be missed


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_of_experts_equal_transformers(results, grid):
    root, gradients = results
    found = {name: tensor for file in (root / f"gradient-{grid}").glob("*.safetensors")
             for name, tensor in load_file(file).items()}  # fmt: skip
    for name, expected in gradients.items():
        if name.endswith("experts.gate_up_proj"):  # transformers holds the experts of a layer in one tensor
            layer = name.removesuffix(".gate_up_proj")
            parts = [found[f"{layer}.{expert}.{part}_proj.weight"] for expert in range(4) for part in ("gate", "up")]
            given = torch.cat(parts).view_as(expected)
        elif name.endswith("experts.down_proj"):
            layer = name.removesuffix(".down_proj")
            given = torch.stack([found[f"{layer}.{expert}.down_proj.weight"] for expert in range(4)])
        else:
            given = found[name]
        assert (given - expected).abs().max() / expected.abs().max() <= TOLERANCE, name
