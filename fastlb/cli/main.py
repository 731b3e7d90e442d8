"""The `fastlb` command. Exit codes: 0 fine, 1 runtime failure, 2 usage or invalid configuration."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from fastlb._core import flow_states
from fastlb.config.fields import drain_time
from fastlb.config.schema import Config, control_path, json_schema, load_config
from fastlb.control.client import call, wait_for_end
from fastlb.errors import FastlbError
from fastlb.model.modes import TWO_WAY
from fastlb.observe import log, trace
from fastlb.observe.flows import collect, count
from fastlb.version import __version__

if TYPE_CHECKING:  # only commands that need them load netlink and eBPF
    from fastlb.daemon.leftovers import Leftover
    from fastlb.workers.flow_file import LeftFile

DEFAULT_SOCKET = str(Config.model_fields["control"].default)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except FastlbError as error:
        for line in str(error).splitlines():
            print(f"fastlb: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as in `fastlb schema | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # everything else that can go wrong has become a FastlbError
        print(f"fastlb: cannot write the output: {error.strerror}", file=sys.stderr)
        os._exit(1)  # without a last attempt to write it
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastlb", description="A layer-4 load balancer on packet rings.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fastlb {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="balance, until SIGTERM; SIGHUP reads the configuration again")
    run.add_argument("-c", "--config", required=True, metavar="FILE", help="the configuration")
    run.add_argument("--log-level", choices=("info", "warning", "error"), default="info", help="(default: info)")
    run.set_defaults(run=_run)

    check = commands.add_parser("check", help="say everything that is wrong with a configuration")
    check.add_argument("-c", "--config", required=True, metavar="FILE", help="the configuration")
    check.add_argument("--host", action="store_true", help="also whether this host's links and routes will do for it")
    check.add_argument("--json", action="store_true", help="print the configuration with its defaults")
    check.set_defaults(run=_check)

    status = commands.add_parser("status", help="counters, services and backends of a running fastlb")
    _add_socket(status)
    status.add_argument("--json", action="store_true", help="all of it, as JSON: see docs/counters.md")
    status.set_defaults(run=_status)

    _add_conns(commands.add_parser("conns", help="the flows of a running fastlb, or how many there are"))
    _add_trace(commands.add_parser("trace", help="which backend a client's packet would get, and why"))

    drain = commands.add_parser("drain", help="give a backend no new flows; those that it has stay")
    enable = commands.add_parser("enable", help="take back drain and weight")
    weight = commands.add_parser("weight", help="another weight than the configuration's, until enable or a clean stop")
    for command, run_it in ((drain, _drain), (enable, _enable), (weight, _weight)):
        command.add_argument("service", metavar="SERVICE", help="its name")
        command.add_argument("backend", metavar="BACKEND", help="its address, or address:port")
        command.set_defaults(run=run_it)
    drain.add_argument(
        "--deadline", type=_drain_time, metavar="TIME",
        help="such as 5m: afterwards flows that it still has go, too, as the service's on_leave says",
    )  # fmt: skip
    weight.add_argument("number", metavar="N", type=_number(0, 65535), help="0 to 65535")
    for command in (drain, enable, weight):
        _add_socket(command)

    reload = commands.add_parser("reload", help="make a running fastlb read its configuration again")
    _add_socket(reload)
    reload.set_defaults(run=_reload)

    stop = commands.add_parser("stop", help="make a running fastlb stop, and wait until it has")
    stop.add_argument(
        "--handover", action="store_true", help="leave guard, VIPs and flows to the next run, as a restart wants it"
    )
    _add_socket(stop)
    stop.set_defaults(run=_stop)

    schema = commands.add_parser("schema", help="print the JSON Schema of the configuration")
    schema.set_defaults(run=_schema)

    guard = commands.add_parser("guard", help="show or remove what a crash leaves behind: guards, VIPs, flow files")
    guard.add_argument("action", choices=("show", "remove"), help="remove refuses while a running fastlb uses them")
    guard.add_argument("--json", action="store_true", help="print what was found as JSON")
    guard.add_argument("-c", "--config", metavar="FILE", help="also look for the flow file of this configuration")
    guard.set_defaults(run=_guard)

    _add_decap(commands.add_parser("decap", help="on a backend: take packets out of tunnels, until SIGTERM"))
    return parser


def _add_decap(decap: argparse.ArgumentParser) -> None:
    decap.description = (
        "Receive ipip, gre and gue on a host whose kernel has no tunnel devices, and hand what is inside to the host "
        "by a TUN device. SIGUSR1 logs the counters. See docs/decap.md."
    )
    decap.add_argument("interface", metavar="INTERFACE", help="where the tunnels' packets arrive")
    decap.add_argument("--mode", type=_modes, metavar="MODES", help="some of ipip,gre,gue (default: all)")
    decap.add_argument("--tun", type=_interface_name, default="fastlb0", metavar="NAME", help="(default: fastlb0)")
    decap.add_argument("--port", type=_number(1, 65535), default=6080, help="UDP port of gue (default: 6080)")
    decap.add_argument("--key", type=_number(0, (1 << 32) - 1), help="that gre must have (default: it must have none)")
    decap.add_argument(
        "--address", type=_address, action="append", default=[], metavar="ADDR",
        help="take only packets to this one; may be repeated (default: all that the interface has at the start)",
    )  # fmt: skip
    decap.add_argument("--log-level", choices=("info", "warning", "error"), default="info", help="(default: info)")
    decap.set_defaults(run=_decap)


def _add_conns(conns: argparse.ArgumentParser) -> None:
    conns.add_argument("--service", metavar="NAME", help="only those of this service")
    conns.add_argument("--backend", metavar="ADDR[:PORT]", help="only those at this backend")
    conns.add_argument("--client", metavar="ADDR", help="only those from this address, or prefix (198.51.100.0/24)")
    conns.add_argument("--state", choices=flow_states(), help="only those in this state")
    conns.add_argument("--count", action="store_true", help="how many, by service and backend")
    conns.add_argument("--limit", type=_number(1, 1 << 30), default=100, metavar="N", help="of flows (default: 100)")
    conns.add_argument("--json", action="store_true", help="print them as JSON")
    _add_socket(conns)
    conns.set_defaults(run=_conns)


def _add_trace(traced: argparse.ArgumentParser) -> None:
    traced.description = (
        "Follow a packet from SRC to DST through a running fastlb, or, with --offline, through a configuration as if "
        "fastlb had just begun. Nothing is sent, and nothing is changed. See docs/trace.md."
    )
    traced.add_argument("source", metavar="SRC:PORT", help="the client, as 198.51.100.7:40000 or [2001:db8::7]:40000")
    traced.add_argument("destination", metavar="DST:PORT/PROTO", help="the VIP, as 203.0.113.10:443/tcp")
    traced.add_argument("--offline", action="store_true", help="ask the configuration of -c, not a running fastlb")
    traced.add_argument("--json", action="store_true", help="print every step with its facts as JSON")
    _add_socket(traced)
    traced.set_defaults(run=_trace, refuse=traced.error)


def _number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text, 0)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in {least}..{most}")
        return number

    parse.__name__ = "number"  # "invalid number value: 'x'"
    return parse


def _drain_time(text: str) -> float:
    try:
        return drain_time(float(text) if text.replace(".", "", 1).isdigit() else text)
    except FastlbError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(dict.fromkeys(text.split(",")))
    if unknown := [mode for mode in modes if mode not in ("ipip", "gre", "gue")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of ipip, gre, gue")
    return modes


def _interface_name(text: str) -> str:
    if not 0 < len(text.encode()) < 16 or "/" in text or text in (".", "..") or any(map(str.isspace, text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for an interface: 1 to 15 characters, no / or space")
    return text


def _address(text: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_socket(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help=f"its control socket (default: {DEFAULT_SOCKET})")
    where.add_argument("-c", "--config", metavar="FILE", help="its configuration, which names the socket")


def _socket_of(arguments: argparse.Namespace) -> str:
    if arguments.config:
        return control_path(arguments.config)
    return arguments.socket or DEFAULT_SOCKET


def _run(arguments: argparse.Namespace) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload yet
    from fastlb.daemon.balancer import Engine  # only this command needs netlink and eBPF

    log.configure(arguments.log_level)
    Engine(arguments.config).run()


def _decap(arguments: argparse.Namespace) -> None:
    from fastlb.daemon import decap  # as with run

    log.configure(arguments.log_level)
    decap.run(
        decap.Options(
            interface=arguments.interface,
            modes=arguments.mode or decap.MODES,
            tun=arguments.tun,
            port=arguments.port,
            key=arguments.key,
            addresses=tuple(arguments.address),
        )
    )


def _check(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config)
    notes = []
    if arguments.host:
        from fastlb.daemon.preflight import check_this_host  # netlink, which embedding does without

        notes = check_this_host(arguments.config, config)
    if arguments.json:
        print(config.model_dump_json(indent=2))
        return
    backends = sum(len(service.backends) for service in config.services)
    print(f"{arguments.config}: valid, {_count(len(config.services), 'service')}, {_count(backends, 'backend')}")
    for note in notes:
        print(f"note: {note}")
    if not config.interfaces:
        print("note: interfaces is empty, which will do for embedding; fastlb run needs at least one")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def _reload(arguments: argparse.Namespace) -> None:
    services = call(_socket_of(arguments), "reload")["services"]
    print(f"reloaded: {services} service{'s' if services != 1 else ''}")


def _stop(arguments: argparse.Namespace) -> None:
    path = _socket_of(arguments)
    stays = call(path, "stop", handover=arguments.handover)
    wait_for_end(path)
    if not arguments.handover:
        print("stopped")
        return
    flows = f"{_count(stays['flows'], 'flow')} in {stays['flow_file']}" if stays["flow_file"] else "no flow"
    vips = f"; VIPs {', '.join(stays['vips'])}" if stays["vips"] else ""
    print(f"stopped; for the next run there stay: the guard on {', '.join(stays['interfaces'])}{vips}; {flows}")


def _drain(arguments: argparse.Namespace) -> None:
    print("draining: " + _change(arguments, "drain", deadline=arguments.deadline))


def _enable(arguments: argparse.Namespace) -> None:
    print("enabled: " + _change(arguments, "enable"))


def _weight(arguments: argparse.Namespace) -> None:
    print(f"weight {arguments.number}: " + _change(arguments, "weight", weight=arguments.number))


def _change(arguments: argparse.Namespace, command: str, **more: float | None) -> str:
    named = call(_socket_of(arguments), command, service=arguments.service, backend=arguments.backend, **more)
    return f"{named['service']} {named['backend']}"


def _guard(arguments: argparse.Namespace) -> None:
    from fastlb.daemon import leftovers

    config = load_config(arguments.config) if arguments.config else None
    found, files = leftovers.remove(config) if arguments.action == "remove" else leftovers.show(config)
    if arguments.json:
        listed = {"interfaces": [asdict(each) for each in found], "flow_files": [asdict(each) for each in files]}
        print(json.dumps(listed, indent=2))
        return
    if not found and not files:
        print("there is no guard")
    elif arguments.action == "remove":
        print(f"removed from: {', '.join([*(each.interface for each in found), *(each.path for each in files)])}")
    else:
        print("\n\n".join(_describe_leftovers(found, files)))


def _describe_leftovers(found: Sequence[Leftover], files: Sequence[LeftFile]) -> Iterator[str]:
    if found:
        rows = (
            (each.interface, each.program_id or "-", ", ".join(each.vips) or "-", _state(each.in_use))
            for each in found
        )
        yield _table(("INTERFACE", "PROGRAM", "VIPS", "STATE"), rows)
    if files:
        sized = ((each.path, f"{each.bytes >> 20} MiB", each.state) for each in files)
        yield _table(("FLOW FILE", "SIZE", "STATE"), sized)


def _state(in_use: bool) -> str:
    return "in use" if in_use else "left over"


def _status(arguments: argparse.Namespace) -> None:
    status = call(_socket_of(arguments), "status")
    print(json.dumps(status, indent=2) if arguments.json else _describe(status))


def _describe(status: dict[str, Any]) -> str:
    counters, flows = status["counters"], status["flows"]
    rows = [
        (
            service["name"],
            f"{service['vip']} {service['port']}/{service['protocol']}",
            service["forward"],
            backend["backend"],
            _standing(backend),
            backend["weight"],
            backend["active_flows"],
            backend["new_flows"],
            backend["packets"],
            backend["reply_packets"] if service["forward"] in TWO_WAY else "-",
        )
        for service in status["services"]
        for backend in service["backends"] or [dict.fromkeys(_BACKEND_COLUMNS, "-")]
    ]
    heads = ("SERVICE", "VIP", "FORWARD", "BACKEND", "STATE", "WEIGHT", "FLOWS", "NEW", "PACKETS", "REPLIES")
    return "\n".join(
        (
            f"fastlb {status['version']}, pid {status['pid']}, up {status['uptime']:.0f} s, "
            f"on {', '.join(status['interfaces'])}, transmit {_pairs(status['transmit'])}, "
            f"open blocks {'read' if status['open_blocks'] else 'not read'}",
            f"packets {counters['packets']}, forwarded {counters['forwarded']}, "
            f"transmitted {counters['transmitted']}, lost by the ring {counters['ring_drops']}",
            f"flows {flows['active']} of {flows['entries']} entries, evicted {counters['flows_evicted']}, "
            f"untracked {counters['flows_untracked']}",
            *(
                f"source ports IPv{ports['version']} {ports['protocol']}: {ports['taken']} of {ports['all']} taken"
                for ports in flows["source_ports"]
            ),
            *(
                f"affinity {sticky['clients']} clients remembered, room for {sticky['entries']}; {counters['affine']} "
                "flows followed theirs"
                for sticky in [status["affinity"]]
                if sticky["clients"] or counters["affine"]
            ),
            f"drops {_nonzero(counters['drops'])}",
            f"passed to the host {_nonzero(counters['passed'])}",
            "",
            _table(("WORKER", *map(str.upper, _WORKER_COLUMNS)), _worker_rows(status["workers"])),
            "",
            _table(heads, rows),
            *_by_service(status["services"]),
        )
    )


def _standing(backend: dict[str, Any]) -> str:
    left, ramp = backend.get("drain_remaining"), backend.get("slow_start")
    if backend["state"] == "down" and backend["reason"]:
        return f"down: {backend['reason']}"
    if left:
        return f"{backend['state']}, {left:.0f} s left"
    return f"{backend['state']}, {ramp:.0%}" if ramp is not None else str(backend["state"])


def _by_service(services: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What services have dropped, or forwarded by another path than usual, and what befell their new flows."""
    groups = ("drops", "paths", "events")
    rows = [
        (service["name"], *(_nonzero(service[each]) for each in groups))
        for service in services
        if any(service[each] for each in groups)
    ]
    if rows:
        yield ""
        yield _table(("SERVICE", *map(str.upper, groups)), rows)


