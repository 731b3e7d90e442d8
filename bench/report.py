"""How a measuring program tells what it found: an aligned table, JSON, and a picture."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from xml.sax.saxutils import escape

Step = TypeVar("Step")
RESULTS = Path(__file__).resolve().parent / "results"

ROW = 26  # pixels
LABELS, BARS, MARGIN = 280, 520, 90
PANEL, PANEL_HEIGHT = 380, 240
COLOURS = ("#4878a8", "#a8b8c8", "#c07048", "#70a070", "#8868a8")


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the range that holds the middle 80 % of them."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Interpolates between neighbours in order, so that nine values have a tenth percentile."""
        ordered = sorted(values)

        def at(share: float) -> float:
            place = share * (len(ordered) - 1)
            below = int(place)
            above = min(below + 1, len(ordered) - 1)
            return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

        return cls(at(0.5), at(0.1), at(0.9))


@dataclass(frozen=True)
class Bar:
    """One bar of the picture; ``target`` is marked on it."""

    label: str
    spread: Spread
    colour: int = 0
    target: float | None = None


@dataclass(frozen=True)
class Goal:
    """A target, and what was measured for it; the median decides. ``unit`` comes behind the numbers."""

    title: str
    measured: Spread
    bound: float
    at_most: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured.median <= self.bound if self.at_most else self.measured.median >= self.bound

    def row(self) -> tuple[str, ...]:
        """For `print_table` under GOAL_COLUMNS."""
        bound = f"{'≤' if self.at_most else '≥'} {self.bound:g}{self.unit}"
        return (self.title, *shown(self.measured, unit=self.unit), bound, "met" if self.met else "NOT met")


@dataclass(frozen=True)
class Curve:
    """Points of a picture with an x axis: dots of a colour, or a line (None). ``panel``: which of several pictures."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int | None
    panel: int = 0


GOAL_COLUMNS = ("", "median", "p10 .. p90", "target", "")


def announce(what: str, takes: str, gigabytes: float = 0) -> None:
    """Say before a measurement begins what it measures, how long it takes on an idle machine, and how much memory."""
    memory = f", {gigabytes:g} GB of memory ({available():.1f} GB are available)" if gigabytes else ""
    print(f"{what}: takes about {takes}{memory}", file=sys.stderr, flush=True)


def available() -> float:
    """Read how many GB the kernel could give to programs at this moment."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9


def progress(steps: Sequence[Step], what: str) -> Iterator[Step]:
    """Yield each of ``steps``, after a line on standard error that says which one it is and how long it took so far."""
    began = time.monotonic()
    for number, step in enumerate(steps, 1):
        spent = time.monotonic() - began
        print(f"  {what} {number} of {len(steps)}, after {spent:.0f} s", file=sys.stderr, flush=True)
        yield step


def shown(spread: Spread, digits: int = 2, unit: str = "") -> tuple[str, str]:
    """Two columns of a table: the median and the range."""
    return f"{spread.median:.{digits}f}{unit}", f"{spread.p10:.{digits}f} .. {spread.p90:.{digits}f}"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        aligned = (word.rjust(width) for word, width in zip(others, widths[1:], strict=True))
        print("   ".join((first.ljust(widths[0]), *aligned)).rstrip())


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write(name: str, title: str, found: dict[str, Any], bars: Sequence[Bar], unit: str) -> None:
    """Write results/NAME.json and results/NAME.svg, and say so."""
    write_both(name, title, found, draw(title, bars, unit))


def write_curves(
    name: str, title: str, found: dict[str, Any], curves: Sequence[Curve], axes: tuple[str, str]
) -> None:
    """The same with curves; ``axes``: what is to the right, and what is up."""
    write_both(name, title, found, draw_curves(title, curves, axes))


