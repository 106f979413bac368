"""Registry of the objectives: one file and one line each; `package.module:name` brings one from outside."""

from importlib import import_module

from megavar.config.schema import ObjectiveConfig, SampleConfig
from megavar.objectives import (
    elbo,
    forward_kl,
    grpo,
    iwae,
    reference_acc,
    reference_gml,
    reinforce,
    reverse_kl,
    rft,
    sft,
)
from megavar.objectives.base import Objective

OBJECTIVES: dict[str, Objective] = {
    "iwae": iwae.OBJECTIVE,
    "elbo": elbo.OBJECTIVE,
    "rft": rft.OBJECTIVE,
    "reinforce": reinforce.OBJECTIVE,
    "grpo": grpo.OBJECTIVE,
    "sft": sft.OBJECTIVE,
    "reference_gml": reference_gml.OBJECTIVE,
    "reference_acc": reference_acc.OBJECTIVE,
    "forward_kl": forward_kl.OBJECTIVE,
    "reverse_kl": reverse_kl.OBJECTIVE,
}


def get_objective(name: str) -> Objective:
    """The objective of that name.

    Args:
        name: of the registry, or `package.module:name` of an `Objective`, or of a bare `Weigh` function, in any
            importable module.

    Raises:
        ValueError: listing the known ones, or saying why the module or the name in it cannot be used.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(
            f"objective.name={name!r} is unknown; known are {', '.join(OBJECTIVES)}, and package.module:name of "
            "your own."
        )
    try:
        value = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"objective.name={name!r} cannot be imported ({error}); put its folder on PYTHONPATH or install it."
        ) from error
    if isinstance(value, Objective):
        return value
    if not callable(value):
        raise ValueError(f"objective.name={name!r} is {value!r}, expected an Objective or a function that weighs.")
    return Objective(value)


def check_objective(config: ObjectiveConfig, sample: SampleConfig) -> Objective:
    """The configured objective, whose settings fit what it needs.

    Raises:
        ValueError: naming both keys of a pair that does not fit.
    """
    objective = get_objective(config.name)
    if objective.posterior_source is not None:
        raise ValueError(
            f"objective.name={config.name} is what the posterior learns by, objective.name what the policy does; "
            f"use posterior.source={objective.posterior_source}."
        )
    if objective.needs_reference_answer and config.train_answers != "reference":
        raise ValueError(
            f"objective.name={config.name} trains on traces without a correct answer too, but objective.train_answers="
            f"{config.train_answers} needs one; use objective.train_answers=reference."
        )
    if config.on_no_correct_trace != "drop" and not objective.has_fallback:
        raise ValueError(
            f"objective.on_no_correct_trace={config.on_no_correct_trace} has no effect with objective.name="
            f"{config.name}; use drop."
        )
    num_traces = config.num_traces or sample.num_traces
    if objective.compares_answers and num_traces * sample.num_answers == 1:
        raise ValueError(
            f"objective.name={config.name} compares a question's answers, but sample.num_answers={sample.num_answers} "
            "after one trace (objective.num_traces, or sample.num_traces) is a single one; sample more."
        )
    return objective
