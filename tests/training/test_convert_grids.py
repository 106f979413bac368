"""Converted checkpoints in real Megatron models at every grid: the same bits come back, the same log-probs come out."""

import json
import pickle
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.engine_cases import run_cases
from helpers.ranks import run_ranks
from helpers.tiny_models import random_sequences, reference_gradients, save_tiny_model

from megavar.checkpoints.convert import MAX_SHARD_BYTES, Model, differences, to_hugging_face, to_megatron

TOLERANCE = 2e-5
PARAMETER_TOLERANCE = 1e-5
NORMALIZER = 100.0
SEQUENCES = random_sequences(8)
ONE_GROUP = {"num_key_value_heads": 1}
RAW_ROUTING = {"norm_topk_prob": False}
MODELS = {
    **{f"{family}-{tied}": (family, tied, {}) for family in ("qwen2", "qwen3", "qwen3_moe") for tied in (True, False)},
    "qwen3-one-group": ("qwen3", True, ONE_GROUP),
    "qwen3_moe-raw-routing": ("qwen3_moe", False, RAW_ROUTING),
}
GRIDS = {
    f"tp{tensor}_pp{pipeline}{'_vpp2' if virtual > 1 else ''}_ep{expert}": {
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_pipeline": virtual,
        "expert": expert,
        "sequence": tensor > 1,
    }
    for tensor, pipeline, virtual, expert in [
        *((tensor, pipeline, 1, 1) for tensor, pipeline in product((1, 2, 4), repeat=2)),
        (1, 2, 2, 1),
        (1, 1, 1, 2),
        (2, 1, 1, 2),
        (1, 2, 1, 2),
        (1, 2, 2, 2),
        (2, 2, 1, 2),
        (4, 4, 1, 2),
    ]
}
TRAIN = {
    "epochs": 1.5, "batch_sequences": 4, "microbatch_tokens": 64, "learning_rate": 1e-3, "warmup_ratio": 0.34,
    "weight_decay": 0.1, "clip_grad": 0.5, "adam_eps": 1e-5, "save_interval": 2,
}  # fmt: skip
SCORED = (
    "tp1_pp1_ep1",
    "tp4_pp4_ep1",
    "tp4_pp4_ep2",
    "tp2_pp2_ep1",
    "tp4_pp1_ep1",
    "tp1_pp4_ep1",
    "tp2_pp2_ep2",
    "tp1_pp2_vpp2_ep2",
    "tp1_pp1_ep2",
)
TRAINED = ("tp1_pp1_ep1", "tp2_pp1_ep1", "tp2_pp2_ep2", "tp1_pp2_vpp2_ep2", "tp1_pp1_ep2")


def is_large(grid: str) -> bool:
    """Of more than four ranks, that is of sixteen."""
    return GRIDS[grid]["tensor"] * GRIDS[grid]["pipeline"] > 4


def fits(model: str, name: str) -> bool:
    (family, _, changes), grid = MODELS[model], GRIDS[name]
    return (
        (grid["expert"] == 1 or family == "qwen3_moe")
        and (changes != ONE_GROUP or grid["tensor"] == 1)
        and (changes != RAW_ROUTING or grid["tensor"] == grid["pipeline"] == 1)
        # Only where most can go wrong:
        and (not is_large(name) or model == "qwen3-True" or (model == "qwen3_moe-True" and name.startswith("tp4_pp4")))
    )


PAIRS = [(model, name) for model in MODELS for name in GRIDS if fits(model, name)]


