"""examples/embed and examples/embed-c against an installed fastlb: what they make of a capture, and what Datapath does.

fastlb is installed as a user installs it, from a copy of the sources into a directory of its own, and the examples are
built against that. They run in processes that see nothing of this source tree. (So that it takes seconds: in the quick
profile, from the C that Cython has made of the same sources, and the example without optimisation.)
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import dpkt
import pytest
import yaml

from fastlb import Config, Datapath, Result
from tests.balancers import BACKENDS, CLIENT, HOSTS, VIP, reply_to, service
from tests.frames import ACK, BALANCER_MAC, FIN, RST, SYN, frame, mac_of

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("fastlb", "examples/systemd", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILT = shutil.ignore_patterns("*.so", "__pycache__")
PROFILE = {"FASTLB_PROFILE": "quick"}
NOT_THEIRS = {"LD_PRELOAD"}  # of `make asan`: nothing here is instrumented
BATCH = 32
MORNING = 1_700_000_000  # s; the capture begins
SETTINGS: dict[str, Any] = {
    "flows": 4096,
    "maglev_size": 251,
    "timeouts": {"udp": 5},
    "services": [
        service("nat"),
        service("dsr", port=443),
        service("nat", 6, "udp"),
        service("nat", 4, "udp", port=53, backends=[], no_backend="reset"),
        service("dsr", 6, backends=[], no_backend="reset"),
    ],
}  # fmt: skip
NEIGHBOURS = [f"{host}={mac_of(host)}" for host in HOSTS]
DRIVER = """
import json, sys
import fastlb, packetloop, replay
from fastlb._core import reason_names
config = fastlb.load_config(sys.argv[1])
loop = packetloop.Loop(replay.make_pipeline(config, dict(pair.split("=") for pair in sys.argv[3:])))
reasons, _ = loop.run(open(sys.argv[2], "rb").read()[24:])
print(json.dumps([[reason_names()[reason] for reason in reasons], fastlb.__file__, fastlb.get_include()]))
"""
PUBLISHER = """
import sys, threading
import fastlb, packetloop, replay
config = fastlb.load_config(sys.argv[1])
macs = dict(pair.split("=") for pair in sys.argv[3:])
pipeline = replay.make_pipeline(config, macs)
loop, records = packetloop.Loop(pipeline), open(sys.argv[2], "rb").read()[24:] * 2000
results = []
thread = threading.Thread(target=lambda: results.append(loop.run(records)))
thread.start()
published = 0
while thread.is_alive():
    if pipeline.running:
        pipeline.publish(*replay.make_tables(config, macs))
        published += 1
thread.join()
frames = len(results[0][0])
print(frames, sum(pipeline.counters()[name] for name in fastlb._core.reason_names()), published > 1, pipeline.reclaim())
"""


class Site(NamedTuple):
    """Where fastlb and the example are installed, and the example's sources with the C that Cython made of them."""

    path: Path
    example: Path

    def run(self, *command: str | Path, **options: Any) -> str:
        """A command that sees this fastlb alone; its standard output."""
        libraries = (self.path, self.example, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
        environment = {name: value for name, value in os.environ.items() if name not in NOT_THEIRS}
        environment |= PROFILE | {"PYTHONPATH": os.pathsep.join(map(str, libraries))}
        done = subprocess.run(
            [*map(str, command)], cwd=self.example, env=environment, capture_output=True, timeout=600, **options
        )
        assert done.returncode == 0, f"{command}: {(done.stdout + done.stderr).decode()}"
        return done.stdout.decode()

    def python(self, *arguments: str | Path) -> str:
        return self.run(sys.executable, *arguments)

    def install(self, sources: Path) -> None:
        """As a user does, but from what is here already."""
        options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation")
        self.python("-m", "pip", "install", *options, "--target", self.path, sources)


def do_not_optimise(setup: Path) -> None:
    text = setup.read_text()
    assert text.count('"-O3"') == 1
    setup.write_text(text.replace('"-O3"', '"-O0"'))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    here = tmp_path_factory.mktemp("embed")
    sources = here / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=BUILT)
        else:
            shutil.copy2(ROOT / name, sources)
    installed = Site(here / "site", here / "example")
    shutil.copytree(ROOT / "examples/embed", installed.example, ignore=shutil.ignore_patterns("build", "*.c", "*.so"))
    do_not_optimise(installed.example / "setup.py")
    installed.install(sources)
    installed.install(installed.example)
    return installed


