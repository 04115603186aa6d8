"""Which decoding slots need a block in which step, without looking at every slot in every step.

A decoding slot advances by one position per step, so it crosses into a new block every `block_size` steps:
its crossing step modulo the block size never changes. Slots wait in the bucket of that residue.
"""


class DecodeRing:
    """Buckets of slots by residue of the step at which they next need a block; O(1) to enter and leave."""

    def __init__(self, block_size: int) -> None:
        self._buckets: list[set[int]] = [set() for _ in range(block_size)]
        self._residue: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._residue)

    def __contains__(self, slot: int) -> bool:
        return slot in self._residue

    def enter(self, slot: int, length: int, step: int) -> None:
        """From the plan after `step` on, the slot writes positions `length`, `length` + 1, …"""
        assert slot not in self._residue, f"slot {slot} decodes twice"
        residue = (step + 1 - length) % len(self._buckets)
        self._buckets[residue].add(slot)
        self._residue[slot] = residue

    def leave(self, slot: int) -> None:
        """The slot advances no more; nothing happens where it did not."""
        residue = self._residue.pop(slot, None)
        if residue is not None:
            self._buckets[residue].remove(slot)

    def due(self, step: int) -> set[int]:
        """Slots that write the first position of a new block in this step."""
        return self._buckets[step % len(self._buckets)]
