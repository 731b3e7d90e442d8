"""A user manager of systemd with namespaces of its own, and the shipped unit under it, for tests.

What differs from the unit as it is: the paths of fastlb and of its configuration, the network namespace, and that it
does not wait for a network that this systemd does not know. Nothing here touches the machine's own systemd.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.netns.balancer import PATIENCE, ROOT, until

SYSTEMD = Path("/lib/systemd/systemd")
UNIT = ROOT / "examples/systemd/fastlb.service"

# In a mount namespace of its own: systemd looks there whether it has booted the machine, and the machine may have none.
START = "cd /run && mkdir -p systemd && mount -t tmpfs none systemd && mkdir systemd/system && exec {systemd} --user"


def missing() -> str | None:
    """Return what this machine lacks for it."""
    if os.geteuid() != 0:
        return "needs root: makes namespaces"
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        return f"needs systemd: {SYSTEMD} and systemctl (Debian package: systemd)"
    return None


class Systemd:
    """A running user manager that has one unit, fastlb.service."""

    def __init__(self, folder: Path, namespace: str, config: Path) -> None:
        self._namespace, self._config = namespace, config
        self.runtime, self._units, self.log = folder / "run", folder / "config/systemd/user", folder / "systemd.log"
        self._groups = [folder for folder in own_groups() if can_hold_processes(folder)]
        self._environment = os.environ | {
            "XDG_RUNTIME_DIR": str(self.runtime), "XDG_CONFIG_HOME": str(folder / "config"),
            "SYSTEMD_LOG_TARGET": "console",
        }  # fmt: skip
        for each in (self.runtime, self._units):
            each.mkdir(parents=True)
        (self._units / UNIT.name).write_text(self._unit())

    def _unit(self) -> str:
        command = f"{shutil.which('ip')} netns exec {self._namespace} {sys.executable} -m fastlb"
        text = UNIT.read_text().replace("/usr/local/bin/fastlb", command).replace("/etc/fastlb.yaml", str(self._config))
        kept = [line for line in text.splitlines() if "network-online" not in line]
        at = kept.index("[Service]") + 1
        log = [f"StandardOutput=append:{self.log}", f"StandardError=append:{self.log}", f"WorkingDirectory={ROOT}"]
        return "\n".join([*kept[:at], *log, *kept[at:], ""])

    def __enter__(self) -> Systemd:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", START.format(systemd=SYSTEMD)],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=self._join_groups,
            )  # fmt: skip
        if not until(lambda: self.control("show", "-p", "Version").returncode == 0):
            self._end()
            raise AssertionError(f"systemd does not answer: {self.log.read_text()}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.control("stop", "fastlb")
        self._end()
        if error is not None:
            print(self.log.read_text(), file=sys.stderr)

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for group in self._groups:
            remove_group(group)

    def _join_groups(self) -> None:
        for group in self._groups:
            group.mkdir(exist_ok=True)
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def control(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run systemctl to its end."""
        return subprocess.run(
            ["systemctl", "--user", *words], env=self._environment, capture_output=True, text=True,
            timeout=2 * PATIENCE, check=False,
        )  # fmt: skip

    def show(self, *properties: str) -> list[str]:
        """Return properties of the unit."""
        lines = self.control("show", "-p", ",".join(properties), "fastlb").stdout.splitlines()
        found = dict(line.split("=", 1) for line in lines)
        return [found[name] for name in properties]


def own_groups() -> Iterator[Path]:
    """Yield the group that a user manager may have in each hierarchy in which systemd keeps processes."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            kind, _, options = after.split(" ", 2)
            unified = controllers == "" and kind == "cgroup2"
            if unified or (controllers == "name=systemd" and kind == "cgroup" and controllers in options.split(",")):
                yield Path(before.split(" ")[4]) / path.lstrip("/") / f"fastlb-test-{os.getpid()}"


def can_hold_processes(group: Path) -> bool:
    """Return whether the group can be made."""
    with suppress(OSError):
        group.mkdir(exist_ok=True)
        return True
    return False


def remove_group(group: Path) -> None:
    """Remove a group and those below it; the kernel frees them with some delay."""
    end = time.monotonic() + PATIENCE
    while group.exists() and time.monotonic() < end:
        for each in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):
                each.rmdir()
        with suppress(OSError):
            group.rmdir()
