"""From a file, or a dict of the same shape, to a `Config`, or to everything that is wrong with it.

A configuration passes three stages, each of which reports all that it finds:

    yaml.py                      fields.py and schema.py       rules.py
    text ──► data with lines ──► each field by itself     ──► fields against each other ──► Config
             syntax,             types, ranges, unknown       names and VIPs given twice,
             keys given twice    and missing keys             what a forwarding mode cannot do

Every fault becomes a `Problem` with its line, its key path and what would be right.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from fastlb.config import fields
from fastlb.config.addresses import all_different, few_sources
from fastlb.config.faults import dotted, sentence
from fastlb.config.files import clashing_files
from fastlb.config.rules import broken_rules
from fastlb.config.salvage import salvage_services, salvage_snat
from fastlb.config.schema import Model, Ring, Service, Timeouts
from fastlb.config.yaml import Document, Loc, Origin
from fastlb.errors import ConfigError, Problem
from fastlb.model.names import DEFAULT_CONTROL
from fastlb.model.net import PortRange


class Config(Model):
    """A whole configuration. Made by `load_config` or `Config.from_dict`, which alone check every rule."""

    interfaces: Annotated[
        tuple[fields.InterfaceName, ...], AfterValidator(all_different), AfterValidator(fields.few_enough)
    ] = Field(default=(), description="where client packets and NAT replies arrive; fastlb run needs at least one")
    vip_address: fields.VipAddress = Field(
        default="none",
        description="none when VIPs are routed to this host; interface when fastlb shall put them on the "
        "first interface, so that the host answers ARP and ND for them",
    )
    workers: fields.Workers = Field(
        default="auto",
        description="number of packet-path threads, each on a core of its own: auto, which is one fewer than there "
        "are cores and at least 1, or a number",
    )
    hash_seed: fields.Seed = Field(
        default=0, description="seed of the flow hash; the same on every balancer of a fleet"
    )
    snat: Annotated[tuple[fields.SourceAddress, ...], AfterValidator(few_sources)] = Field(
        default=(),
        description="source addresses for forward: fullnat; backends must reach them through this host. Each carries "
        "one flow per port of snat_ports and protocol",
    )
    snat_ports: fields.SourcePorts = Field(
        default=PortRange(1024, 32767),
        description="the source ports for forward: fullnat; on an address of this host they must not be among those "
        "that the kernel gives to the host's own sockets",
    )
    flow_log: fields.FilePath | None = Field(
        default=None,
        description="a file to which the beginning and the end of each flow of nat and fullnat are appended, a JSON "
        "object a line; none: no log",
    )
    flows: fields.FlowCapacity = Field(default=1_000_000, description="flows that the flow table can hold")
    flow_file: fields.FlowFile = Field(
        default="auto",
        description="the file that the flow table is in, so that it outlives a crash or a restart: a path on tmpfs or "
        "ramfs; auto, beside the control socket or in /dev/shm; or none",
    )
    new_flow_rate: fields.NewFlowRate = Field(
        default="auto",
        description="new flows a second that get an entry in the flow table; those beyond it go by their hash without "
        "one. auto: half of flows in the time that a flow of one packet is remembered",
    )
    affinity_entries: fields.AffinityEntries = Field(
        default=65536, description="clients that services with affinity can remember, all together"
    )
    maglev_size: fields.MaglevSize = Field(
        default=65537, description="slots in a Maglev table; the same on every balancer of a fleet"
    )
    ring_points: fields.RingPoints = Field(
        default=256,
        description="points of a service's heaviest backend on its ketama ring; the same on every balancer of a fleet",
    )
    transmit: fields.Transmit = Field(
        default="auto",
        description="how frames leave: xdp (AF_XDP from the ring's own memory), sendmmsg, "
        "or auto, which is xdp where it can be had",
    )
    tunnel_offload: fields.Flag = Field(
        default=True,
        description="leave it to the kernel or the device to cut GSO packets in tunnels, where they can",
    )
    control: fields.SocketPath = Field(
        default=DEFAULT_CONTROL,
        description="the Unix socket on which a running fastlb takes commands",
    )
    icmp_echo: fields.Flag = Field(
        default=True, description="answer echo requests (ping) to a VIP while one of its services has a backend"
    )
    timeouts: Timeouts = Field(default=Timeouts(), description="how long an idle flow is remembered")
    ring: Ring = Field(default=Ring(), description="the receive rings")
    services: tuple[Service, ...] = Field(default=(), description="what is balanced")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Return the configuration in a dict of the YAML's shape; raises ConfigError with every Problem found."""
        return _validate(data, Origin())


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a YAML file; raises ConfigError with every Problem found."""
    document = Document.read(os.fspath(path))
    return _validate(document.data, document, os.fspath(path))


def control_path(path: str | os.PathLike[str]) -> str:
    """Return the control socket that a file names, whatever else is wrong with it; raises ConfigError without a file.

    A running fastlb can thus be asked while its file is being edited.
    """
    data = Document.read(os.fspath(path)).data
    named = data.get("control") if isinstance(data, Mapping) else None
    return named if isinstance(named, str) else str(Config.model_fields["control"].default)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the configuration, for editors and other tools.

    It states types, ranges and keys. The rules between fields are checked only by fastlb.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _validate(data: object, origin: Origin, written_in: str | None = None) -> Config:
    """Return the Config, or raise ConfigError with everything that is wrong, in the order of the text."""
    faults = list(origin.faults.items())
    config = None
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        details = (detail for detail in error.errors(include_url=False) if detail["loc"] not in origin.faults)
        faults += [(detail["loc"], sentence(detail, Config)) for detail in details]
        faults += _rules_of_the_rest(data, {loc for loc, _ in faults})
    else:
        faults += broken_rules(config.services, config.snat, config.vip_address, config.maglev_size)
        faults += clashing_files(config.control, config.flow_file, config.flow_log, written_in)
    if faults or config is None:
        raise ConfigError(_problems(faults, origin))
    return config


def _rules_of_the_rest(data: object, faulty: set[Loc]) -> list[tuple[Loc, str]]:
    """Return the rules that are broken by what is valid in data with faults."""
    vip_address = data.get("vip_address") if isinstance(data, Mapping) else None
    # The rule about maglev_size waits until the rest is right.
    return list(broken_rules(salvage_services(data, faulty), salvage_snat(data, faulty), vip_address, None))


def _problems(faults: list[tuple[Loc, str]], origin: Origin) -> list[Problem]:
    """Return the faults with their places, in the order of the text."""
    placed = [(origin.line(loc), loc, message) for loc, message in faults]
    placed.sort(key=lambda fault: fault[0])
    return [Problem(origin.where(line), dotted(loc), message) for line, loc, message in placed]
