"""What a seed stands for: sizes, requests, faults and the weather on the network, drawn before anything runs.

Knows nothing of how it is played (`simulation`).
"""

from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any

import numpy as np

from baton_sim.fake_model import Expected, FakeModel, expected_tokens
from baton_wire.columns import TOKEN, Column
from baton_wire.hello import WorkerHello
from baton_wire.plan import SAMPLING

FINGERPRINT = "simulated"
FAULTS_END_S = 1.5


@dataclass(frozen=True, slots=True)
class Weather:
    """How a network treats frames; probabilities per frame, times in seconds."""

    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0  # that a frame takes up to `late_s` longer: reordering
    late_s: float = 0.0
    damage: float = 0.0  # a byte altered, or the end cut off
    garbage: float = 0.0  # something else arrives beside it
    base_s: float = 0.0002


CALM = Weather()


class Trigger(Enum):
    """When a client cancels."""

    NEVER = 0
    AFTER_S = 1  # so long after it submitted: in the queue, prefill, decode, or at the end
    STARTED = 2  # as it hears of its admission
    TOKEN = 3  # as its n-th token arrives
    OVER = 4  # just before it hears that it is over: messages cross


@dataclass(frozen=True, slots=True)
class Request:
    """One client's request and its patience."""

    at_s: float
    frontend: int
    prompt: Column
    max_tokens: int
    min_tokens: int
    sampling: Any
    stop_ids: tuple[int, ...]
    expected: Expected
    cancel: Trigger = Trigger.NEVER
    cancel_value: float = 0.0
    too_long: bool = False


class Fault(Enum):
    """What happens to a process or a connection."""

    CRASH = 0  # a worker dies, the transport notices; another starts
    VANISH = 1  # a worker dies and nothing tells
    HANG = 2  # a worker does nothing for a while
    BREAK = 3  # a connection breaks and comes back, with echoes of what it carried
    CUT = 4  # nothing reaches or leaves a worker for a while
    STALL = 5  # the core does nothing for a while
    FRONTEND = 6  # a front-end dies and starts again
    CORE = 7  # the core dies and starts again
    LEAVE = 8  # a worker leaves in order; another starts


@dataclass(frozen=True, slots=True)
class Mishap:
    """A fault, when, to which process, and for how long."""

    at_s: float
    fault: Fault
    target: int
    for_s: float


@dataclass(slots=True)
class Incident:
    """A seed, drawn."""

    seed: int
    model: FakeModel
    hellos: list[WorkerHello]
    frontends: int
    step_us: tuple[int, int]  # range of a step's duration
    weather: Weather
    max_queue: int
    worker_wait_s: float
    requests: list[Request] = field(default_factory=list)
    mishaps: list[Mishap] = field(default_factory=list)


def draw(seed: int) -> Incident:
    """The incident of a seed: always the same."""
    random = Random(f"incident {seed}")
    vocab = random.choice([30, 500])
    pressed = random.random() < 0.2  # a cache far too small for what is asked, and much breaks
    model = FakeModel(
        vocab,
        stop_id=7 if random.random() < 0.5 else None,
        stop_every=random.choice([8, 30]),
        numerical_every=random.choice([0, 0, 0, 60]),
    )
    incident = Incident(
        seed=seed,
        model=model,
        hellos=_hellos(random, vocab, pressed),
        frontends=random.choice([1, 1, 2]),
        step_us=random.choice([(50, 200), (300, 2_000), (1_000, 8_000)]),
        weather=_weather(random),
        max_queue=random.choice([1024, 1024, 6]),
        worker_wait_s=random.choice([60.0, 60.0, 0.2]),
    )
    incident.requests = _requests(random, incident, pressed)
    if pressed or random.random() < 0.7:
        mishaps = _mishaps(random, incident, random.randint(4, 10) if pressed else random.randint(1, 5))
        incident.mishaps = sorted(mishaps, key=lambda mishap: mishap.at_s)
    return incident


