"""A sample of a server's reply is read exactly, or refused: no other number passes for a token or a log-prob."""

import math

import numpy as np
import pytest

from megavar.rollout.engine import GenerateRequest
from megavar.rollout.sglang_replies import read_generation

VOCAB_SIZE = 10


def read(ids, logps=None):
    rows = [[logp, token, None] for logp, token in zip(logps or [], ids, strict=True)] if logps is not None else None
    answer = {
        "text": "",
        "output_ids": ids,
        "meta_info": {"finish_reason": {"type": "length"}, "output_token_logprobs": rows},
    }
    request = GenerateRequest([1], max_tokens=3, temperature=1.0, return_logps=logps is not None)
    return read_generation(answer, request, seed=0, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("ids", [[], [0], [3, 9, 0]])
def test_ids_and_log_probs_are_those_of_the_reply(ids):
    logps = [-0.5 * index for index in range(len(ids))]
    generation = read(ids, logps)
    assert generation.ids.tolist() == ids and generation.logps.tolist() == logps
    assert (generation.ids.dtype, generation.logps.dtype) == (np.int32, np.float32)
    assert generation.ids.flags.writeable and read(ids).logps is None


@pytest.mark.parametrize("ids", [[-1], [0, VOCAB_SIZE], [1.0], ["1"], [True], [None], [2**31], [2**70], "12", None, {}])
def test_what_is_no_token_of_the_vocabulary_is_refused(ids):
    with pytest.raises(ValueError, match="output_ids are not tokens of the vocabulary"):
        read(ids)


@pytest.mark.parametrize("logp", [math.nan, math.inf, -math.inf, 0.01])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_log_prob_that_is_not_finite_or_positive_is_refused(logp, place):
    logps = [-1.0, -2.0, 0.0]
    logps[place] = logp
    with pytest.raises(ValueError, match="log-probs that are not finite, or positive"):
        read([1, 2, 3], logps)
