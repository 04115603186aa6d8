"""Hypothesis strategies for every payload of the private wire."""

import numpy as np
from hypothesis import strategies as st

from baton_wire import frontend
from baton_wire.columns import TOKEN
from baton_wire.hello import FrontendHello, Refusal, WorkerHello
from baton_wire.plan import ADMISSION, APPEND, CHUNK, HELD, MAX_STOP_IDS, RELEASE, SAMPLING, Plan
from baton_wire.result import ENDED, Result

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
token = st.integers(0, 2**31 - 1)
real = st.floats(width=32, allow_nan=False)

sampling = st.tuples(u64, real, real, real, u32).map(lambda row: np.array(row, SAMPLING)[()])


def rows(dtype, row, limit=8):
    return st.lists(row, max_size=limit).map(lambda values: np.array(values, dtype))


@st.composite
def plans(draw):
    stops = draw(st.lists(st.integers(0, MAX_STOP_IDS), max_size=4))
    admissions = [
        (draw(u16), draw(st.integers(0, 1)), n, draw(u32), draw(u32), draw(u32), draw(sampling).item())
        for n in stops
    ]
    counts = draw(st.lists(st.integers(1, 20), max_size=4))
    chunks = [(draw(u16), draw(st.integers(0, 1)), draw(u32), n) for n in counts]
    held = draw(rows(HELD, u16, 4))
    words = draw(st.integers(0, 3))

    def tokens(n):
        return np.array(draw(st.lists(token, min_size=n, max_size=n)), TOKEN)

    return Plan(
        *(draw(u64), draw(u64), draw(u64)),
        row_bound=draw(u16),
        bucket=draw(st.integers(len(held), 2**16 - 1)),
        releases=draw(rows(RELEASE, u16)),
        admissions=np.array(admissions, ADMISSION),
        stop_ids=tokens(sum(stops)),
        appends=draw(rows(APPEND, st.tuples(u16, u32))),
        chunks=np.array(chunks, CHUNK),
        chunk_tokens=tokens(sum(counts)),
        held=held,
        masks=np.array(
            draw(st.lists(u32, min_size=len(held) * words, max_size=len(held) * words)), "<u4"
        ).reshape(len(held), words),
    )


@st.composite
def results(draw):
    tokens = draw(rows(TOKEN, st.integers(-1, 2**31 - 1), 20))
    slot = st.integers(0, len(tokens) - 1) if len(tokens) else u16
    ends = draw(rows(ENDED, st.tuples(slot, st.integers(1, 3))))
    return Result(draw(u64), draw(u64), draw(u32), draw(u16), tokens, ends)


submits = st.builds(
    frontend.Submit,
    handle=u32,
    prompt=st.lists(token, min_size=1, max_size=30).map(lambda ids: np.array(ids, TOKEN)),
    max_tokens=st.integers(1, 2**32 - 1),
    min_tokens=u32,
    sampling=sampling,
    stop_ids=st.lists(token, max_size=MAX_STOP_IDS).map(tuple),
)
withdraws = st.builds(frontend.Withdraw, u32)


@st.composite
def steps(draw):
    handles = draw(rows(frontend.HANDLE, u32))
    verdict = st.integers(1, max(frontend.Verdict))
    return frontend.Step(
        handles,
        np.array(draw(st.lists(token, min_size=len(handles), max_size=len(handles))), TOKEN),
        draw(rows(frontend.OVER, st.tuples(u32, verdict))),
        draw(rows(frontend.STARTED, st.tuples(u32, u32))),
    )


services = st.builds(frontend.Service, *[u32] * 6, draining=st.booleans())
whole = st.integers(-(2**40), 2**40)
worker_hellos = st.builds(
    WorkerHello, st.text(), whole, whole, st.text(), *[whole] * (len(WorkerHello.__annotations__) - 4)
)
frontend_hellos = st.builds(FrontendHello, st.text())
refusals = st.builds(Refusal, st.text(), st.text())

# name: (values, how they are decoded)
KINDS = {
    "plan": (plans(), Plan.decode),
    "result": (results(), Result.decode),
    "submit": (submits, frontend.decode),
    "withdraw": (withdraws, frontend.decode),
    "step": (steps(), frontend.decode),
    "service": (services, frontend.decode),
    "worker hello": (worker_hellos, WorkerHello.decode),
    "front-end hello": (frontend_hellos, FrontendHello.decode),
    "refusal": (refusals, Refusal.decode),
}
