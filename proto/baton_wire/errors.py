"""What can be wrong with bytes from a peer. Every error is a `WireError`; its text is safe to log."""


class WireError(ValueError):
    """Bytes that are not a message of this contract: truncated, altered, or out of range."""


class VersionError(WireError):
    """A well-formed message of a contract version that this build does not speak."""
