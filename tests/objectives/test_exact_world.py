"""Every objective against exact mathematics, in a world whose traces and answers can all be listed.

Traces are up to two symbols of {a, b} and a close marker: seven of them, with softmax parameters at every node. After
each trace the answer is one of eight, of which a known number is correct. All expectations are sums over everything
that can happen; nothing is sampled unless a test says so. Weights come from the objectives' own code, by `Score`s.
Gradients are also taken where the parameters are those of two real Qwen3 models, the policy and the posterior.
"""

from dataclasses import replace
from itertools import combinations, product
from math import log, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.made_scores import weigh
from transformers import Qwen3Config, Qwen3ForCausalLM

from megavar.config.load import load_config
from megavar.objectives import get_objective
from megavar.objectives.bounds import estimate_bounds, multi_trace_bounds
from megavar.objectives.importance import select
from megavar.records import Score

CONF = Path(__file__).parents[2] / "conf" / "objective"
TRACES = ["", "a", "b", "aa", "ab", "ba", "bb"]
SYMBOLS = "ab."
NUM_ANSWERS = 8
NUM_CORRECT = [1, 6, 2, 8, 3, 0, 5]
EXACT = 1e-6  # Scores hold float32


class World:
    """pi(z) and q(z) by logits [3 nodes, 3 symbols], pi(y | z) by logits [7 traces, 8 answers]; float64."""

    def __init__(self, seed=0, answers=True):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.policy, self.posterior = random(3, 3), random(3, 3)
        self.answers = random(7, 8) if answers else torch.zeros(7, 8, dtype=torch.float64, requires_grad=True)
        self.policy_parameters, self.posterior_parameters = [self.policy, self.answers], [self.posterior]

    def token_logps(self, logits, trace):
        """log-probs of a trace's tokens, the close marker included; after two symbols it comes for certain."""
        nodes = {"": 0, "a": 1, "b": 2}
        tokens = trace + "."
        found = [logits[nodes[tokens[:i]]].log_softmax(0)[SYMBOLS.index(tokens[i])] for i in range(min(2, len(tokens)))]
        return torch.stack([*found, *[torch.zeros((), dtype=torch.float64)] * (len(tokens) - len(found))])

    def log_policy(self):
        return torch.stack([self.token_logps(self.policy, trace).sum() for trace in TRACES])

    def log_posterior(self):
        return torch.stack([self.token_logps(self.posterior, trace).sum() for trace in TRACES])

    def log_correct(self):
        """log pi(Y | x, z): of any correct answer, the first NUM_CORRECT[z]; -inf where there is none."""
        logps = self.answers.log_softmax(1)
        none = torch.tensor(-torch.inf, dtype=torch.float64)
        rows = zip(logps, NUM_CORRECT, strict=True)
        return torch.stack([row[:count].logsumexp(0) if count else none for row, count in rows])

    def log_joint(self):
        return self.log_policy() + self.log_correct()

    def log_evidence(self):
        return self.log_joint().logsumexp(0)

    def score(self, trace, index, num_correct=None):
        """The record of a trace; its `logp_answer` is log pi(Y | x, z), as one token."""
        return Score(
            "q", index, 1,
            self.token_logps(self.policy, TRACES[trace]).detach().float().numpy(),
            self.token_logps(self.posterior, TRACES[trace]).detach().float().numpy(),
            self.log_correct()[trace].detach().float().reshape(1).numpy(),
            NUM_ANSWERS, NUM_CORRECT[trace] if num_correct is None else num_correct,
        )  # fmt: skip


class Qwen3World(World):
    """The same traces and answers, as a small Qwen3 continues a question, and another one a question with a hint.

    Token 0 is the question, 1 the hint, 2 to 4 are `SYMBOLS`, 5 to 12 the answers; all others are ruled out.
    """

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
        policy, posterior = (Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).double() for _ in range(2))
        self.policy = self.logits(policy, [0], ["", "a", "b"], slice(2, 5))
        self.posterior = self.logits(posterior, [0, 1], ["", "a", "b"], slice(2, 5))
        self.answers = self.logits(policy, [0], [f"{trace}." for trace in TRACES], slice(5, 13))
        self.policy_parameters, self.posterior_parameters = list(policy.parameters()), list(posterior.parameters())

    @staticmethod
    def logits(model, prompt, symbols, allowed):
        """Of the allowed tokens after the prompt and each string of symbols, [strings, allowed tokens]."""
        ids = [torch.tensor([prompt + [2 + SYMBOLS.index(symbol) for symbol in string]]) for string in symbols]
        return torch.stack([model(row).logits[0, -1, allowed] for row in ids])


