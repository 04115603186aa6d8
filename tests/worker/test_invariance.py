"""The same tokens, and the same bits of every logit, however a request is batched, chunked or interrupted."""

import random

import pytest

from gpu_worker import build
from gpu_worker.config import parse
from gpu_worker.errors import ConfigError
from tests.support.random_checkpoints import Shape, write_checkpoint
from tests.worker import drive

SHAPES = {
    # wide enough that most weights are in the packed layout
    "packed": Shape(
        vocab_size=600,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
    ),
    # the library's usual products, which round by the number of rows
    "plain": Shape(vocab_size=600, num_attention_heads=5, num_key_value_heads=5, head_dim=24),
}


def requests() -> list[drive.Request]:
    """34 requests of many lengths, greedy and sampled; some begin alike, for longer than a chunk of keys.

    The last ones' prompts are nothing but what others begin with, in whole blocks of any size.
    """
    draw = random.Random(0)
    common = [draw.randrange(600) for _ in range(170)]
    made = []
    for i in range(32):
        own = [draw.randrange(600) for _ in range(draw.choice([1, 2, 9, 40, 130, 260]))]
        sampling = drive.sampling(seed=i + 1)
        if i % 2:
            sampling = drive.sampling(temperature=1.1, top_p=0.9, top_k=40 * (i % 4 == 1), seed=i + 1)
        prompt = common[: draw.choice([32, 64, 170])] + own if i % 3 == 0 else own
        made.append(drive.Request(prompt, draw.randrange(2, 40), sampling))
    made.append(drive.Request(common[:128], 20, drive.sampling(seed=33)))
    made.append(drive.Request(common[:64], 30, drive.sampling(temperature=1.0, seed=34)))
    return made


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return drive.load(write_checkpoint(folder, SHAPES[request.param], with_tokenizer=False))


@pytest.fixture(scope="module")
def alone(loaded):
    """Each request by itself, its prompt in one piece: tokens and digests of logits."""
    made = drive.runner(loaded, max_num_seqs=1, max_num_batched_tokens=1024, num_kvcache_blocks=64)
    tokens = []
    for request in requests():
        run = drive.generate(made, [request], depth=1)
        assert not run.cached
        assert not run.preemptions
        tokens += run.tokens
    return tokens, made.digests


SCENARIOS = {
    "all at once": ({"max_num_seqs": 32, "num_kvcache_blocks": 1024}, {}),
    "as they come": ({"max_num_seqs": 32, "num_kvcache_blocks": 1024}, {"stagger": 3}),
    "deep run-ahead": ({"max_num_seqs": 32, "num_kvcache_blocks": 1024}, {"depth": 8}),
    "chunks of 7": ({"max_num_seqs": 5, "max_num_batched_tokens": 7, "num_kvcache_blocks": 512}, {}),
    "chunks of 50": ({"max_num_seqs": 32, "max_num_batched_tokens": 50, "num_kvcache_blocks": 1024}, {}),
    "large blocks": ({"max_num_seqs": 9, "kvcache_block_size": 64, "num_kvcache_blocks": 128}, {}),
    "small blocks": ({"max_num_seqs": 9, "kvcache_block_size": 2, "num_kvcache_blocks": 4000}, {}),
    "small pool": (
        {
            "max_num_seqs": 32,
            "kvcache_block_size": 4,
            "num_kvcache_blocks": 125,
            "max_num_batched_tokens": 64,
        },
        {"depth": 3},
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_bits_do_not_depend_on(name, loaded, alone):
    options, how = SCENARIOS[name]
    made = drive.runner(loaded, **options)
    run = drive.generate(made, requests(), **how)
    tokens, digests = alone
    assert run.tokens == tokens
    assert {key: digest for key, digest in made.digests.items() if digests[key] != digest} == {}
    # A scenario that does not happen would test less than it says.
    assert bool(run.preemptions) == (name == "small pool")
    assert run.cached or name in ("all at once", "deep run-ahead")
    assert run.known or name in ("all at once", "deep run-ahead")


@pytest.mark.parametrize("what", ["linear layers", "attention"])
def test_deterministic_is_refused_where_this_machine_cannot(what, loaded, monkeypatch):
    """Without the option the same machine serves, with a warning."""
    if what == "attention":
        monkeypatch.setattr("gpu_worker.attention.torch_backend.batched_is_exact", lambda *_: False)
    else:
        monkeypatch.setattr(build, "row_multiple", lambda *_: None)
    arguments = ["--model=unused", "--max-num-seqs=2", "--num-kvcache-blocks=8"]
    build.make_runner(parse(arguments), loaded)
    with pytest.raises(ConfigError, match=f"--deterministic: {what}"):
        build.make_runner(parse([*arguments, "--deterministic"]), loaded)


def test_deterministic_is_offered_where_the_machine_is_exact(loaded):
    made = build.make_runner(parse(["--model=unused", "--max-num-seqs=2", "--deterministic"]), loaded)
    assert made.limits.row_multiple > 0
