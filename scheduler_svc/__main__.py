"""`python -m scheduler_svc`: the scheduler service, see `--help`."""

import sys

from scheduler_svc.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
