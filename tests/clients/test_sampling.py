"""Sampling parameters: what is accepted, what is refused by name, and nano-vLLM's defaults."""

import math

import pytest

from baton_client import InvalidArgumentError, Sampling, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 100.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 2),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("min_tokens", -1),
        ("min_tokens", 65),
        ("stop", ["a"] * 17),
        ("stop", [""]),
        ("stop", ["x" * 257]),
        ("stop", [3]),
        ("stop_token_ids", list(range(17))),
        ("stop_token_ids", [-1]),
    ],
)
def test_refused_by_name(field, value):
    with pytest.raises(InvalidArgumentError, match=f"^{field}: ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_unknown_parameters_are_refused_by_name():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_nano_vllm_defaults_and_order():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (1.0, 64, False)
    assert SamplingParams(0.6, 256, True) == SamplingParams(temperature=0.6, max_tokens=256, ignore_eos=True)
    sampling = params.to_sampling()
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert sampling.HasField("top_k")
    assert not sampling.HasField("seed")


def test_limits_are_inside():
    Sampling(temperature=0, top_p=1, min_p=1, top_k=0, seed=2**64 - 1, max_tokens=1, stop="x" * 256)
    Sampling(temperature=100, top_p=1e-9, min_p=0, stop=["a"] * 16, stop_token_ids=list(range(16)))


def test_one_stop_text_is_a_list_of_one():
    assert Sampling(stop="END").stop == ("END",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")
