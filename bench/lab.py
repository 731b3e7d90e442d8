"""How fast does fastlb carry packets, next to the least that a forwarder can do? In parts:

    drain      ns a packet costs a core, one worker and two
    rate       packets a second without loss
    latency    what a packet waits in the balancer, on a busy link and after a pause
    transfer   a big file over NAT, and a flood
    modes      a big file through every way to forward
    crash      a thousand transfers while fastlb is killed and started again
    rebuild    what a packet waits while tables are built
    schedulers shares and response times of every scheduler, over servers that are not equally fast
    slowstart  the new flows of a backend that comes back, as a curve
    flood      SYNs from random sources, beside connections that stay
    checks     thousands of backends with health checks: started, watched, killed
    reload     what a change costs where there are thousands of backends
    routes     what a million routes on the host cost

Each part is a module beside this one. All forwarders of a part take turns; targets are judged by the medians. See
README.md for how to read the numbers.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "netns-lab"))

import checks
import crash
import drain
import flood
import latency
import modes
import rate
import rebuild
import reload
import routes
import schedulers
import slowstart
import transfer
from extension import build
from namespaces import become_root
from report import announce, progress

PARTS = {
    "drain": drain.run, "rate": rate.run, "latency": latency.run, "transfer": transfer.run, "modes": modes.run,
    "crash": crash.run, "rebuild": rebuild.run, "schedulers": schedulers.run, "slowstart": slowstart.run,
    "flood": flood.run, "checks": checks.run, "reload": reload.run, "routes": routes.run,
}  # fmt: skip
MINUTES = dict.fromkeys(PARTS, 0.8) | {"checks": 9, "reload": 3, "routes": 3}  # on an idle machine


def main() -> None:
    parser = argparse.ArgumentParser(
        description="fastlb beside bare reflectors: what a packet costs, how many pass, how long they take."
    )
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--pairs", type=int, default=0, help="turns of each forwarder, where a part makes fewer")
    parser.add_argument("--backends", type=int, nargs="+", default=checks.SIZES, help="sizes that checks measures")
    parser.add_argument("--services", type=int, default=0, help="services that checks spreads them over; by size")
    options = parser.parse_args()
    become_root()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no namespace is left behind
    for extension in ("_reflect", "_load"):
        build(extension)
    runs = PARTS | {"checks": partial(checks.run, sizes=options.backends, count=options.services)}
    parts = options.parts or list(PARTS)
    announce(f"lab.py, {len(parts)} of {len(PARTS)} parts", f"{sum(MINUTES[part] for part in parts):.0f} minutes")
    for part in progress(parts, "part"):
        print(f"  {part}", file=sys.stderr, flush=True)
        runs[part](options.pairs)
        print()


if __name__ == "__main__":
    main()