@pytest.fixture
def config(tmp_path: Path) -> Path:
    written = tmp_path / "fastlb.yaml"
    written.write_text(yaml.safe_dump(SETTINGS))
    return written


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("capture") / "in.pcap"
    with written.open("wb") as file:
        writer = dpkt.pcap.Writer(file)
        for at, sent in frames():
            writer.writepkt_time(sent, at)
    return written


def datapath() -> Datapath:
    """What the examples are compared with."""
    balancer = Datapath(Config.from_dict(SETTINGS), mac=BALANCER_MAC)
    for host in HOSTS:
        balancer.set_neighbour(host, mac_of(host))
    return balancer


def frames() -> Iterator[tuple[float, bytes]]:
    """(seconds, frame): every way through the pipeline, more than a batch at once, and a flow that times out."""
    helper = datapath()
    opening = [frame(CLIENT[4], 1000 + client, VIP[4], 80) for client in range(3 * BATCH + 1)]
    for syn in opening:
        yield MORNING, syn
    for syn in opening:
        yield MORNING + 1, reply_to(helper.process(syn).frames[0])
    for client in range(BATCH):
        yield MORNING + 1 + client / 1000, frame(CLIENT[4], 1000 + client, VIP[4], 443, flags=ACK)
    query = frame(CLIENT[6], 4000, VIP[6], 80, "udp", payload=b"?" * 100)
    yield MORNING + 2, query
    yield MORNING + 3, query
    yield MORNING + 10, query
    yield MORNING + 10, frame(CLIENT[4], 4000, VIP[4], 53, "udp", payload=bytes(64))
    yield MORNING + 10, frame(CLIENT[4], 4000, VIP[4], 53, "udp", payload=bytes(64), tags=((0x8100, 7),))
    yield MORNING + 10, frame(CLIENT[6], 4000, VIP[6], 80)
    yield MORNING + 10, frame(CLIENT[6], 4000, VIP[6], 80, flags=RST)
    yield MORNING + 10, frame(CLIENT[4], 4000, VIP[4], 80, flags=SYN | FIN)
    yield MORNING + 10, frame(CLIENT[4], 4000, VIP[4], 81)
    yield MORNING + 10, frame(CLIENT[4], 4000, VIP[4], 80, ttl=1)
    yield MORNING + 10, frame(CLIENT[4], 4000, VIP[4], 80, payload=bytes(1461))
    yield MORNING + 10, frame(CLIENT[4], 4000, VIP[4], 80, payload=bytes(1461), df=True)
    yield MORNING + 10, frame(CLIENT[4], 4002, VIP[4], 443, payload=b"long" * 5000)
    yield MORNING + 10, frame(BACKENDS[4][0], 8080, "10.9.9.9", 1)
    yield MORNING + 10, frame(CLIENT[4], 4001, VIP[4], 443, payload=b"odd")[:-1]
    yield MORNING + 10, b""


def records(capture: Path) -> list[tuple[float, bytes]]:
    with capture.open("rb") as file:
        return list(dpkt.pcap.Reader(file))


def by_millisecond(capture: Path) -> list[Result]:
    """What Datapath makes of the capture, the frames of each millisecond at once."""
    balancer = datapath()
    results = []
    for now, group in groupby(records(capture), lambda record: int(record[0] * 1000 + 0.5)):
        results += balancer.process_batch([data for _, data in group], now / 1000)
    return results


REASONS = {
    "conntrack", "scheduled", "maglev", "rejected", "not_ip", "no_service", "tcp_flags", "time_exceeded", "too_big",
    "no_backend", "reply_unknown", "ip_length",
}  # fmt: skip


def test_the_loop_gives_each_frame_the_reason_that_datapath_gives(site: Site, config: Path, capture: Path) -> None:
    reasons, package, include = json.loads(site.python("-c", DRIVER, config, capture, *NEIGHBOURS))
    expected = [result.reason for result in by_millisecond(capture)]
    assert reasons == expected
    assert set(expected) == REASONS
    assert Path(package).parent == site.path / "fastlb"
    assert Path(include) == site.path / "fastlb/dataplane"


