"""Fields and their ranges; both sides of every limit."""

import math

import numpy as np
import pytest

from baton.inference.v1 import inference_pb2 as pb
from scheduler_svc.checkpoint import SamplingDefaults
from scheduler_svc.frontend import sampling as samplings
from scheduler_svc.frontend import validation
from scheduler_svc.frontend.errors import Reason, RequestError


def field_of(check, *arguments, **named):
    """The field that the check complains of, None if it does not."""
    try:
        check(*arguments, **named)
    except RequestError as error:
        return error.field if error.message.startswith(error.field) else "a message that does not name it"
    return None


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0, 1e-6, 1, 100], [-1e-6, -1, 100.1, math.nan, math.inf, -math.inf]),
        ("top_p", [1e-6, 0.5, 1], [0, -0.1, 1.0001, 2, math.nan]),
        ("min_p", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
        ("top_k", [0, 1, 2**32 - 1], []),
    ],
)
def test_sampling_ranges(field, good, bad):
    for value in good:
        assert field_of(validation.check_sampling, pb.Sampling(**{field: value})) is None
    for value in bad:
        assert field_of(validation.check_sampling, pb.Sampling(**{field: value})) == f"sampling.{field}"


@pytest.mark.parametrize(
    ("stopping", "field"),
    [
        ({}, None),
        ({"max_tokens": 0}, "stopping.max_tokens"),
        ({"max_tokens": 1, "min_tokens": 1}, None),
        ({"max_tokens": 1, "min_tokens": 2}, "stopping.min_tokens"),
        ({"stop": ["x"] * 16}, None),
        ({"stop": ["x"] * 17}, "stopping.stop"),
        ({"stop": ["x", ""]}, "stopping.stop[1]"),
        ({"stop": ["漢" * 256]}, None),
        ({"stop": ["漢" * 257]}, "stopping.stop[0]"),
    ],
)
def test_stopping(stopping, field):
    assert field_of(validation.check_stopping, pb.Stopping(**stopping)) == field


@pytest.mark.parametrize(
    ("role", "field"),
    [(r, None) for r in validation.ROLES]
    + [("", "chat.messages[1].role"), ("User", "chat.messages[1].role")],
)
def test_roles(role, field):
    chat = pb.Chat(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(role=role)])
    assert field_of(validation.check_chat, chat) == field


def test_an_empty_conversation():
    assert field_of(validation.check_chat, pb.Chat()) == "chat.messages"


def test_stop_ids_are_in_the_vocabulary():
    stopping = pb.Stopping(stop_token_ids=[0, 9, 10])
    assert field_of(validation.check_stop_ids, stopping, 11) is None
    assert field_of(validation.check_stop_ids, stopping, 10) == "stopping.stop_token_ids[2]"


def test_stop_ids_with_those_of_the_model():
    eos = (7, 8)
    assert samplings.stop_ids(pb.Stopping(stop_token_ids=[1, 7, 1]), eos) == (1, 7, 8)
    assert samplings.stop_ids(pb.Stopping(stop_token_ids=[1], ignore_eos=True), eos) == (1,)
    assert len(samplings.stop_ids(pb.Stopping(stop_token_ids=range(100, 114)), eos)) == 16
    full = pb.Stopping(stop_token_ids=range(100, 115))
    assert field_of(samplings.stop_ids, full, eos) == "stopping.stop_token_ids"
    full.ignore_eos = True
    assert len(samplings.stop_ids(full, eos)) == 15


BUDGET = {"prompt_field": "text", "longest": 100, "default_max_tokens": 20}


@pytest.mark.parametrize(
    ("stopping", "prompt", "expected"),
    [
        ({}, 10, 20),
        ({}, 85, 15),
        ({}, 99, 1),
        ({}, 100, "text"),
        ({"max_tokens": 90}, 10, 90),
        ({"max_tokens": 91}, 10, "stopping.max_tokens"),
        ({"max_tokens": 1}, 200, "text"),
        ({"min_tokens": 30}, 10, 30),
        ({"min_tokens": 91}, 10, "stopping.min_tokens"),
    ],
)
def test_output_budget(stopping, prompt, expected):
    named = {**BUDGET, "prompt_tokens": prompt}
    if isinstance(expected, int):
        assert validation.output_budget(pb.Stopping(**stopping), **named) == expected
        return
    with pytest.raises(RequestError) as caught:
        validation.output_budget(pb.Stopping(**stopping), **named)
    assert (caught.value.reason, caught.value.field) == (Reason.TOO_LONG, expected)
    assert caught.value.metadata == {"prompt_tokens": str(prompt), "max_model_len": "100"}


def test_defaults_fill_only_what_is_unset():
    defaults = SamplingDefaults(0.5, 20, 0.75, 0.25)
    record = samplings.resolve(pb.Sampling(seed=2**64 - 1), defaults)
    assert record.item() == (2**64 - 1, 0.5, 0.75, 0.25, 20)
    zeros = pb.Sampling(seed=0, temperature=0, top_k=0, top_p=1, min_p=0)
    assert samplings.resolve(zeros, defaults).item() == (0, 0.0, 1.0, 0.0, 0)


def test_an_unset_seed_is_drawn_anew():
    seeds = {int(samplings.resolve(pb.Sampling(), SamplingDefaults())["seed"]) for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) > np.iinfo(np.uint32).max