@pytest.fixture
def world():
    return World()


@pytest.fixture
def certain(monkeypatch):
    """The world with every trace able to lead to a correct answer, so that all bounds are finite."""
    monkeypatch.setitem(globals(), "NUM_CORRECT", [1, 6, 2, 8, 3, 1, 5])
    return World()


@pytest.fixture(params=[World, Qwen3World])
def trained(certain, request):
    """`certain` by a table of logits, and by Qwen3 models."""
    return request.param()


def logits_of(p):
    """[3 nodes, 3 symbols] under which the seven traces have probabilities in proportion to `p`."""
    first = torch.stack([p[[1, 3, 4]].sum(), p[[2, 5, 6]].sum(), p[0]])
    return torch.stack([first, p[[3, 4, 1]], p[[5, 6, 2]]]).log()


def gradients(value, parameters):
    return torch.autograd.grad(value, parameters, retain_graph=True)


def assert_close(first, second, tolerance=EXACT):
    for one, other in zip(first, second, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


def tuples_of(world, count):
    """(indices of `count` traces, probability that q draws them) for all of them."""
    logps = world.log_posterior().detach()
    for indices in product(range(7), repeat=count):
        yield list(indices), float(logps[list(indices)].sum().exp())


def exact_bound(world, count):
    """L_K: the expectation over all K-tuples of q, which is held constant, of log mean rho."""
    log_rho = world.log_joint() - world.log_posterior().detach()
    return sum(p * (log_rho[indices].logsumexp(0) - log(count)) for indices, p in tuples_of(world, count))


def expected_weights(world, count, **settings):
    """[7] the expected weight of each trace, over all K-tuples of q: weights by `settings`."""
    coefficients = torch.zeros(7, dtype=torch.float64)
    for indices, p in tuples_of(world, count):
        found = weigh([world.score(trace, k) for k, trace in enumerate(indices)], **settings)
        for row, trace in zip(found, indices, strict=True):
            coefficients[trace] += p * float(row.weight)
    return coefficients


def expected_gradient(world, count, parameters, log_probability, **settings):
    """Sum over all K-tuples of q of probability x sum_k weight_k grad log_probability[z_k], weights by `settings`."""
    coefficients = expected_weights(world, count, **settings)
    kept = coefficients != 0
    return gradients((coefficients[kept] * log_probability[kept]).sum(), parameters)


def test_probabilities_of_all_traces_sum_to_one(world):
    assert float(world.log_policy().exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float(world.log_posterior().exp().sum()) == pytest.approx(1, abs=1e-12)


def test_bounds_rise_with_the_number_of_traces_and_stay_below_the_evidence(certain):
    bounds = [float(exact_bound(certain, count)) for count in (1, 2, 3, 4)]
    assert all(
        low + 1e-3 < high for low, high in zip(bounds, [*bounds[1:], float(certain.log_evidence())], strict=True)
    )
    elbo = (certain.log_posterior().exp() * (certain.log_joint() - certain.log_posterior())).sum()
    assert bounds[0] == pytest.approx(float(elbo), abs=1e-12)


def test_the_bound_is_tight_when_the_posterior_is_the_true_one(certain):
    true = (certain.log_joint() - certain.log_evidence()).exp().detach()
    certain.posterior = logits_of(true)
    assert_close([certain.log_posterior().exp()], [true], 1e-12)
    assert float(exact_bound(certain, 1)) == pytest.approx(float(certain.log_evidence()), abs=1e-12)


def test_estimates_of_all_bounds_from_three_traces_are_unbiased(certain):
    expected = np.zeros(3)
    kl = 0.0
    for indices, p in tuples_of(certain, 3):
        scores = [certain.score(trace, k) for k, trace in enumerate(indices)]
        (found,) = estimate_bounds([scores], [[False] * 3], [weigh(scores)])
        expected += p * found.bounds
        kl += p * found.kl_posterior_policy
    assert expected == pytest.approx([float(exact_bound(certain, count)) for count in (1, 2, 3)], abs=EXACT)
    exact_kl = (certain.log_posterior().exp() * (certain.log_posterior() - certain.log_policy())).sum()
    assert kl == pytest.approx(float(exact_kl), abs=EXACT)


def test_bounds_of_many_traces_use_a_fixed_draw_of_subsets():
    values = np.random.default_rng(0).normal(size=24)
    (found,) = multi_trace_bounds(values[None])
    assert found.tolist() == multi_trace_bounds(values[None])[0].tolist()
    assert found[0] == pytest.approx(values.mean(), abs=1e-12)
    assert (np.diff(found) > -0.01).all() and found[-1] > found[0] + 0.3
    assert found[-1] == pytest.approx(np.log(np.exp(values).mean()), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 12])
def test_bounds_are_means_over_all_subsets(count):
    """Also where log-weights differ by more than float64 can hold as numbers."""
    values = np.random.default_rng(count).normal(scale=400.0, size=(3, count))
    found = multi_trace_bounds(values)
    for question, row in zip(values, found, strict=True):
        for size, bound in enumerate(row, start=1):
            expected = np.mean(
                [
                    float(torch.from_numpy(question[list(subset)]).logsumexp(0))
                    for subset in combinations(range(count), size)
                ]
            )
            assert bound == pytest.approx(expected - np.log(size), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_iwae_weights_give_the_gradient_of_the_exact_bound(trained, count):
    parameters, settings = trained.policy_parameters, {"ratio": "sequence", "answer_estimator": "likelihood"}
    found = expected_gradient(trained, count, parameters, trained.log_joint(), **settings)
    assert_close(found, gradients(exact_bound(trained, count), parameters))


def test_elbo_weights_give_the_gradient_of_the_one_trace_bound(trained):
    parameters, settings = (
        trained.policy_parameters,
        {"name": "elbo", "ratio": "sequence", "answer_estimator": "likelihood"},
    )
    found = expected_gradient(trained, 2, parameters, trained.log_joint(), **settings)
    assert_close(found, gradients(exact_bound(trained, 1), parameters))


@pytest.mark.parametrize("count", [2, 3])
def test_reverse_kl_weights_give_the_elbos_gradient_for_the_posterior(trained, count):
    parameters, settings = trained.posterior_parameters, {"name": "reverse_kl", "answer_estimator": "likelihood"}
    log_rho = trained.log_joint().detach() - trained.log_posterior()
    elbo = (trained.log_posterior().exp() * log_rho).sum()
    found = expected_gradient(trained, count, parameters, trained.log_posterior(), **settings)
    assert_close(found, gradients(elbo, parameters))


def test_reverse_kl_needs_fresh_weights_for_each_step(certain):
    """60 exact steps of size 1: KL(q || true posterior) falls to 0; without them it falls, then rises past its start.

    Figures are quoted in docs/objectives.md. Where w_k < 0 the loss -sum_k w_k log q(z_k) falls with q(z_k) for ever.
    """
    true = (certain.log_joint() - certain.log_evidence()).detach()
    start = 0.7 * logits_of(true.exp()).log_softmax(1) + 0.3 * certain.posterior.detach().log_softmax(1)
    divergences = {}
    for renewed in (True, False):
        q, course = start.clone().requires_grad_(), []
        for step in range(60):
            certain.posterior = q
            if step == 0 or renewed:
                weights = expected_weights(certain, 2, name="reverse_kl", answer_estimator="likelihood")
            log_q = certain.log_posterior()
            course.append(float((log_q.exp() * (log_q - true)).sum().detach()))
            (ascent,) = gradients((weights * log_q).sum(), [q])
            q = (q + ascent).detach().requires_grad_()
        divergences[renewed] = course
    assert divergences[True] == sorted(divergences[True], reverse=True)
    assert (divergences[True][0], divergences[True][-1]) == pytest.approx((0.144, 0.002), abs=0.0005)
    assert (min(divergences[False]), divergences[False][-1]) == pytest.approx((0.012, 0.180), abs=0.0005)


# Rollouts that are the policy's own distribution: trace z comes MULTIPLICITY[z] times in 16, so sums are exact.
MULTIPLICITY = [2, 1, 4, 2, 3, 3, 1]
ROLLOUTS = [trace for trace, count in enumerate(MULTIPLICITY) for _ in range(count)]


@pytest.fixture
def rational():
    """pi(z) = MULTIPLICITY / 16, and pi(Y | z) = NUM_CORRECT / 8: accuracies of eight answers are exact too."""
    world = World(answers=False)
    world.policy = logits_of(torch.tensor(MULTIPLICITY, dtype=torch.float64)).requires_grad_()
    return world


def rollout_weights(world, **settings):
    """Weight of each trace, summed over its copies among the rollouts."""
    scores = [replace(world.score(trace, k), logp_posterior=None) for k, trace in enumerate(ROLLOUTS)]
    found = weigh(scores, ratio="none", **settings)
    totals = np.zeros(7)
    np.add.at(totals, ROLLOUTS, [float(row.weight) for row in found])
    return totals


def test_forward_kl_weights_are_the_true_posterior(rational):
    true = (rational.log_joint() - rational.log_evidence()).exp().detach().numpy()
    assert rollout_weights(rational, name="forward_kl") == pytest.approx(true, abs=1e-12)


def test_the_fixed_point_of_the_forward_kl_is_the_true_posterior(rational):
    weights = torch.from_numpy(rollout_weights(rational, name="forward_kl"))
    true = (rational.log_joint() - rational.log_evidence()).exp().detach()
    kept = true > 0
    divergence = (true[kept] * (true[kept].log() - rational.log_posterior()[kept])).sum()
    loss = -(weights * rational.log_posterior()).sum()
    assert_close(gradients(loss, [rational.posterior]), gradients(divergence, [rational.posterior]), 1e-12)
    optimizer = torch.optim.LBFGS(
        [rational.posterior], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def step():
        optimizer.zero_grad()
        value = -(weights * rational.log_posterior()).sum()
        value.backward()
        return value

    optimizer.step(step)
    assert_close([rational.log_posterior().exp()], [true], 1e-4)


def joint_gradient(world, weights):
    """sum_z weight_z grad log pi(z, Y | x), which is what the trainer follows."""
    kept = torch.from_numpy(weights) > 0
    value = (torch.from_numpy(weights)[kept] * world.log_joint()[kept]).sum()
    return gradients(value, [world.policy, world.answers])


def test_reinforce_weights_give_the_gradient_of_the_expected_reward(rational):
    expected = gradients(rational.log_evidence().exp(), [rational.policy, rational.answers])
    assert_close(joint_gradient(rational, rollout_weights(rational, name="reinforce")), expected, 1e-12)


@pytest.mark.parametrize(("name", "focus"), [("grpo", 0), ("f_grpo", 1)])
def test_grpo_weights_give_the_gradient_of_the_group_normalised_reward(rational, name, focus):
    """E[(R - P) / sqrt(P (1 - P)) grad log pi], with P and the deviation constants: negative samples included.

    F-GRPO multiplies the advantages by (1 - P)^focus.
    """
    p = rational.log_evidence().exp().detach()
    logps = rational.log_policy()[:, None] + rational.answers.log_softmax(1)
    rewards = torch.tensor([[float(y < count) for y in range(8)] for count in NUM_CORRECT], dtype=torch.float64)
    advantages = (1 - p) ** focus * (rewards - p) / (p * (1 - p)).sqrt()
    expected = gradients((logps.detach().exp() * advantages * logps).sum(), [rational.policy, rational.answers])
    assert_close(joint_gradient(rational, rollout_weights(rational, name=name)), expected, 1e-9)


def test_rft_weights_give_the_gradient_of_the_likelihood_of_what_was_accepted(rational):
    """At another theta than the one that sampled: sum_{z, y correct} pi_ref(z, y) grad log pi_theta(z)."""
    accepted = rational.log_joint().detach().exp()
    weights = rollout_weights(rational, name="rft")
    rational.policy = torch.randn(
        3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    ).requires_grad_()
    expected = gradients((accepted * rational.log_policy()).sum(), [rational.policy])
    found = gradients((torch.from_numpy(weights) * rational.log_policy()).sum(), [rational.policy])
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("name", ["rft", "reinforce", "grpo", "f_grpo"])
def test_implied_weights_are_a_factor_on_the_forward_kl(rational, name):
    p = float(rational.log_evidence().exp())
    factor = {"grpo": sqrt(p / (1 - p)), "f_grpo": sqrt(p * (1 - p))}.get(name, p)
    expected = factor * rollout_weights(rational, name="forward_kl")
    assert rollout_weights(rational, name=name) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["grpo", "f_grpo"])
@pytest.mark.parametrize(("correct", "factor"), [(0, 0.0), (8, 0.0)])
def test_questions_without_advantage_have_no_weight_under_grpo(rational, name, correct, factor):
    scores = [
        replace(rational.score(trace, k, num_correct=correct), logp_posterior=None) for k, trace in enumerate(ROLLOUTS)
    ]
    assert sum(float(row.weight) for row in weigh(scores, name=name, ratio="none")) == factor


# Published methods under other names: the settings are those of their files in conf/objective.


def objective_of(tmp_path, name):
    (tmp_path / "run.yaml").write_text(f"include: [{CONF / name}.yaml]\nname: a\nmodel: m\ndata: {{train: t.jsonl}}\n")
    return load_config(tmp_path / "run.yaml", []).objective


def expected_own_gradient(world, config, outcomes, count):
    """Sum over all `count`-tuples of the policy's outcomes of probability x sum_k weight_k grad log-prob_k.

    Args:
        outcomes: (probability, log-prob that is trained on, score) of each.
    """
    coefficients = torch.zeros(len(outcomes), dtype=torch.float64)
    for indices in product(range(len(outcomes)), repeat=count):
        probability = np.prod([outcomes[index][0] for index in indices])
        scores = [replace(outcomes[index][2], trace_index=k) for k, index in enumerate(indices)]
        found = get_objective(config.name).weigh(scores, [False] * count, config)
        for row in select(found, config.selection, config.min_weight, seed=0)[0]:
            coefficients[indices[row.trace_index]] += probability * float(row.weight)
    used = [(c, logp) for c, (_, logp, _) in zip(coefficients, outcomes, strict=True) if c != 0]
    return gradients(sum(c * logp for c, logp in used), world.policy_parameters)


def own_score(world, trace, num_answers, num_correct):
    score = replace(world.score(trace, 0), logp_posterior=None)
    return replace(score, num_answers=num_answers, num_correct=num_correct)


def judged_outcomes(world):
    """Every trace with one answer after it: a correct one, or a wrong one, which is never trained on."""
    outcomes = []
    for trace, (log_policy, log_correct) in enumerate(zip(world.log_policy(), world.log_correct(), strict=True)):
        policy, correct = float(log_policy.detach().exp()), float(log_correct.detach().exp())
        outcomes.append((policy * correct, log_policy + log_correct, own_score(world, trace, 1, 1)))
        outcomes.append((policy * (1 - correct), log_policy, own_score(world, trace, 1, 0)))
    return outcomes


@pytest.mark.parametrize("count", [1, 2, 3])
def test_verifree_is_the_gradient_of_the_expected_probability_of_the_reference(trained, tmp_path, count):
    traces = enumerate(zip(trained.log_policy(), trained.log_joint(), strict=True))
    outcomes = [(float(logp.detach().exp()), joint, own_score(trained, z, 0, 0)) for z, (logp, joint) in traces]
    found = expected_own_gradient(trained, objective_of(tmp_path, "verifree"), outcomes, count)
    expected = (trained.log_policy().exp() * trained.log_correct().exp()).sum()
    assert_close(found, gradients(expected, trained.policy_parameters))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["maxrl", "raft"])
def test_maxrl_and_raft_are_the_gradient_of_the_truncated_likelihood(world, tmp_path, name, count):
    """-sum_k (1 - P)^k / k up to the number of samples: log P for many, P itself for one."""
    config, failure = objective_of(tmp_path, name), 1 - world.log_evidence().exp()
    expected = gradients(-sum(failure**k / k for k in range(1, count + 1)), world.policy_parameters)
    found = expected_own_gradient(world, config, judged_outcomes(world), count)
    assert_close(found, expected)


def test_resampled_traces_come_as_often_as_sampling_importance_resampling_draws_them(certain, tmp_path):
    """Of pairs from q: P(z) = E sum_k [z_k = z] rho_k / (rho_1 + rho_2), summed here without the objectives' code."""
    config, draws = replace(objective_of(tmp_path, "sir"), answer_estimator="likelihood"), 100
    rho = (certain.log_joint() - certain.log_posterior()).exp().detach().numpy()
    expected, found, variance = np.zeros(7), np.zeros(7), np.zeros(7)
    for pair, p in tuples_of(certain, 2):
        of_pair = np.bincount(pair, rho[pair], minlength=7) / rho[pair].sum()
        expected += p * of_pair
        variance += p**2 * of_pair * (1 - of_pair) / draws
        scores = [certain.score(trace, k) for k, trace in enumerate(pair)]
        weights = get_objective(config.name).weigh(scores, [False] * 2, config)
        questions = [replace(row, question_id=f"{pair}{draw}") for draw in range(draws) for row in weights]
        for row in select(questions, config.selection, config.min_weight, seed=3)[0]:
            found[pair[row.trace_index]] += p * float(row.weight) / draws
    assert expected.sum() == pytest.approx(1, abs=1e-12)
    assert (np.abs(found - expected) <= 4 * np.sqrt(variance) + EXACT).all()


@pytest.mark.parametrize("ratio", ["sequence", "geometric_mean", "none"])
@pytest.mark.parametrize("answer", ["accuracy", "likelihood", "geometric_mean"])
def test_a_questions_own_weight_is_the_policys_probability_on_the_posteriors_traces_too(rational, ratio, answer):
    """A single trace has the whole weight, so under RFT its weight is the estimate of P, and E_q of that is P."""
    leaning = (rational.log_policy() + (rational.log_correct().exp() + 0.3).log()).exp().detach()
    rational.posterior = logits_of(leaning)  # to the correct, so that no estimate is cut at 1
    estimates = [
        float(weigh([rational.score(trace, 0)], name="rft", ratio=ratio, answer_estimator=answer)[0].weight)
        for trace in range(7)
        if NUM_CORRECT[trace]
    ]
    drawn = rational.log_posterior().exp().detach().numpy()[np.array(NUM_CORRECT) > 0]
    assert drawn @ estimates == pytest.approx(float(rational.log_evidence().exp()), abs=EXACT)


def variances(probabilities):
    """Exact variances of the two estimators of p = sum of pi(y) over the correct answers (theorem 1)."""
    p = probabilities.sum()
    likelihood = len(probabilities) * (probabilities**2).sum() - p**2  # y uniform among the correct: |Y| pi(y)
    return likelihood, p * (1 - p)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_theorem_1_worst_case_variance_and_where_the_estimators_cross(size):
    generator = np.random.default_rng(0)
    for p in np.linspace(0.02, 0.98, 25):
        worst, accuracy = variances(np.array([p, *[0.0] * (size - 1)]))
        assert worst == pytest.approx(p**2 * (size - 1), abs=1e-12)
        assert (accuracy <= worst + 1e-12) == (p >= 1 / size - 1e-12)
        for _ in range(20):
            assert variances(generator.dirichlet(np.ones(size)) * p)[0] <= worst + 1e-12


def test_theorem_1_by_simulation():
    generator, draws = np.random.default_rng(1), 400_000
    probabilities = np.array([0.30, 0.10, 0.05, 0.05])
    likelihood = len(probabilities) * probabilities[generator.integers(0, 4, draws)]
    accuracy = (generator.random(draws) < probabilities.sum()).astype(float)
    for sample, variance in zip((likelihood, accuracy), variances(probabilities), strict=True):
        assert sample.mean() == pytest.approx(0.5, abs=5 * sqrt(variance / draws))
        assert sample.var() == pytest.approx(variance, rel=0.02)


def limit_of_weights(world, ratio):
    """What the weighted traces are distributed as for many traces: q(z) rho(z), normalised."""
    scores = [world.score(trace, k) for k, trace in enumerate(range(7))]
    log_weights = np.array([float(row.log_weight) for row in weigh(scores, ratio=ratio, answer_estimator="likelihood")])
    mass = world.log_posterior().detach().exp().numpy() * np.exp(log_weights)
    return mass / mass.sum()


def test_the_geometric_mean_is_biased_towards_the_posterior_and_less_than_no_ratio(certain):
    """Total variation to the true posterior: 0 by the sequence ratio; figures are quoted in docs/objectives.md."""
    true = (certain.log_joint() - certain.log_evidence()).exp().detach().numpy()
    ratios = ("sequence", "geometric_mean", "none")
    distance = {ratio: 0.5 * np.abs(limit_of_weights(certain, ratio) - true).sum() for ratio in ratios}
    assert distance["sequence"] <= EXACT
    assert distance["geometric_mean"] == pytest.approx(0.39, abs=0.005)
    assert distance["none"] == pytest.approx(0.63, abs=0.005)
    certain.posterior = certain.policy
    assert np.abs(limit_of_weights(certain, "geometric_mean") - true).max() <= EXACT
