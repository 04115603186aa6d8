"""The same plans give the same bits, however the host is timed; and a steady step allocates nothing."""

import resource
import time

import numpy as np
import torch

from baton_wire.plan import Plan
from baton_wire.result import Result
from tests.gpu.drive import IN_FLIGHT, Driver, Request, make_runner


def workload(draw, count, prompt=(5, 200), output=(10, 150)):
    def one(number):
        ids = [draw.randrange(1280) for _ in range(draw.randint(*prompt))]
        temperature = draw.choice([0.0, 0.7, 1.3])
        more = {"top_p": draw.choice([1.0, 0.9]), "top_k": draw.choice([0, 0, 20])}
        return Request(ids, draw.randint(*output), temperature, seed=draw.getrandbits(62), **more)

    return [one(number) for number in range(count)]


def crowd(draw):
    """48 requests that 350 blocks of 16 admit at once and cannot finish without a preemption.

    All begin with one block, within five steps. When the first ends, at position 154 or later, each of the
    others is at 149 or later: ten blocks of each are 480.
    """
    return workload(draw, 48, prompt=(5, 16), output=(150, 150))


def replay(runner, plans, pause):
    """Results of recorded plans, at most IN_FLIGHT at a time."""
    runner.reset()
    results: list[Result] = []
    sent = 0
    while len(results) < len(plans):
        while sent < len(plans) and sent - len(results) < IN_FLIGHT:
            pause()
            runner.submit(Plan.decode(plans[sent]))
            sent += 1
        results += runner.finished()
    return results


def test_a_thousand_plans_twice(demo_runner, draw):
    runner = demo_runner(
        max_num_seqs=48,
        kvcache_block_size=16,
        num_kvcache_blocks=350,
        max_model_len=512,
        max_num_batched_tokens=256,
    )
    # The crowd comes first: its preemptions are among the plans that are replayed.
    run = Driver(runner).run(crowd(draw) + workload(draw, 700))
    assert len(run.plans) >= 1000 and run.preemptions > 0
    plans = run.plans[:1000]

    def jitter():
        if draw.random() < 0.3:
            time.sleep(draw.random() * 2e-3)

    for pause in (jitter, lambda: None):
        again = replay(runner, plans, pause)
        for one, other in zip(run.results, again, strict=False):
            assert one.state_hash == other.state_hash, one.step
            assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.ends, other.ends), one.step


def test_steady_decode_allocates_nothing(demo_runner, draw):
    runner = demo_runner(max_num_seqs=32, kvcache_block_size=64, max_model_len=2048)
    driver, counts = Driver(runner), []

    def note():
        stats = torch.cuda.memory_stats()
        counts.append((stats["allocation.all.allocated"], torch.cuda.memory_reserved()))

    prompts = [[draw.randrange(1280) for _ in range(100)] for _ in range(32)]
    driver.run([Request(prompt, 600) for prompt in prompts], note)
    steady = counts[len(counts) // 3 : 2 * len(counts) // 3]  # prompts are through, no answer has ended
    assert len(steady) > 200
    assert len(set(steady)) == 1, f"{steady[0]} → {steady[-1]}"


def test_memory_does_not_grow(draw, pytestconfig):
    """`--soak-s` seconds of mixed work: device memory flat after the first tenth, resident memory nearly."""
    seconds, shared = float(pytestconfig.getoption("--soak-s")), pytestconfig.getoption("--shared-device")
    runner = make_runner(max_num_seqs=64, kvcache_block_size=16, num_kvcache_blocks=900, max_model_len=1024)
    driver, started, held = Driver(runner), time.monotonic(), []
    while time.monotonic() - started < seconds:
        driver.run(workload(draw, 100))
        free, total = torch.cuda.mem_get_info()
        device = torch.cuda.memory_reserved() if shared else total - free
        held.append((device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    devices, host = zip(*held[max(1, len(held) // 10) :], strict=True)
    print(
        f"{len(held)} rounds, device {devices[0] >> 20} → {devices[-1] >> 20} MiB,",
        f"host {host[0]} → {host[-1]} KiB",
    )
    assert len(held) > 5
    assert devices[-1] == devices[0]
    assert host[-1] - host[0] < 32 << 10
