"""Variational training of reasoning language models on Megatron-Core.

The flow of one round, a stage a line (declared in `runs/plan.py`, executed by `stages/NAME.py`):

    sft        base, gold traces                -> pi_0
    rollouts   pi_0                             -> weighted traces for the posterior (posterior.source: rollout)
    posterior  base, traces, hint               -> q
    sample     q, then pi_0                     -> traces, answers
    verify     answers                          -> verdicts
    score      traces under pi_0 and q          -> log-probs
    weigh      log-probs, verdicts              -> weights
    policy     base or pi_0, weighted traces    -> the final policy
    export     checkpoint                       -> Hugging Face folder
    eval       held-out questions               -> accuracy of pi_0 and of the final policy
"""
