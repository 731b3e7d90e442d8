#!/usr/bin/env python3
"""Run a program of this lab on a Linux 6.1 with everything in it: a kernel that is a process (user-mode-linux).

    .venv/bin/python netns-lab/uml.py netns-lab/interop.py

The kernel and `kmod` are Debian's packages, which are fetched and unpacked into build/uml and not installed. The
kernel's file system is this machine's own (hostfs), with a /run of its own; it has no network but what is made inside
it. It ends with the program, and the exit code is the program's.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PLACE = PROJECT / "build" / "uml"
PACKAGES = ("user-mode-linux", "kmod")
MEMORY = "1536M"
TIMEOUT = 2400.0  # seconds for everything inside; mostly it takes an eighth of that
MODULES = (
    "ipv6", "veth", "bridge", "tun", "ipip", "sit", "ip_gre", "ip6_gre", "ip6_tunnel", "fou", "fou6", "ip_vs",
    "ip_vs_rr", "sch_netem", "sch_ingress", "cls_bpf", "af_packet",
)  # fmt: skip
INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /run
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /run/netns /dev/net
ip link set lo up
for module in {modules}; do {kmod}/modprobe -d {place} $module || echo "no module $module"; done
echo 1 > /proc/sys/net/core/fb_tunnels_only_for_init_net
cd {project}
PYTHONUNBUFFERED=1 {python} {words}
echo "exit code $?"
echo o > /proc/sysrq-trigger
sleep 5
"""


class UmlError(Exception):
    """The kernel cannot be had, or did not come to an end."""


def prepare() -> Path:
    """Fetch and unpack what is not there yet; returns the kernel's executable."""
    kernel = PLACE / "usr" / "bin" / "linux.uml"
    if not (PLACE / "ready").exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        run("apt-get", "download", *PACKAGES)
        for package in PLACE.glob("*.deb"):
            run("dpkg-deb", "-x", package.name, ".")
            package.unlink()
        kmod = PLACE / "bin" / "kmod"
        for name in ("modprobe", "depmod"):
            PLACE.joinpath("bin", name).unlink(missing_ok=True)
            PLACE.joinpath("bin", name).symlink_to("kmod")
        [modules] = PLACE.joinpath("usr", "lib", "uml", "modules").iterdir()
        PLACE.joinpath("lib", "modules").mkdir(parents=True, exist_ok=True)
        PLACE.joinpath("lib", "modules", modules.name).symlink_to(modules)
        run(str(kmod.with_name("depmod")), "-b", str(PLACE), modules.name)
        PLACE.joinpath("ready").touch()
    return kernel


def run(*words: str) -> None:
    """A command in PLACE; UmlError with what it said when it fails."""
    try:
        done = subprocess.run(words, cwd=PLACE, capture_output=True, text=True)
    except FileNotFoundError:
        raise UmlError(f"{words[0]} is missing: this needs Debian, or a system like it") from None
    if done.returncode != 0:
        raise UmlError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


def boot(kernel: Path, words: list[str]) -> int:
    """Run a Python program inside; its output goes to ours, its exit code is returned."""
    init = PLACE / "init"
    init.write_text(
        INIT.format(
            modules=" ".join(MODULES), kmod=PLACE / "bin", place=PLACE, project=PROJECT, python=sys.executable,
            words=" ".join(words),
        )
    )  # fmt: skip
    init.chmod(0o755)
    command = [
        str(kernel), f"mem={MEMORY}", "rootfstype=hostfs", "hostfs=/", "rw", "quiet", "loglevel=0", f"init={init}",
        "con=null", "con0=fd:0,fd:1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)  # fmt: skip
    code = 1
    deadline = threading.Timer(TIMEOUT, end, [process])
    deadline.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if ended := re.match(r"exit code (\d+)", line):
                code = int(ended[1])
                break
            print(line.rstrip(), flush=True)
        else:
            raise UmlError(f"the kernel ended before the program did, or was not done after {TIMEOUT:g} s")
        return code
    finally:
        deadline.cancel()
        end(process)
        process.wait()


def end(process: subprocess.Popen[str]) -> None:
    """The kernel, and the processes that it keeps for its own: one session, which nothing else is in."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a Python program of this lab inside user-mode-linux.")
    parser.add_argument("words", nargs="+", metavar="PROGRAM")
    words = parser.parse_args().words
    try:
        sys.exit(boot(prepare(), ["-X", "utf8", *words]))
    except UmlError as error:
        sys.exit(f"uml: {error}")


if __name__ == "__main__":
    main()
