"""Runs a Python command that ends when the process that started it ends, however that one ends.

Used as a script: `python tether.py PARENT_PID -m module args…`. It asks the kernel for SIGTERM on the
parent's death (Linux; elsewhere it changes nothing) and becomes the command. Standard library only, so that
it costs a few milliseconds.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent_pid, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent_pid):  # it died before the kernel was asked
            sys.exit(1)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main()
