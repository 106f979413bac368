"""The integrals of examples/exact_bias.py against sums over everything that can be drawn."""

import importlib.util
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.made_scores import weigh

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("exact_bias", ROOT / "examples" / "exact_bias.py")
exact = importlib.util.module_from_spec(SPEC)
sys.modules["exact_bias"] = exact  # dataclasses look their module up
SPEC.loader.exec_module(exact)
RESULTS = ROOT / "docs" / "evidence" / "exact_bias.json"


@pytest.fixture(scope="module")
def world():
    return exact.make_world(2, 4.0, 0)


@pytest.mark.parametrize("ratio", exact.RATIOS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_moments_of_the_weights_are_those_of_all_draws(world, ratio, count):
    """Of every K-tuple of the seven traces, weighed by the objective itself."""
    weights, products = np.zeros(7), np.zeros((7, 7))
    for drawn in map(list, product(range(7), repeat=count)):
        scores = [exact.Score("q", k, 1, *_columns(world.scores[z]), None, None) for k, z in enumerate(drawn)]
        rows = weigh(scores, ratio=ratio, answer_estimator="likelihood")
        of_draw = np.bincount(drawn, [row.weight for row in rows], minlength=7)
        probability = np.exp(world.log_q_S[drawn].sum())
        weights += probability * of_draw
        products += probability * np.outer(of_draw, of_draw)
    found = exact.expected_weights(exact.log_weights(world, ratio), world.log_q_S, count)
    assert found[0] == pytest.approx(weights, abs=1e-9)
    assert found[1] == pytest.approx(products, abs=1e-9)


def _columns(score):
    return score.logp_policy, score.logp_posterior, score.logp_answer


@pytest.mark.parametrize("length", [2, 4])
def test_the_exact_gradient_is_autograds(length):
    """Of log P(Y | x), summed over the traces by their tokens."""
    world = exact.make_world(length, 1.0, 1)
    nodes = ["".join(symbols) for size in range(length) for symbols in product("ab", repeat=size)]
    traces = nodes + ["".join(symbols) for symbols in product("ab", repeat=length)]
    logits = torch.tensor(world.logits, requires_grad=True)
    answers = torch.tensor(world.answers_S, requires_grad=True)
    steps = logits.log_softmax(1)
    joint = []
    for place, trace in enumerate(traces):
        tokens = trace + ("." if len(trace) < length else "")
        path = [steps[nodes.index(trace[:i]), "ab.".index(token)] for i, token in enumerate(tokens)]
        joint.append(torch.stack(path).sum() + torch.nn.functional.logsigmoid(answers[place]))
    expected = torch.autograd.grad(torch.stack(joint).logsumexp(0), [logits, answers])
    found = world.true_S @ world.gradients_SN
    assert found == pytest.approx(np.concatenate([part.numpy().ravel() for part in expected]), abs=1e-12)
    assert world.true_S == pytest.approx(torch.stack(joint).softmax(0).detach().numpy(), abs=1e-12)


@pytest.mark.parametrize("ratio", exact.RATIOS)
def test_many_traces_come_to_the_limit(ratio):
    world = exact.make_world(2, 1.0, 0)  # one that overrates the answer is still on its way at a million traces
    many, limit = exact.bias(world, ratio, 2**14), exact.bias(world, ratio, None)
    assert many.total_variation == pytest.approx(limit.total_variation, abs=1e-3)
    assert (many.cosine, many.norm) == pytest.approx((limit.cosine, limit.norm), abs=1e-3)
    assert many.error == pytest.approx(limit.error, abs=0.03)  # by 1 / root K
    assert (limit.total_variation < 1e-6) == (ratio == "sequence")


def test_the_published_numbers_are_these(monkeypatch):
    """The shortest worlds are measured again, and the page shows the table of the file."""
    rows = json.loads(RESULTS.read_text())
    monkeypatch.setattr(exact, "LENGTHS", (2,))
    for published, found in zip([row for row in rows if row["length"] == 2], exact.measure(), strict=True):
        assert published == pytest.approx(found, abs=1e-5)
    monkeypatch.undo()
    assert exact.table(rows) in (ROOT / "docs" / "objectives.md").read_text()
