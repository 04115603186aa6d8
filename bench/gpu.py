"""Baton and vLLM beside each other on one GPU, in one run, against the machine's limits and our goals.

usage: python bench/gpu.py [--shapes 0.6b 8b] [--engines baton vllm] [--parts PART ...] [--vllm-site DIR]
                           [--out FILE]

Each engine runs in a process of its own, one after the other, on the same folder (random weights), and is
asked for the same: decode time per token at several batch sizes, time to the first token of an 8,000-token
prompt unknown and known, output tokens a second of 256 requests at once, and requests that arrive at random.
Baton is asked over gRPC with all its processes on this host; vLLM in its own process, without a network. The
machine's rates come first, then figures as they come, then a table; the whole as one line of JSON last, and
in FILE as it grows. An engine that fails or is not there costs its own column only.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.figures import PARTS, SCALES
from bench.roofline import limits
from bench.shapes import SHAPES

_ROOT = Path(__file__).resolve().parent.parent
# What is to be reached: at least so many times vLLM's rate, or at most so many milliseconds or seconds.
GOALS: dict[str, dict[str, tuple[str, float]]] = {
    "0.6b": {
        "throughput_tok_s": ("ratio", 1.20),
        "tpot_ms_b1": ("most", 0.75),
        "tpot_ms_b8": ("most", 0.85),
        "tpot_ms_b64": ("most", 1.6),
        "tpot_ms_b256": ("most", 3.4),
        "ttft_long_cold_ms": ("most", 28.0),
        "ttft_long_hit_ms": ("most", 4.0),
        "start_warm_s": ("most", 15.0),
    },
    "8b": {
        "throughput_tok_s": ("ratio", 1.15),
        "tpot_ms_b1": ("most", 4.4),
        "tpot_ms_b64": ("most", 5.4),
        "tpot_ms_b256": ("most", 10.0),
        "ttft_long_cold_ms": ("most", 200.0),
        "ttft_long_hit_ms": ("most", 6.0),
    },
}
Results = dict[str, Any]


def main() -> int:
    """Measures, prints, writes; 1 where no engine gave a figure."""
    a = _arguments()
    if "baton" in a.engines:
        _check_ours()
    results: Results = {"bench": "gpu", **_machine(), "scale": a.scale, "rates": {}, "shapes": {}}
    if a.device == "cuda":
        results["rates"] = _rates()
        _say(f"machine: {json.dumps(results['rates'])}")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        for name in a.shapes:
            model = Path(folder, f"qwen3-{name}")
            SHAPES[name].save(model)
            figures: Results = results["shapes"].setdefault(name, {})
            if results["rates"]:
                figures["limit"] = limits(SHAPES[name], SCALES[a.scale], results["rates"])
                _say(f"{name} limits: {json.dumps(figures['limit'])}")
            for engine in a.engines:
                found: Results = figures.setdefault(engine, {})
                for figure, value in _measure(engine, name, model, a):
                    found[figure] = value
                    _write(a.out, results)
            _say(table(name, figures))
    print(json.dumps(results))
    return 0 if any(f.get(e) for f in results["shapes"].values() for e in a.engines) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["0.6b", "8b"])
    parser.add_argument("--engines", nargs="+", choices=("baton", "vllm"), default=["baton", "vllm"])
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--vllm-site", metavar="DIR", help="where vLLM lies, unless it is installed [$VLLM_SITE]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results here as they grow")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument(
        "--scale",
        choices=tuple(SCALES),
        default="full",
        help="brief: one round, one rate; small: to try this out [full]",
    )
    parser.add_argument("--limit-s", type=float, default=600.0, metavar="S", help="for one engine [600]")
    a = parser.parse_args()
    a.vllm_site = a.vllm_site or os.environ.get("VLLM_SITE")
    return a


def _check_ours() -> None:
    """Ends the run where a package of ours is missing, rather than after minutes of the other engine."""
    parts = "scheduler_svc.frontend.server", "scheduler_svc.supervisor", "gpu_worker.process"
    command = [sys.executable, "-c", f"import {', '.join(parts)}"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(None))
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        raise SystemExit(f"Baton cannot start here, it needs its extras scheduler and worker: {why}")


def _measure(engine: str, shape: str, model: Path, a: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """One engine's figures as they come, until it is through, fails or runs out of time."""
    command = [sys.executable, "-m", "bench.figures", engine, str(model)]
    command += ["--device", a.device, "--scale", a.scale, "--parts", *a.parts]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        environment = _environment(a.vllm_site if engine == "vllm" else None)
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        guard = threading.Timer(a.limit_s, _kill, (child,))
        guard.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith('{"figure"'):
                    figure = json.loads(line)
                    seconds = time.monotonic() - started
                    _say(f"{shape} {engine} [{seconds:.0f} s] {figure['figure']} = {figure['value']}")
                    yield figure["figure"], figure["value"]
            code = child.wait()
        finally:
            guard.cancel()
            _kill(child)
        if code:
            errors.seek(0)
            tail = errors.read().strip().splitlines()[-12:]
            _say(f"{shape} {engine} failed with {code}:\n  " + "\n  ".join(tail))


