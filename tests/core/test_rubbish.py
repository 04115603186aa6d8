"""The engine between peers that send well-framed rubbish: it lives on, and honest requests are unharmed."""

import random
from dataclasses import replace

import numpy as np
import pytest

from baton_sim.fake_model import expected_tokens
from baton_wire.frame import Frame, FrameKind
from baton_wire.frontend import Verdict
from baton_wire.result import ENDED, Result
from tests.core.small_stack import MODEL, SmallStack, Worker, hello

SEEDS = 40
GIVEN_UP = {verdict for verdict in Verdict if verdict > Verdict.NUMERICAL}  # the core's, not a worker's


class Babbler(Worker):
    """Some of its results and frames are not what they should be; checksums always are."""

    def __init__(self, offer, chance: random.Random, rate: float) -> None:
        super().__init__(offer, self._lie)
        self._chance, self._rate = chance, rate

    def _lie(self, result: Result) -> Result:
        # The state hash does not cover a slot's last token: steps that end one are left alone.
        if self._chance.random() >= self._rate or len(result.ends):
            return result
        row = self._chance.randrange(len(result.tokens))
        tokens = result.tokens.copy()
        tokens[row] = self._chance.choice([-1, tokens[row] + 1])
        reason = self._chance.randint(1, 3)
        return self._chance.choice(
            [
                replace(result, tokens=tokens),
                replace(result, state_hash=self._chance.getrandbits(64)),
                replace(result, ends=np.array([(row, reason)] * self._chance.randint(1, 2), ENDED)),
                replace(result, tokens=result.tokens[1:]),
                replace(result, exec_us=2**32 - 1),
            ]
        )

    def turn(self, inbox: list[bytes], now: float) -> list[bytes]:
        return [self._babble(data) for data in super().turn(inbox, now)]

    def _babble(self, data: bytes) -> bytes:
        if self._chance.random() >= self._rate:
            return data
        frame = Frame.decode(data)
        payload = bytes(frame.payload)
        return self._chance.choice(
            [
                replace(frame, payload=payload[: self._chance.randrange(len(payload) + 1)]),
                replace(frame, payload=payload + b"\1"),
                replace(frame, payload=payload, sequence=self._chance.choice([0, 1, 2**64 - 1])),
                replace(frame, payload=payload, acknowledged=self._chance.choice([0, 2**64 - 1])),
                replace(frame, payload=payload, kind=self._chance.choice([*FrameKind])),
                replace(frame, payload=payload, epoch=self._chance.choice([0, 1, 2**32 - 1])),
            ]
        ).encode()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_token_is_wrong_and_nothing_is_left_behind(seed) -> None:
    chance = random.Random(seed)
    babbler = Babbler(hello("a", block_size=chance.choice([1, 4]), num_blocks=40), chance, 0.0)
    sound = Worker(hello("b", block_size=chance.choice([1, 3, 8]), max_slots=2))
    stack = SmallStack(babbler, sound)
    babbler._rate = chance.choice([0.01, 0.05, 0.3])
    honest, withdrawn = {}, set()
    for handle in (chance.choice([i, 2**32 - 1 - i]) for i in range(1, 25)):
        prompt = [chance.randrange(3) for _ in range(chance.randint(1, 30))]
        honest[handle] = stack.submit(handle, prompt, chance.randint(1, 20))
        if chance.random() < 0.2:
            stack.send(chance.randbytes(chance.randrange(60)))
            stack.send(honest[handle].encode()[: chance.randrange(40)])
        if chance.random() < 0.2:
            withdrawn.add(chance.choice([*honest]))
            for each in withdrawn:
                stack.withdraw(each)
        stack.turn(chance.randrange(6))
        stack.engine.check_integrity()
    babbler._rate = 0.0
    stack.run(lambda: not stack.engine.state()["requests"])
    stack.turn(20)
    for handle, submit in honest.items():
        want = expected_tokens(submit.prompt, submit.sampling, submit.max_tokens, model=MODEL).tokens
        ended = handle in stack.ends and stack.ends[handle] not in GIVEN_UP
        assert stack.got[handle] == (want if ended else want[: len(stack.got[handle])])
        assert handle in stack.ends or handle in withdrawn
    stack.engine.check_integrity()
    assert all(group.scheduler.pool.referenced == 0 for group in stack.engine.groups.values())
