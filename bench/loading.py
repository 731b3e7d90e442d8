"""How long does it take to read a configuration, from the file's text to what has passed every rule?

Rounds take turns over sizes. "YAML" is from text to plain data, "models and rules" from there to a Config; what
`fastlb check` does besides is to start Python and to import fastlb.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from report import Bar, Spread, announce, print_table, progress, shown, write

from fastlb.config import Config
from fastlb.config.yaml import Document

ROUNDS, QUICK_ROUNDS = 7, 3
SIZES = ((10, 10), (100, 10), (1000, 10), (10, 10_000), (100, 1000))  # services, backends of each
STEPS = ("YAML", "models and rules", "both")


def text_of(services: int, backends: int) -> str:
    """A file with so many services; no two of their backends have one address."""
    parts = ["services:\n"]
    for number in range(services):
        parts.append(
            f"  - name: s{number}\n    vip: 198.18.{number >> 8}.{number & 255}\n    port: 80\n    protocol: tcp\n"
            "    forward: nat\n    check: {type: tcp}\n    backends:\n"
        )
        for host in range(number * backends, (number + 1) * backends):
            address = f"10.{host >> 16}.{host >> 8 & 255}.{host & 255}"
            parts.append(f"      - {{address: {address}, port: 8080, weight: 10}}\n")
    return "".join(parts)


def measure(file: Path) -> dict[str, float]:
    """Milliseconds of CPU by step."""
    began = time.thread_time()
    document = Document.read(str(file))
    read = time.thread_time()
    config = Config.from_dict(document.data)  # type: ignore[arg-type]  # a mapping, as text_of has written it
    ended = time.thread_time()
    del document, config
    return dict(zip(STEPS, ((read - began) * 1000, (ended - read) * 1000, (ended - began) * 1000), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds of CPU that reading a configuration takes.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    rounds = QUICK_ROUNDS if quick else ROUNDS
    announce("loading.py, how long a configuration takes to read", "half a minute" if quick else "a minute")
    found: dict[tuple[tuple[int, int], str], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        files = {size: Path(directory, f"{size[0]}x{size[1]}.yaml") for size in SIZES}
        for size, file in files.items():
            file.write_text(text_of(*size))
        for _ in progress(range(rounds), "round"):
            for size, file in files.items():
                for step, took in measure(file).items():
                    found.setdefault((size, step), []).append(took)
    tell({case: Spread.of(values) for case, values in found.items()}, rounds)


def tell(found: dict[tuple[tuple[int, int], str], Spread], rounds: int) -> None:
    """The table, JSON and the picture."""
    title = f"ms of CPU to read a configuration, {rounds} rounds"
    print_table(
        (title, *STEPS),
        [(said(size), *(shown(found[size, step], digits=0)[0] for step in STEPS)) for size in SIZES],
    )
    values = [
        {"services": size[0], "backends": size[0] * size[1], "step": step, **asdict(spread)}
        for (size, step), spread in found.items()
    ]
    bars = [Bar(said(size), found[size, "both"], 0) for size in SIZES]
    write("loading", title, {"values": values}, bars, "ms")


def said(size: tuple[int, int]) -> str:
    services, backends = size
    return f"{services:,} services, {services * backends:,} backends"


if __name__ == "__main__":
    main()
