"""`python -m scheduler_svc`: the scheduler service, see `--help`."""

import signal
import sys


def main() -> int:
    """The supervisor's exit status."""
    # before anything that is slow to load; only the core answers it, and all parts inherit this
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from scheduler_svc import supervisor

    return supervisor.main()


if __name__ == "__main__":
    sys.exit(main())