def _kill(child: subprocess.Popen[str]) -> None:
    """Ends the engine and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _environment(site: str | None) -> dict[str, str]:
    paths = [site] if site else []
    paths += [str(_ROOT)]
    paths += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _rates() -> dict[str, float]:
    """In a process of its own, whose memory is free again afterwards."""
    command = [sys.executable, "-m", "bench.roofline"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(None))
    if done.returncode:
        raise SystemExit(f"no CUDA device to measure: {done.stderr.strip().splitlines()[-1]}")
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def table(shape: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of figures: ours, vLLM's, how many times better ours is, what was to be reached, the limit."""
    ours, theirs, limit = (figures.get(name, {}) for name in ("baton", "vllm", "limit"))
    lines = [f"{shape:<34}{'Baton':>12}{'vLLM':>12}{'ratio':>8}{'goal':>10}{'':>6}{'limit':>10}"]
    for name in {**ours, **theirs}:
        mine, other = _best(ours.get(name)), _best(theirs.get(name))
        if isinstance(ours.get(name, theirs.get(name)), Mapping):
            lines += _online(name, ours.get(name, {}), theirs.get(name, {}))
            continue
        ratio = better(name, mine, other)
        kind, goal = GOALS.get(shape, {}).get(name, ("", 0.0))
        reached = None
        if kind == "ratio" and ratio is not None:
            reached = ratio >= goal
        elif kind == "most" and mine is not None:
            reached = mine <= goal
        lines.append(
            f"{name:<34}{_show(mine):>12}{_show(other):>12}{_show(ratio):>8}"
            f"{(f'{goal:g}×' if kind == 'ratio' else f'{goal:g}' if kind else '-'):>10}"
            f"{'' if reached is None else 'yes' if reached else 'no':>6}{_show(limit.get(name)):>10}"
        )
    return "\n".join(lines)


def better(name: str, mine: float | None, other: float | None) -> float | None:
    """How many times better `mine` is: rates by their ratio, times by its inverse."""
    if mine is None or other is None:
        return None
    return round(mine / other if name.endswith("tok_s") else other / mine, 2)


def _online(name: str, mine: Mapping[str, float], other: Mapping[str, float]) -> list[str]:
    lines = []
    for part in mine or other:
        ratio = better(part, mine.get(part), other.get(part))
        label = f"{name} {part}"
        lines.append(f"{label:<34}{_show(mine.get(part)):>12}{_show(other.get(part)):>12}{_show(ratio):>8}")
    return lines


def _best(value: Any) -> float | None:
    """Of several rounds the better."""
    return max(value) if isinstance(value, list) else value if isinstance(value, int | float) else None


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _machine() -> Results:
    """Where and with what this was measured."""
    import torch

    found: Results = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    git = subprocess.run(
        ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    found["commit"] = (
        os.environ.get("BATON_COMMIT") or git.stdout.strip() or "unknown"
    )  # a copy may have no git
    found["date"] = time.strftime("%Y-%m-%d")
    return found


def _write(path: Path | None, results: Results) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
