"""`python -m baton_sim`: plays seeds and says which of them break a promise, and how to see it happen."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator

from baton_sim.bugs import BUGS
from baton_sim.simulation import Report
from baton_sim.sweep import play_with, sweep

_BAR = 40
_SHOWN = 10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m baton_sim",
        description="Runs the production core, wire and link under a virtual clock, with fake workers and "
        "clients, over a network that drops, doubles, delays and damages frames, while processes crash, hang "
        "and restart. Every seed is one incident and plays the same each time.",
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many to play (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default %(default)s)")
    parser.add_argument("--seed", type=int, help="play only this one and print what happens in it")
    parser.add_argument("--bug", choices=sorted(BUGS), metavar="NAME", help="plant a bug; see --bugs")
    parser.add_argument("--bugs", action="store_true", help="list the bugs that can be planted")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)"
    )
    return parser.parse_args()


def _progress(reports: Iterable[Report], total: int) -> Iterator[Report]:
    """Draws a bar where somebody looks at it."""
    failures = 0
    for done, report in enumerate(reports, 1):
        failures += report.error is not None
        if sys.stderr.isatty() and (done % 10 == 0 or done == total):
            filled = _BAR * done // total
            bar = "█" * filled + "·" * (_BAR - filled)
            print(f"\r{bar} {done}/{total} seeds, {failures} failing", end="", file=sys.stderr, flush=True)
        yield report
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _replay(seed: int, bug: str | None) -> int:
    report = play_with(bug, seed, tracing=True)
    print(*report.trace, sep="\n")
    print(f"seed {seed}: {report.error or 'as promised'}")
    return int(report.error is not None)


def _sweep(arguments: argparse.Namespace) -> int:
    start_s = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    reports = list(_progress(sweep(seeds, arguments.bug, arguments.jobs), len(seeds)))
    wall_s = time.perf_counter() - start_s
    failing = sorted((report for report in reports if report.error), key=lambda report: report.seed)
    planted = f" --bug {arguments.bug}" if arguments.bug else ""
    for report in failing[:_SHOWN]:
        print(f"seed {report.seed}: {report.error}")
        print(f"  replay: python -m baton_sim --seed {report.seed}{planted}")
    if len(failing) > _SHOWN:
        print(f"… and {len(failing) - _SHOWN} more: {[report.seed for report in failing[_SHOWN:]]}")
    print(
        f"{len(reports):,} seeds, {len(failing):,} failing; {sum(r.tokens for r in reports):,} tokens, "
        f"{sum(r.faults for r in reports):,} faults, {sum(r.events for r in reports):,} events, "
        f"{sum(r.virtual_s for r in reports):,.0f} virtual seconds in {wall_s:.1f} s"
    )
    if arguments.bug:
        print(f"planted bug {arguments.bug}: {'caught' if failing else 'NOT CAUGHT'}")
        return int(not failing)
    return int(bool(failing))


def main() -> int:
    """Exit status: 0 where every promise was kept (or the planted bug was caught), 1 where not."""
    arguments = _arguments()
    if arguments.bugs:
        for name, bug in BUGS.items():
            print(f"{name:24} {bug.__doc__}")
        return 0
    if arguments.seed is not None:
        return _replay(arguments.seed, arguments.bug)
    return _sweep(arguments)


if __name__ == "__main__":
    sys.exit(main())