def test_the_command_sends_the_frames_that_datapath_sends(
    site: Site, config: Path, capture: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.pcap"
    printed = site.python("replay.py", config, capture, target, *NEIGHBOURS)
    expected = by_millisecond(capture)
    assert [data for _, data in records(target)] == [sent for result in expected for sent in result.frames]
    counts = {name: int(count) for count, name in map(str.split, printed.splitlines())}
    assert counts == Counter(result.reason for result in expected)


def test_the_command_without_arguments_prints_its_usage() -> None:
    done = subprocess.run([sys.executable, ROOT / "examples/embed/replay.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: replay.py")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.yaml", "in.pcap", "out.pcap", "10.0.0.11"), "'10.0.0.11' is not ADDRESS=MAC"),
        (("no.yaml", "no.pcap", "out.pcap"), "No such file or directory: 'no.pcap'"),
    ],
)
def test_the_command_says_what_is_wrong(site: Site, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        site.python("replay.py", *arguments)
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_the_packet_path_in_the_example_touches_no_python(site: Site) -> None:
    site.python(ROOT / "tools/nogil_gate.py", "--minimum", "100", "packetloop.c")


def test_publishing_while_the_loop_runs(site: Site, config: Path, capture: Path) -> None:
    """The interpreter is free meanwhile, and each table lives as long as a batch uses it."""
    frames, counted, published, kept = site.python("-c", PUBLISHER, config, capture, *NEIGHBOURS).split()
    assert (int(frames), published, kept) == (2000 * len(records(capture)), "True", "1")
    assert counted == frames


@pytest.mark.parametrize(("cut", "length"), [(1, None), (0, 70000)])
def test_the_loop_refuses_a_broken_capture(
    site: Site, config: Path, capture: Path, tmp_path: Path, cut: int, length: int | None
) -> None:
    broken = bytearray(capture.read_bytes()[: -cut or None])
    if length is not None:
        broken[24 + 8 : 24 + 12] = length.to_bytes(4, "little")
    wrong = tmp_path / "wrong.pcap"
    wrong.write_bytes(broken)
    with pytest.raises(AssertionError, match=r"ValueError: record \d+ is cut off, or longer than 65553 bytes"):
        site.python("replay.py", config, wrong, tmp_path / "out.pcap")


# ---- plain C


def compile_command(source: Path, target: Path) -> list[str]:
    """What ``cc $(python3-config --embed --cflags --ldflags)`` would be for the interpreter that runs this test."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C compiler: {compiler[0]}")
    name = f"libpython{sysconfig.get_config_var('LDVERSION')}.so"
    base = Path(sysconfig.get_config_var("LIBDIR"))
    folders = [base, base / (sysconfig.get_config_var("MULTIARCH") or "")]
    folder = next((folder for folder in folders if (folder / name).exists()), None)
    if folder is None:
        pytest.skip(f"no {name} in {' or '.join(map(str, folders))}: this interpreter cannot be embedded")
    include = sysconfig.get_path("include")
    library = [f"-L{folder}", f"-Wl,-rpath,{folder}", f"-lpython{sysconfig.get_config_var('LDVERSION')}"]
    return [*compiler, "-Wall", "-Wextra", "-Werror", "-o", str(target), str(source), f"-I{include}", *library]


def test_the_c_program_prints_what_datapath_says(site: Site, config: Path, capture: Path, tmp_path: Path) -> None:
    program = tmp_path / "verdicts"
    site.run(*compile_command(ROOT / "examples/embed-c/verdicts.c", program))
    printed = site.run(program, config, *NEIGHBOURS, input=capture.read_bytes())
    balancer, read, expected = datapath(), records(capture), []
    for start in range(0, len(read), BATCH):
        batch = read[start : start + BATCH]
        for result in balancer.process_batch([data for _, data in batch], batch[-1][0]):
            words = [result.verdict.name, result.reason, str(result.backend), *(sent.hex() for sent in result.frames)]
            expected.append(" ".join(words))
    assert printed.splitlines() == expected