def with_marks(pairs: list[tuple[str, str]]) -> list:
    return [pytest.param(*pair, marks=[pytest.mark.slow] if is_large(pair[1]) else []) for pair in pairs]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with every model, converted too, and what transformers computes with each."""
    root, references = tmp_path_factory.mktemp("grids"), {}
    for model, (family, tied, changes) in MODELS.items():
        reference = save_tiny_model(root / model, family, tied, **changes)
        references[model] = reference_gradients(reference, SEQUENCES, NORMALIZER)
        to_megatron(root / model, root / f"{model}.megatron", None, False)
    return root, references


@pytest.fixture(scope="module")
def on_4_ranks(models):
    run_ranks(4, run_cases, cases_of(models[0], large=False), SEQUENCES)


@pytest.fixture(scope="module")
def on_16_ranks(models):
    run_ranks(16, run_cases, cases_of(models[0], large=True), SEQUENCES)


@pytest.fixture
def results(request, models, grid):
    """The folder of `models` with what the ranks of a grid compute from the checkpoints."""
    request.getfixturevalue("on_16_ranks" if is_large(grid) else "on_4_ranks")
    return models


def cases_of(root: Path, large: bool) -> list[dict]:
    cases = []
    for name in (name for name in GRIDS if is_large(name) == large):
        for model in (model for model in MODELS if fits(model, name)):
            common = {"grid": GRIDS[name], "model": str(root / f"{model}.megatron"), "microbatch_tokens": 64}
            cases.append({**common, "kind": "reload", "out": str(root / f"reload-{model}-{name}")})
            if name in SCORED:
                cases.append({**common, "kind": "score", "out": str(root / f"score-{model}-{name}")})
            if name in TRAINED and MODELS[model][0] == "qwen3_moe":
                out = str(root / f"gradient-{model}-{name}")
                cases.append({**common, "kind": "gradient", "normalizer": NORMALIZER, "out": out})
                cases.append({**common, "kind": "train", "train": TRAIN, "out": str(root / f"train-{model}-{name}")})
    return cases


@pytest.mark.parametrize(("model", "grid"), with_marks(PAIRS))
def test_the_bits_come_back_from_every_grid(results, tmp_path, model, grid):
    root, _ = results
    to_hugging_face(root / f"reload-{model}-{grid}", tmp_path / "back", root / model, MAX_SHARD_BYTES, False)
    assert list(differences(Model(root / model), Model(tmp_path / "back"))) == []


@pytest.mark.parametrize(("model", "grid"), with_marks([pair for pair in PAIRS if pair[1] in SCORED]))
def test_log_probs_of_a_converted_checkpoint_equal_transformers(results, model, grid):
    root, references = results
    found = pickle.loads((root / f"score-{model}-{grid}").read_bytes())
    for expected, logps in zip(references[model].logps, found, strict=True):
        assert (torch.from_numpy(logps) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("grid", TRAINED)
@pytest.mark.parametrize("model", ["qwen3_moe-True", "qwen3_moe-False"])
def test_gradients_of_a_mixture_equal_transformers(results, model, grid):
    root, references = results
    folder = root / f"gradient-{model}-{grid}"
    assert json.loads((folder / "loss.json").read_text()) == pytest.approx(references[model].loss, rel=TOLERANCE)
    found = Model(Path(folder))
    gradients = {
        name: tensor
        for operator, index in found.pieces()
        for (name, _), tensor in zip(found.infos(operator, index), found.tensors(operator, index), strict=True)
    }
    for name, expected in references[model].gradients.items():
        if name.endswith("experts.gate_up_proj"):  # transformers holds the experts of a layer in one tensor
            experts = [f"{name.removesuffix('.gate_up_proj')}.{expert}" for expert in range(4)]
            parts = [gradients[f"{expert}.{part}_proj.weight"] for expert in experts for part in ("gate", "up")]
            given = torch.cat(parts).view_as(expected)
        elif name.endswith("experts.down_proj"):
            given = torch.stack(
                [gradients[f"{name.removesuffix('.down_proj')}.{e}.down_proj.weight"] for e in range(4)]
            )
        else:
            given = gradients[name]
        assert (given - expected).abs().max() / expected.abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("grid", TRAINED[1:])
@pytest.mark.parametrize("model", ["qwen3_moe-True", "qwen3_moe-False"])
def test_three_adamw_steps_of_a_mixture_are_the_same_at_every_grid(results, model, grid):
    root, _ = results
    first, second = (root / f"train-{model}-{name}" for name in (TRAINED[0], grid))
    losses = [json.loads((folder / "losses.json").read_text()) for folder in (first, second)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    whole, split = Model(first / "hf"), Model(second / "hf")
    for operator, index in whole.pieces():
        pair = zip(whole.tensors(operator, index), split.tensors(operator, index), strict=True)
        assert all((one - other).abs().max() <= PARAMETER_TOLERANCE for one, other in pair), operator
