"""The link of both hops: every payload once and in order between two peers, or the session is lost.

One module serves core–worker and core–front-end. `Dialer` and `Listener` begin sessions, `Link` is one. All
of it is sans-IO; `transport` has the sockets.
"""

from baton_wire.dialer import HELLO_S, Dialer
from baton_wire.listener import Event, Listener
from baton_wire.session import (
    BEAT_S,
    MAX_STORED_BYTES,
    MAX_STORED_FRAMES,
    RESEND_AFTER_S,
    Counters,
    Link,
    LinkOverflow,
    NoSessionError,
    Received,
)

__all__ = [
    "BEAT_S",
    "HELLO_S",
    "MAX_STORED_BYTES",
    "MAX_STORED_FRAMES",
    "RESEND_AFTER_S",
    "Counters",
    "Dialer",
    "Event",
    "Link",
    "LinkOverflow",
    "Listener",
    "NoSessionError",
    "Received",
]
