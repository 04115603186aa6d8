"""The frame of both hops: who says what number in which epoch, and a checksum over every byte.

offset size field
0      4    magic "BATN"
4      1    version
5      1    kind
6      2    zero
8      4    epoch: session number given by the listener; 0 before one is given
12     8    sequence: DATA its own; NACK, BEAT, BYE the next one expected; others the dialer's nonce
20     8    acknowledged: every DATA of the peer up to and including this one was received
28     …    payload
end-8  8    xxh3-64 of all bytes before
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from baton_wire.errors import VersionError, WireError

MAGIC = b"BATN"
VERSION = 2
MAX_FRAME_BYTES = 64 << 20

_HEADER = struct.Struct("<4sBBHIQQ")
_CHECKSUM = struct.Struct("<Q")
OVERHEAD_BYTES = _HEADER.size + _CHECKSUM.size


class FrameKind(IntEnum):
    """What a frame is for."""

    HELLO = 1  # dialer: take me; payload says who I am
    WELCOME = 2  # listener: taken, this is your epoch
    REFUSE = 3  # listener: not taken; payload says why
    DATA = 4  # the next payload
    NACK = 5  # a DATA is missing; send again from `sequence`
    BEAT = 6  # alive; carries the acknowledgement
    RESET = 7  # listener: epoch (or, with epoch 0, nonce) unknown here, say hello again
    BYE = 8  # leaving in order


_KINDS = {int(kind): kind for kind in FrameKind}  # enum look-ups by value cost ten times as much


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, decoded. The payload is a view into the received bytes."""

    kind: FrameKind
    epoch: int
    sequence: int
    acknowledged: int
    payload: bytes | memoryview = b""

    def encode(self) -> bytes:
        """The bytes to send."""
        header = _HEADER.pack(MAGIC, VERSION, self.kind, 0, self.epoch, self.sequence, self.acknowledged)
        body = b"".join((header, self.payload))
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))

    @staticmethod
    def decode(data: bytes | memoryview) -> "Frame":
        """The frame in `data`; `VersionError` for another version, `WireError` for anything else wrong."""
        view = memoryview(data)
        if not OVERHEAD_BYTES <= len(view) <= MAX_FRAME_BYTES:
            raise WireError(f"frame: {len(view)} bytes")
        body = view[: -_CHECKSUM.size]
        if xxhash.xxh3_64_intdigest(body) != _CHECKSUM.unpack(view[-_CHECKSUM.size :])[0]:
            raise WireError("frame: checksum does not match")
        magic, version, kind, zero, epoch, sequence, acknowledged = _HEADER.unpack_from(body)
        if magic != MAGIC:
            raise WireError("frame: not of this protocol")
        if version != VERSION:
            raise VersionError(f"frame: wire version {version}, this build speaks {VERSION}")
        known = _KINDS.get(kind)
        if zero or known is None:
            raise WireError("frame: reserved bits or unknown kind")
        return Frame(known, epoch, sequence, acknowledged, body[_HEADER.size :])
