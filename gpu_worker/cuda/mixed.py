"""Steps that decode and compute prompt chunks in one pass: weights are read once for both.

A pass is a captured graph for each pair of a decode bucket and a size of prompt pass; pairs are few, so
decode rows are padded more than in steps of their own. What does not fit takes a pass for each.
"""

import logging

import torch

from gpu_worker.attention.triton_backend import Rows
from gpu_worker.cuda.decode import Decoder
from gpu_worker.cuda.forward import Forward, Pool
from gpu_worker.cuda.inbox import Inbox
from gpu_worker.cuda.prefill import Prefiller
from gpu_worker.cuda.prompt_rows import PassRows, PassSize

log = logging.getLogger(__name__)

_BUCKETS = (64, 256)  # decode rows; more are a pass of their own, which they fill


class Mixer:
    """Passes over decode rows, which come first, and prompt rows."""

    def __init__(self, forward: Forward, decoder: Decoder, prefiller: Prefiller) -> None:
        self._forward, self._decoder, self._prefiller = forward, decoder, prefiller
        slots = len(forward.table)
        # one slot alone never does both at once
        self._buckets = sorted({min(bucket, slots) for bucket in _BUCKETS if slots > 1})
        self._graphs: dict[tuple[int, PassSize], torch.cuda.CUDAGraph] = {}

    def fits(self, rows: int, size: PassSize) -> bool:
        """Whether a step of so many decode rows and such a prompt pass is one pass."""
        return 0 < rows <= max(self._buckets, default=0) and size in self._prefiller.sizes

    def capture(self, inbox: Inbox, pool: Pool) -> None:
        """Captures every pair, the largest first, so that the others find their memory in the pool."""
        for bucket in reversed(self._buckets):
            for size in reversed(self._prefiller.sizes):
                rows = self._prefiller.padding(inbox, size)
                self._pass(bucket, rows)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._pass(bucket, rows)
                self._graphs[bucket, size] = graph
        log.info("captured mixed graphs=%d", len(self._graphs))

    def run(self, rows: int, size: PassSize, inbox: Inbox) -> None:
        """Advances every slot that decodes, at most `rows`, and computes the chunks in the inbox."""
        bucket = next(bucket for bucket in self._buckets if bucket >= rows)
        graph = self._graphs.get((bucket, size))
        if graph is None:
            self._pass(bucket, size.cut(inbox.words))
        else:
            graph.replay()

    def _pass(self, bucket: int, prompts: PassRows) -> None:
        tokens, decode = self._decoder.begin(bucket)
        prefill = self._prefiller.begin(prompts)
        rows = Rows(
            torch.cat((decode.positions, prefill.positions)),
            torch.cat((decode.places, prefill.places)),
            decode.block_table,
            decode=decode.decode,
            prefill=prefill.prefill,
            decodes=bucket,
        )
        own = torch.arange(bucket, dtype=torch.int32, device=tokens.device)
        picked = torch.cat((own, prompts.picked + bucket))
        hidden = self._forward(torch.cat((tokens, prompts.tokens)), rows, picked)
        self._forward.sample(hidden, torch.cat((self._decoder.rows.slots[:bucket], prompts.pick_slots)))
