"""What every test shares: one thread per process for arithmetic, and hypothesis without a stopwatch."""

import os

# Before torch or numpy is imported: tests run side by side on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

# A shared machine makes deadlines lie. CI replays the same examples; at a desk each run looks for new ones.
settings.register_profile("baton", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("baton")
