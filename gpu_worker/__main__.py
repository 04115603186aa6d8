"""`python -m gpu_worker`: starts one rank of a worker."""

import signal
import sys


def main() -> int:
    """Parses the command line, then loads what is slow to load."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the tracer takes it, if there is one
    from gpu_worker.config import parse
    from gpu_worker.errors import ConfigError

    try:
        config = parse(sys.argv[1:])
    except ConfigError as error:
        print(f"gpu_worker: {error}", file=sys.stderr)
        return error.exit_code
    from gpu_worker import process

    return process.main(config)


if __name__ == "__main__":
    sys.exit(main())
