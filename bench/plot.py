"""Draws a result of bench/gpu.py: Baton, vLLM and the machine's limit, each figure as a speed beside vLLM's.

usage: python bench/plot.py RESULTS.json OUT.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_LABELS = {
    "throughput_tok_s": "256 requests\ntok/s",
    "tpot_ms_b1": "decode, 1\nms/token",
    "tpot_ms_b8": "decode, 8\nms/token",
    "tpot_ms_b64": "decode, 64\nms/token",
    "tpot_ms_b256": "decode, 256\nms/token",
    "ttft_long_cold_ms": "8k prompt\nms",
    "ttft_long_hit_ms": "8k prompt,\nhit, ms",
}


def read(path: Path) -> dict[str, Any]:
    """A result, its shapes those that both engines have figures of. Raises `ValueError` where none has."""
    results = json.loads(path.read_text())
    shapes = results.get("shapes") if isinstance(results, dict) else None
    if not isinstance(shapes, dict):
        raise ValueError("no result of bench/gpu.py")
    both = {name: f for name, f in shapes.items() if _common(f)}
    if not both:
        raise ValueError("no shape with figures of both engines")
    return {**results, "shapes": both}


def _common(figures: dict[str, Any]) -> list[str]:
    """Figures that both engines have."""
    return [name for name in _LABELS if all(name in figures.get(engine, {}) for engine in ("baton", "vllm"))]


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel per shape. Bars: speed as a multiple of vLLM's (log scale), their labels the figures."""
    shapes = results["shapes"]
    figure, panels = pyplot.subplots(len(shapes), 1, figsize=(9, 3.4 * len(shapes)), squeeze=False)
    for (name, figures), panel in zip(shapes.items(), panels[:, 0], strict=True):
        names = _common(figures)
        for place, (engine, colour, label) in enumerate(
            (("vllm", "#b8b8b8", "vLLM 0.26"), ("baton", "#2a6fbb", "Baton"), ("limit", "#f0c36d", "limit"))
        ):
            values = [_best(figures.get(engine, {}).get(n)) for n in names]
            speeds = [
                0.0 if value is None else _speed(n, value, _best(figures["vllm"][n]))
                for n, value in zip(names, values, strict=True)
            ]
            bars = panel.bar(
                [i + (place - 1) * 0.27 for i in range(len(names))], speeds, 0.26, color=colour, label=label
            )
            for bar, value in zip(bars, values, strict=True):
                if value is not None:
                    text = f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.3g}"
                    panel.text(
                        bar.get_x() + bar.get_width() / 2,
                        bar.get_height(),
                        text,
                        ha="center",
                        va="bottom",
                        fontsize=7,
                    )
        panel.set_yscale("log")
        panel.set_ylim(top=panel.get_ylim()[1] * 1.2)  # room for the highest label
        panel.set_yticks([0.5, 1, 2, 5, 10], ["0.5×", "1×", "2×", "5×", "10×"])
        panel.axhline(1, color="#888888", linewidth=0.6)
        panel.set_xticks(range(len(names)), [_LABELS[n] for n in names], fontsize=8)
        panel.set_ylabel("speed beside vLLM")
        panel.set_title(
            f"Qwen3-{name.upper()} shape, bfloat16, one {results.get('device', 'device')}", fontsize=10
        )
        panel.legend(fontsize=8, ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _best(value: list[float] | float | None) -> float | None:
    return max(value) if isinstance(value, list) else value


def _speed(name: str, value: float, beside: float | None) -> float:
    assert beside
    return value / beside if name.endswith("tok_s") else beside / value


def main() -> None:
    """Draws one file."""
    parser = argparse.ArgumentParser(description="Draw a result of bench/gpu.py.")
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    try:
        results = read(a.results)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        sys.exit(f"bench/plot.py: {a.results}: {why}")
    draw(results, a.out)


if __name__ == "__main__":
    main()
