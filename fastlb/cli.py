"""The `fastlb` command. Exit codes: 0 fine, 1 runtime failure, 2 usage or invalid configuration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from fastlb import __version__, log
from fastlb.config import Config, json_schema, load_config
from fastlb.control import call
from fastlb.errors import FastlbError

DEFAULT_SOCKET = str(Config.model_fields["control"].default)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except FastlbError as error:
        for line in str(error).splitlines():
            print(f"fastlb: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as in `fastlb schema | head`
        sys.stderr.close()
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastlb", description="A layer-4 load balancer on packet rings.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fastlb {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="balance, until SIGTERM; SIGHUP reads the configuration again")
    run.add_argument("-c", "--config", required=True, metavar="FILE")
    run.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    run.set_defaults(run=_run)

    check = commands.add_parser("check", help="say everything that is wrong with a configuration")
    check.add_argument("-c", "--config", required=True, metavar="FILE")
    check.add_argument("--json", action="store_true", help="print the configuration with its defaults")
    check.set_defaults(run=_check)

    status = commands.add_parser("status", help="counters, services and backends of a running fastlb")
    _add_socket(status)
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=_status)

    reload = commands.add_parser("reload", help="make a running fastlb read its configuration again")
    _add_socket(reload)
    reload.set_defaults(run=_reload)

    schema = commands.add_parser("schema", help="print the JSON Schema of the configuration")
    schema.set_defaults(run=_schema)

    guard = commands.add_parser("guard", help="show or remove the ingress guard that a crash leaves behind")
    guard.add_argument("action", choices=("show", "remove"))
    guard.add_argument("--json", action="store_true")
    guard.set_defaults(run=_guard)
    return parser


def _add_socket(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help=f"its control socket (default: {DEFAULT_SOCKET})")
    where.add_argument("-c", "--config", metavar="FILE", help="its configuration, which names the socket")


def _socket_of(arguments: argparse.Namespace) -> str:
    if arguments.config:
        return load_config(arguments.config).control
    return arguments.socket or DEFAULT_SOCKET


def _run(arguments: argparse.Namespace) -> None:
    from fastlb.engine import Engine  # only this command needs netlink and eBPF

    log.configure(arguments.log_level)
    Engine(arguments.config).run()


def _check(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config)
    if arguments.json:
        print(config.model_dump_json(indent=2))
        return
    backends = sum(len(service.backends) for service in config.services)
    print(f"{arguments.config}: valid, {len(config.services)} services, {backends} backends")


def _schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(json_schema(), indent=2))


def _reload(arguments: argparse.Namespace) -> None:
    print(f"reloaded: {call(_socket_of(arguments), 'reload')['services']} services")


def _guard(arguments: argparse.Namespace) -> None:
    from fastlb import guard

    found = guard.show()
    if arguments.action == "remove":
        removed = [info.interface for info in found if guard.detach(info.interface)]
        print(f"removed from: {', '.join(removed)}" if removed else "no guard was in place")
    elif arguments.json:
        print(json.dumps([asdict(info) for info in found], indent=2))
    else:
        print(_table(("INTERFACE", "PROGRAM"), ((info.interface, info.program_id) for info in found)))


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
            backend["weight"],
            backend["active_flows"],
            backend["new_flows"],
            backend["packets"],
            backend["reply_packets"],
        )
        for service in status["services"]
        for backend in service["backends"] or [dict.fromkeys(_BACKEND_COLUMNS, "-")]
    ]
    heads = ("SERVICE", "VIP", "FORWARD", "BACKEND", "WEIGHT", "FLOWS", "NEW", "PACKETS", "REPLIES")
    return "\n".join(
        (
            f"fastlb {status['version']}, pid {status['pid']}, up {status['uptime']:.0f} s, "
            f"on {', '.join(status['interfaces'])}, transmit {_pairs(status['transmit'])}",
            f"packets {counters['packets']}, forwarded {counters['forwarded']}, "
            f"transmitted {counters['transmitted']}, lost by the ring {counters['ring_drops']}",
            f"flows {flows['active']} of {flows['entries']} entries, evicted {counters['flows_evicted']}, "
            f"untracked {counters['flows_untracked']}",
            f"drops {_nonzero(counters['drops'])}",
            "",
            _table(heads, rows),
        )
    )


_BACKEND_COLUMNS = ("backend", "weight", "active_flows", "new_flows", "packets", "reply_packets")


def _pairs(named: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def _nonzero(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"


def _table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