def write_both(name: str, title: str, found: dict[str, Any], picture: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    data, drawing = RESULTS / f"{name}.json", RESULTS / f"{name}.svg"
    data.write_text(json.dumps({"title": title, "machine": machine(), **found}, indent=1) + "\n")
    drawing.write_text(picture)
    print(f"\nwritten: {os.path.relpath(data)} {os.path.relpath(drawing)}")


def draw(title: str, bars: Sequence[Bar], unit: str) -> str:
    """An SVG of horizontal bars: the median, a line from p10 to p90, and a tick where the target is."""
    scale = BARS / max(max(bar.spread.p90, bar.target or 0) for bar in bars)
    width, height = LABELS + BARS + MARGIN, ROW * (len(bars) + 2)
    parts = [text(8, ROW * 0.7, title, "start")]
    for line, bar in enumerate(bars, 1):
        top, middle = ROW * line, ROW * (line + 0.5)
        low, median, high = (LABELS + value * scale for value in (bar.spread.p10, bar.spread.median, bar.spread.p90))
        colour = COLOURS[bar.colour % len(COLOURS)]
        parts += [
            text(LABELS - 8, middle + 4, bar.label, "end"),
            f'<rect x="{LABELS}" y="{top + 4}" width="{median - LABELS:.1f}" height="{ROW - 8}" fill="{colour}"/>',
            stroke(low, middle, high, middle, "#222"),
            text(max(median, high) + 6, middle + 4, f"{bar.spread.median:.3g}", "start"),
        ]
        if bar.target is not None:
            at = LABELS + bar.target * scale
            parts.append(stroke(at, top + 1, at, top + ROW - 1, "#d00"))
    parts.append(text(LABELS, ROW * (len(bars) + 1.6), f"{unit}; line: p10 to p90; red: target", "start"))
    return whole(width, height, parts)


def whole(width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="13">', '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def draw_curves(title: str, curves: Sequence[Curve], axes: tuple[str, str]) -> str:
    """An SVG of panels side by side, one scale for all; each names its curves."""
    right = max(x for curve in curves for x, _ in curve.points)
    top = max(y for curve in curves for _, y in curve.points)
    panels = max(curve.panel for curve in curves) + 1
    parts = [text(8, ROW * 0.7, title, "start")]
    for number in range(panels):
        left, bottom = 44 + number * (PANEL + 60), ROW * 1.5 + PANEL_HEIGHT
        mine = [curve for curve in curves if curve.panel == number]
        parts += axis(left, bottom, right, top, axes)
        for line, curve in enumerate(mine):
            at = [(left + x / right * PANEL, bottom - y / top * PANEL_HEIGHT) for x, y in curve.points]
            parts += curve_parts(curve, at, left + PANEL - 8, bottom - 12 - ROW * 0.7 * (len(mine) - line - 1))
    return whole(44 + panels * (PANEL + 60), ROW * 3.5 + PANEL_HEIGHT, parts)


def axis(left: float, bottom: float, right: float, top: float, axes: tuple[str, str]) -> list[str]:
    """Both axes with their ends; and what they mean."""
    return [
        stroke(left, bottom, left + PANEL, bottom, "#888"),
        stroke(left, bottom, left, bottom - PANEL_HEIGHT, "#888"),
        text(left, bottom + ROW * 0.7, "0", "middle"),
        text(left + PANEL, bottom + ROW * 0.7, f"{right:.3g}", "end"),
        text(left - 6, bottom - PANEL_HEIGHT + 5, f"{top:.3g}", "end"),
        text(left - 6, bottom - PANEL_HEIGHT / 2, axes[1], "end"),
        text(left + PANEL / 2, bottom + ROW * 0.7, axes[0], "middle"),
    ]


def curve_parts(curve: Curve, at: Sequence[tuple[float, float]], x: float, y: float) -> list[str]:
    """The curve, and its name with a sample of it."""
    if curve.colour is None:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        line = f'<polyline points="{points}" fill="none" stroke="#222" stroke-width="1.5"/>'
        return [line, stroke(x - 12, y - 4, x, y - 4, "#222"), text(x - 18, y, curve.label, "end")]
    colour = COLOURS[curve.colour % len(COLOURS)]
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in (*at, (x - 6, y - 4))]
    return [*dots, text(x - 18, y, curve.label, "end")]


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def stroke(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="2"/>'
