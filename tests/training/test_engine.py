"""The engine against transformers: log-probs, gradients and AdamW steps at every split of the same work."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.engine_cases import run_cases
from helpers.ranks import run_ranks
from helpers.tiny_models import random_sequences, reference_gradients, reference_logps, save_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megavar.packing import data_order

TOLERANCE = 2e-5
PARAMETER_TOLERANCE = 1e-5
NORMALIZER = 100.0
MODELS = [(family, tied) for family in ("qwen2", "qwen3") for tied in (False, True)]
GRIDS = {
    "tp1": (1, {}),
    "dp4": (4, {}),
    "tp2_dp2": (4, {"tensor": 2, "sequence": False}),
    "pp2_dp2": (4, {"pipeline": 2}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2, "sequence": False}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2}),
    "tp4": (4, {"tensor": 4, "sequence": False}),
    "pp2_vpp2_dp2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2_tp2": (4, {"context": 2, "tensor": 2, "sequence": False}),
    "cp2_pp2": (4, {"context": 2, "pipeline": 2}),
}
BUDGETS = {"tp1": 200, "tp2_pp2": 400, "pp2_dp2": 48}  # tokens a microbatch; 64 where not named
SEQUENCES = random_sequences(12)
TRAIN = {
    "epochs": 1.0,
    "batch_sequences": 4,
    "microbatch_tokens": 64,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.34,
    "weight_decay": 0.1,
    "clip_grad": 0.5,
    "save_interval": 2,
    "adam_eps": 1e-5,
}


def name_of(family: str, tied: bool) -> str:
    return f"{family}-{'tied' if tied else 'untied'}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return root, {name_of(*model): save_tiny_model(root / name_of(*model), *model) for model in MODELS}


@pytest.fixture(scope="module")
def references(models):
    return {name: reference_gradients(model, SEQUENCES, NORMALIZER) for name, model in models[1].items()}


@pytest.fixture(scope="module")
def results(request, models):
    """Folder with what every grid computed: scores and gradients for every model, one training run a grid.

    Only the grids of the selected tests; a test without one compares with tp1.
    """
    root, _ = models
    tests = [item for item in request.session.items if item.module is request.module]
    asked = {item.callspec.params.get("grid", "tp1") if hasattr(item, "callspec") else "tp1" for item in tests}
    for ranks in (1, 4):
        cases = []
        for grid_name, (grid_ranks, grid) in GRIDS.items():
            if grid_ranks != ranks or grid_name not in asked:
                continue
            common = {"grid": grid, "microbatch_tokens": BUDGETS.get(grid_name, 64), "normalizer": NORMALIZER}
            for model in MODELS:
                name = name_of(*model)
                for kind in ("score", "gradient"):
                    out = str(root / f"{kind}-{name}-{grid_name}")
                    cases.append({"kind": kind, "model": str(root / name), "out": out, **common})
            train = {**TRAIN, "microbatch_tokens": common["microbatch_tokens"]}
            out = str(root / f"train-{grid_name}")
            cases.append({"kind": "train", "model": str(root / "qwen3-tied"), "out": out, "train": train, "grid": grid})
        if cases:
            run_ranks(ranks, run_cases, cases, SEQUENCES)
    return root


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: name_of(*model))
def test_logps_equal_transformers(references, results, model, grid):
    name = name_of(*model)
    found = pickle.loads((results / f"score-{name}-{grid}").read_bytes())
    for expected, logps in zip(references[name].logps, found, strict=True):
        assert (torch.from_numpy(logps) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: name_of(*model))
def test_gradients_of_the_weighted_loss_equal_transformers(references, results, model, grid):
    name = name_of(*model)
    folder = results / f"gradient-{name}-{grid}"
    assert json.loads((folder / "loss.json").read_text()) == pytest.approx(references[name].loss, rel=TOLERANCE)
    found = load_tensors(folder)
    for key, gradient in references[name].gradients.items():
        difference = (found[key] - gradient).abs().max() / gradient.abs().max()
        assert difference <= TOLERANCE, key


@pytest.mark.parametrize("grid", GRIDS)
def test_parameters_after_three_adamw_steps_are_the_same_at_every_split(adamw, results, grid):
    expected, losses = adamw
    found = load_tensors(results / f"train-{grid}" / "hf")
    assert json.loads((results / f"train-{grid}" / "losses.json").read_text()) == pytest.approx(losses, rel=TOLERANCE)
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= PARAMETER_TOLERANCE, key


@pytest.fixture(scope="module")
def adamw(models) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training by transformers and torch's AdamW: no weight decay on vectors, warm-up, cosine, clipping."""
    model = AutoModelForCausalLM.from_pretrained(models[0] / "qwen3-tied", dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=TRAIN["adam_eps"])
    normalizer = 4 * sum(s.weight * len(s.target_ids) for s in SEQUENCES) / len(SEQUENCES)
    losses = []
    peak, low = 1e-3, 1e-4
    rates = [peak, low + (peak - low) * (1 + math.cos(math.pi * 0.5)) / 2, low]
    for step in range(3):
        batch = [SEQUENCES[index] for index in data_order(12, 4 * step, 4 * step + 4, seed=1)]
        loss = -sum((s.weight * reference_logps(model, s)).sum() for s in batch) / normalizer
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        losses.append(loss.item())
    return {key: parameter.detach() for key, parameter in model.named_parameters()}, losses


