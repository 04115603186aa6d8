"""What a measured engine is."""

from dataclasses import dataclass
from typing import Protocol

from bench.workload import Request


@dataclass(frozen=True, slots=True)
class Options:
    """A folder with config.json and a tokenizer (weights are made up), and the engine's limits."""

    model: str
    device: str
    max_model_len: int
    max_num_seqs: int


class Engine(Protocol):
    """A started engine. `starts_s`: seconds from nothing to ready, by what was there before ("cold", …)."""

    starts_s: dict[str, float]

    def serve(self, requests: list[Request]) -> list[list[float]]:
        """Sends each request when it arrives; when its tokens came, seconds after the first arrival.

        Every request gets all the tokens that it asks for: no end token ends it.
        """

    def close(self) -> None:
        """Ends the engine's processes."""
