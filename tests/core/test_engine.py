"""The engine against peers that are wrong: no request loses a token or its end, and the engine lives on."""

from dataclasses import replace

import numpy as np
import pytest

from baton_sim.fake_model import expected_tokens
from baton_wire.result import ENDED, End, Result
from tests.core.small_stack import MODEL, SmallStack, Worker, hello


class Liar:
    """Falsifies the result of one step, once."""

    def __init__(self, step: int, lie) -> None:
        self.step, self.lie, self.told = step, lie, False

    def __call__(self, result: Result) -> Result:
        if self.told or result.step != self.step:
            return result
        self.told = True
        return self.lie(result)


def _other_hash(result: Result) -> Result:
    return replace(result, state_hash=result.state_hash ^ 1)


def _other_tokens(result: Result) -> Result:
    return replace(result, tokens=np.where(result.tokens < 0, result.tokens, (result.tokens + 1) % 60))


def _one_token_less(result: Result) -> Result:
    tokens = result.tokens.copy()
    tokens[np.flatnonzero(tokens >= 0)[0]] = -1
    return replace(result, tokens=tokens)


def _everything_ended(result: Result) -> Result:
    return replace(result, ends=np.array([(i, End.STOP) for i in range(len(result.tokens))], ENDED))


def _ended_twice(result: Result) -> Result:
    return replace(result, ends=np.array([(0, End.LENGTH), (0, End.LENGTH)], ENDED))


@pytest.mark.parametrize("step", [1, 2, 5, 9])
@pytest.mark.parametrize(
    "lie", [_other_hash, _other_tokens, _one_token_less, _everything_ended, _ended_twice]
)
def test_a_result_that_cannot_be_costs_no_token_and_no_request(lie, step) -> None:
    """What such a result says is neither delivered nor kept: the streams go on where they were."""
    liar = Liar(step, lie)
    stack = SmallStack(Worker(hello("a"), liar))
    submits = [stack.submit(i, [i + 1] * (3 + 5 * i), 12) for i in range(3)]
    stack.run()
    assert liar.told
    assert any("out of step" in line for line in stack.log)
    for submit in submits:
        want = expected_tokens(submit.prompt, submit.sampling, submit.max_tokens, model=MODEL)
        assert stack.got[submit.handle] == want.tokens
        assert int(stack.ends[submit.handle]) == want.end
    stack.engine.check_integrity()
