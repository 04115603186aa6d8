"""How a request's tokens are chosen and when they end: its fields, completed by the checkpoint's defaults."""

import os
from typing import Any

import numpy as np

from baton.inference.v1 import inference_pb2 as pb
from baton_wire.plan import MAX_STOP_IDS, SAMPLING
from scheduler_svc.checkpoint import SamplingDefaults
from scheduler_svc.frontend.errors import invalid


def resolve(sampling: pb.Sampling, defaults: SamplingDefaults) -> Any:
    """The scalar record of SAMPLING; a field that is unset takes the default, the seed chance.

    The fields must be valid.
    """

    def value(name: str) -> float:
        return getattr(sampling if sampling.HasField(name) else defaults, name)  # type: ignore[no-any-return]

    seed = sampling.seed if sampling.HasField("seed") else int.from_bytes(os.urandom(8), "little")
    record = np.zeros((), SAMPLING)
    record["seed"] = seed
    for name in ("temperature", "top_k", "top_p", "min_p"):
        record[name] = value(name)
    return record


def stop_ids(stopping: pb.Stopping, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Ids that end generation: the request's and, unless it ignores them, the model's.

    Raises `RequestError` where they are more than a slot holds.
    """
    model = () if stopping.ignore_eos else eos_token_ids
    ids = tuple(dict.fromkeys((*stopping.stop_token_ids, *model)))
    if len(ids) > MAX_STOP_IDS:
        raise invalid(
            "stopping.stop_token_ids",
            f"{len(ids)} different ids with the model's {len(model)}, at most {MAX_STOP_IDS} are possible",
        )
    return ids
