"""Objective registry: one file and one line per objective; `package.module:name` imports one from another package."""

from importlib import import_module

from megavar.config.schema import ObjectiveConfig, SampleConfig
from megavar.objectives import (
    elbo,
    f_grpo,
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
    "f_grpo": f_grpo.OBJECTIVE,
    "sft": sft.OBJECTIVE,
    "reference_gml": reference_gml.OBJECTIVE,
    "reference_acc": reference_acc.OBJECTIVE,
    "forward_kl": forward_kl.OBJECTIVE,
    "reverse_kl": reverse_kl.OBJECTIVE,
}


def get_objective(name: str) -> Objective:
    """Look up an objective by name.

    Args:
        name: a registry key, or `package.module:name` of an `Objective` or a plain `Weigh` function in any importable
            module.

    Raises:
        ValueError: if the name is unknown (lists the registry), cannot be imported, or is not an objective.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(
            f"objective.name={name!r} is unknown; use one of {', '.join(OBJECTIVES)}, or package.module:name of an "
            "importable objective."
        )
    try:
        value = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"objective.name={name!r} cannot be imported ({error}); add its folder to PYTHONPATH or install it."
        ) from error
    if isinstance(value, Objective):
        return value
    if not callable(value):
        raise ValueError(f"objective.name={name!r} is {value!r}; expected an Objective or a Weigh function.")
    return Objective(value)


def check_objective(config: ObjectiveConfig, sample: SampleConfig) -> Objective:
    """Look up the configured objective and validate the settings that it depends on.

    Raises:
        ValueError: naming both keys of an incompatible pair.
    """
    objective = get_objective(config.name)
    if objective.posterior_source is not None:
        raise ValueError(
            f"objective.name={config.name} trains the posterior, but objective.name selects the objective of the "
            f"policy; use posterior.source={objective.posterior_source}."
        )
    if objective.needs_reference_answer and config.train_answers != "reference":
        raise ValueError(
            f"objective.name={config.name} gives weight to traces without a correct answer, but "
            f"objective.train_answers={config.train_answers} needs one; use objective.train_answers=reference."
        )
    if config.on_no_correct_trace != "drop" and not objective.has_fallback:
        raise ValueError(
            f"objective.on_no_correct_trace={config.on_no_correct_trace} has no effect with objective.name="
            f"{config.name}; use drop."
        )
    num_traces = config.num_traces or sample.num_traces
    if objective.compares_answers and num_traces * sample.num_answers == 1:
        raise ValueError(
            f"objective.name={config.name} compares several answers of a question, but sample.num_answers="
            f"{sample.num_answers} with one trace (objective.num_traces or sample.num_traces) gives only one; raise "
            "either."
        )
    return objective