def _worker_rows(workers: Sequence[dict[str, Any]]) -> Iterator[Sequence[object]]:
    for number, worker in enumerate(workers):
        yield (number, *(worker[column] for column in _WORKER_COLUMNS))


_WORKER_COLUMNS = ("core", "packets", "transmitted", "transmitted_xdp", "read_early", "sleeps")
_BACKEND_COLUMNS = ("backend", "state", "weight", "active_flows", "new_flows", "packets", "reply_packets")


def _pairs(named: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def _nonzero(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def _conns(arguments: argparse.Namespace) -> None:
    filters = {name: getattr(arguments, name) for name in ("service", "backend", "client", "state")}
    path = _socket_of(arguments)

    def ask(request: Mapping[str, Any]) -> Any:
        return call(path, "conns", **request)

    if arguments.count:
        counts = count(ask, filters)
        print(json.dumps(counts, indent=2) if arguments.json else _describe_counts(counts))
        return
    flows, more = collect(ask, filters, arguments.limit)
    if arguments.json:
        print(json.dumps({"flows": flows, "more": more}, indent=2))
        return
    print(_table(map(str.upper, _FLOW_COLUMNS), map(_flow_row, flows)))
    if more:
        print(f"there are more than {arguments.limit}: --limit shows more, --count counts them")


def _flow_row(flow: Mapping[str, Any]) -> Sequence[object]:
    shown = {**flow, "source": flow["source"] or "-", "age": f"{flow['age']:.1f}", "idle": f"{flow['idle']:.1f}"}
    return [shown[column] for column in _FLOW_COLUMNS]


def _describe_counts(counts: Sequence[Mapping[str, Any]]) -> str:
    rows = [(row["service"], row["backend"], row["flows"], _nonzero(row["states"])) for row in counts]
    rows.append(("", "total", sum(row["flows"] for row in counts), ""))
    return _table(("SERVICE", "BACKEND", "FLOWS", "STATES"), rows)


_FLOW_COLUMNS = ("service", "protocol", "client", "vip", "backend", "source", "state", "age", "idle")


def _trace(arguments: argparse.Namespace) -> None:
    if arguments.offline and not arguments.config:
        arguments.refuse("--offline needs a configuration: -c FILE")
    try:
        packet = trace.parse_tuple(arguments.source, arguments.destination)
    except ValueError as error:
        arguments.refuse(str(error))
    if arguments.offline:
        explained = trace.from_configuration(load_config(arguments.config), packet).as_json()
    else:
        explained = call(
            _socket_of(arguments), "trace", source=arguments.source, destination=arguments.destination
        )
    print(json.dumps(explained, indent=2) if arguments.json else "\n".join(trace.described(explained)))


def _table(heads: Iterable[object], rows: Iterable[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
