"""Runs the `baton` command as `python -m baton_client.cli`."""

import sys

from baton_client.cli import main

sys.exit(main())