def _hellos(random: Random, vocab: int, pressed: bool) -> list[WorkerHello]:
    block_size = random.choice([2, 4, 8])
    longest = random.choice([24, 48, 80])
    hellos = []
    for i in range(random.choice([1, 1, 2, 3])):
        slots = 6 if pressed else random.choice([1, 3, 6, 10])
        least = -(-longest // block_size)
        hellos.append(
            WorkerHello(
                group=f"group-{i}",
                rank=0,
                ranks=1,
                fingerprint=FINGERPRINT,
                block_size=block_size,
                num_blocks=random.choice([least, least + 3] if pressed else [least, 2 * least, 8 * least]),
                max_slots=slots,
                max_model_len=longest,
                max_tokens_per_step=slots + random.choice([0, 1, 8, 64]),
                vocab_size=vocab,
                row_multiple=random.choice([1, 4]),
            )
        )
    return hellos


def _weather(random: Random) -> Weather:
    if random.random() < 0.25:
        return CALM
    return Weather(
        drop=random.choice([0, 0, 0.01, 0.05, 0.2]),
        double=random.choice([0, 0.01, 0.1]),
        delay=random.choice([0, 0.02, 0.1]),
        late_s=random.choice([0.001, 0.02, 0.2]),
        damage=random.choice([0, 0.01]),
        garbage=random.choice([0, 0, 0.01]),
        base_s=random.choice([0.0001, 0.001]),
    )


def _requests(random: Random, incident: Incident, pressed: bool) -> list[Request]:
    longest = incident.hellos[0].max_model_len
    vocab = incident.model.vocab_size
    common = [random.randrange(vocab) for _ in range(longest)]
    burst = pressed or random.random() < 0.3
    cancels = random.choice([0.0, 0.1, 0.4])
    return [
        _request(random, incident, common, 0.0 if burst else random.random(), cancels)
        for _ in range(random.randrange(4, 24))
    ]


def _request(random: Random, incident: Incident, common: list[int], at_s: float, cancels: float) -> Request:
    longest, vocab = incident.hellos[0].max_model_len, incident.model.vocab_size
    own = [random.randrange(vocab) for _ in range(random.choice([0, 1, 3, longest // 3]))]
    shared = random.randrange(longest // 2) if random.random() < 0.7 else 0
    prompt = np.array((common[:shared] + own)[: longest - 1] or common[:1], TOKEN)
    room = longest - len(prompt)
    max_tokens = random.choice([1, random.randint(1, room), min(room, 6), room])
    too_long = random.random() < 0.03
    sampling = np.array((random.randrange(4), 1, 1, 0, 0), SAMPLING)[()]
    stop_ids = random.choice([(), (7,), (7, 3, 11)])
    min_tokens = random.choice([0, 0, 2])
    expected = expected_tokens(
        prompt.tolist(), sampling, max_tokens, min_tokens=min_tokens, stop_ids=stop_ids, model=incident.model
    )
    cancel, value = Trigger.NEVER, 0.0
    if random.random() < cancels:
        cancel = random.choice([Trigger.AFTER_S, Trigger.STARTED, Trigger.TOKEN, Trigger.OVER])
        value = random.choice([0.0, 0.002, 0.05, 0.5]) * random.random()
        if cancel is Trigger.TOKEN:
            value = random.randint(1, max(1, len(expected.tokens)))
    return Request(
        at_s=at_s,
        frontend=random.randrange(incident.frontends),
        prompt=prompt,
        max_tokens=longest + 1 if too_long else max_tokens,
        min_tokens=min_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        expected=expected,
        cancel=cancel,
        cancel_value=value,
        too_long=too_long,
    )


def _mishaps(random: Random, incident: Incident, count: int) -> list[Mishap]:
    worker = (Fault.CRASH, Fault.VANISH, Fault.HANG, Fault.BREAK, Fault.BREAK, Fault.CUT, Fault.LEAVE)
    mishaps = []
    for _ in range(count):
        fault = random.choice((*worker, Fault.STALL, Fault.FRONTEND, Fault.CORE))
        targets = incident.frontends if fault is Fault.FRONTEND else len(incident.hellos)
        length_s = random.choice([0.01, 0.1, 0.4, 1.6]) * random.random()  # patience is 1 s
        mishaps.append(
            Mishap(random.random() ** 2 * FAULTS_END_S, fault, random.randrange(targets), length_s)
        )
    return mishaps