def test_resume_at_the_same_split_repeats_the_losses_exactly(models, tmp_path):
    """Over six steps with warm-up and decay: an off-by-one of the schedule would show in the fifth."""
    case = {
        "kind": "train",
        "model": str(models[0] / "qwen3-tied"),
        "grid": GRIDS["tp2_pp2"][1],
        "train": {**TRAIN, "epochs": 2.0},
    }
    straight, resumed = {**case, "out": str(tmp_path / "straight")}, {**case, "out": str(tmp_path / "resumed")}
    run_ranks(4, run_cases, [straight, {**resumed, "stop_after": 3}], SEQUENCES)
    run_ranks(4, run_cases, [resumed], SEQUENCES)
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("straight", "resumed")]
    assert len(losses[0]) == 6 and losses[1] == losses[0][2:]
    left, right = load_tensors(tmp_path / "straight" / "hf"), load_tensors(tmp_path / "resumed" / "hf")
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_resume_at_another_split_continues_the_training(results, models):
    train = {**TRAIN, "microbatch_tokens": 64}
    case = {"kind": "train", "model": str(models[0] / "qwen3-tied"), "train": train, "out": str(results / "moved")}
    run_ranks(4, run_cases, [{**case, "grid": GRIDS["tp2_pp2"][1], "stop_after": 3}], SEQUENCES)
    run_ranks(2, run_cases, [{**case, "grid": {"pipeline": 2}}], SEQUENCES)
    moved, whole = load_tensors(results / "moved" / "hf"), load_tensors(results / "train-tp1" / "hf")
    for key, tensor in whole.items():
        assert (moved[key] - tensor).abs().max() <= PARAMETER_TOLERANCE, key


def test_recomputation_temperature_and_packing_order_change_nothing_else(models, results):
    root, references = models
    case = {"grid": {}, "model": str(root / "qwen3-untied"), "microbatch_tokens": 100, "normalizer": NORMALIZER}
    outs = {how: str(root / f"recompute-{how}") for how in ("none", "selective", "full")}
    reversed_sequences = SEQUENCES[::-1]
    run_ranks(
        1,
        run_cases,
        [{**case, "kind": "gradient", "recompute": how, "out": out} for how, out in outs.items()]
        + [{**case, "kind": "score", "temperature": 0.7, "out": str(root / "warm")}],
        reversed_sequences,
    )
    gradients = {how: load_tensors(Path(out)) for how, out in outs.items()}
    forward = load_tensors(root / "gradient-qwen3-untied-tp1")
    for how in outs:
        for key, tensor in forward.items():
            assert (gradients[how][key] - tensor).abs().max() / tensor.abs().max() <= TOLERANCE, (how, key)
    warm = pickle.loads((root / "warm").read_bytes())
    for sequence, logps in zip(reversed_sequences, warm, strict=True):
        expected = reference_logps(references["qwen3-untied"], sequence, temperature=0.7).detach()
        assert (torch.from_numpy(logps) - expected).abs().max() <= TOLERANCE


def test_a_changed_weight_is_seen(models):
    """The oracle itself can tell: halving one weight moves the loss by more than the tolerance."""
    reference = models[1]["qwen3-tied"]
    sequence = SEQUENCES[0]
    logps = reference_logps(reference, sequence)
    halved = replace(sequence, weight=sequence.weight / 2)
    loss, changed = ((s.weight * logps).sum() / NORMALIZER for s in (sequence, halved))
    assert abs(loss - changed) / abs(loss) > TOLERANCE
