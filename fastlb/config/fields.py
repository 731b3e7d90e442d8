"""The types of configuration values. Each knows its range and says what would be right, whatever is wrong.

A value passes from the inside of an ``Annotated`` outwards: its type and range first, then `_expects`, which
replaces pydantic's message by a sentence. Times are in seconds, sizes in bytes, ports in host order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from fastlb.errors import FastlbError
from fastlb.model.modes import MODES, SCHEDULERS
from fastlb.model.names import MAX_WORKERS
from fastlb.model.net import Address, Network, PortRange

MAX_BACKENDS = 65534  # of one service: a Maglev table holds 16-bit positions
MAX_INTERFACES = 16  # rings of a worker
MAGLEV_SIZES = (  # primes
    *(251, 509, 1021, 2039, 4093, 8191, 16381, 32749),
    *(65537, 131071, 262139, 524287, 1048573),
)
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
FINE_SECONDS = {"us": 0.000001, "ms": 0.001}
BYTES = {"KiB": 1 << 10, "MiB": 1 << 20}
LONGEST = 7 * 24 * 3600  # seconds
LONGEST_AFFINITY = 24 * 3600  # seconds; slots' ends are told apart over six days, affinity.pxd
MOST_BURST = 3600  # seconds' worth, as in admission.pxd
MAX_SOURCES = 255  # source addresses of one IP version, as in sourceport.pxd


def _refusal(message: str) -> PydanticCustomError:
    return PydanticCustomError("fastlb", "{message}", {"message": message})


def show(value: object) -> str:
    """A value for a message; never the contents of a container, which may be vast."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = json.dumps(value if len(value) <= 60 else f"{value[:60]}…", ensure_ascii=False)
        return text.encode(errors="backslashreplace").decode()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _expects(right: str) -> WrapValidator:
    """Replaces pydantic's message about a value by one that says what would be right."""

    def validate(value: object, inner: ValidatorFunctionWrapHandler) -> object:
        try:
            return inner(value)
        except ValidationError as error:
            if any(detail["type"] == "fastlb" for detail in error.errors(include_url=False)):
                raise
            raise _refusal(f"found {show(value)}; it must be {right}") from None

    return WrapValidator(validate)


def _one_of(*choices: str) -> BeforeValidator:
    """Accept one of these words."""

    def validate(value: object) -> object:
        if value in choices:
            return value
        raise _refusal(f"found {show(value)}; use one of: {', '.join(choices)}")

    return BeforeValidator(validate)


def _quantity(units: Mapping[str, float]) -> BeforeValidator:
    """Reads "5m" or a plain number; the number is in the unit whose factor is 1."""
    pattern = re.compile(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(units)})")

    def parse(value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if not isinstance(value, str) or not (parts := pattern.fullmatch(value)):
            raise ValueError("not a quantity")
        return round(float(parts[1]) * units[parts[2]], 9)  # "50us" is 50e-6, not the float beside it

    return BeforeValidator(parse)


def _quantity_schema(units: Mapping[str, float], number: dict[str, object]) -> WithJsonSchema:
    text = {"type": "string", "pattern": rf"^[0-9]+(\.[0-9]+)?({'|'.join(units)})$"}
    return WithJsonSchema({"anyOf": [number, text]})


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("not a power of two")
    return value


def _maglev_size(value: int) -> int:
    if value not in MAGLEV_SIZES:
        raise ValueError("not one of the sizes")
    return value


def _hundredths(value: float) -> float:
    if abs(value * 100 - round(value * 100)) > 1e-6:
        raise ValueError("not in hundredths")
    return value


def parse_address(value: object) -> Address:
    """An address from text or from ipaddress' types; ValueError for anything else, numbers too."""
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    if not isinstance(value, str):
        raise ValueError("not an address")
    address: Address = ip_address(value)
    return address


def _special(address: Address) -> str | None:
    """The kind of an address that no service and no backend can have, or None."""
    if isinstance(address, IPv6Address):
        if address.scope_id:
            return "an address with a zone"
        if address.ipv4_mapped:
            return "an IPv4 address written as IPv6"
    kinds = {
        "the unspecified address": address.is_unspecified,
        "a multicast address": address.is_multicast,
        "a loopback address": address.is_loopback,
        "the broadcast address": address == IPv4Address("255.255.255.255"),
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


def parse_vip(value: object) -> Address | Network:
    """An address, or a prefix; one of all bits is an address. ValueError for anything else."""
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str) or "/" not in value:
        return parse_address(value)
    prefix = ip_network(value, strict=False)
    return prefix.network_address if prefix.prefixlen == prefix.max_prefixlen else prefix


def _vip(value: object) -> Address | Network:
    vip = parse_vip(value)
    address = vip if isinstance(vip, IPv4Address | IPv6Address) else vip.network_address
    kind = _special(address) or ("a link-local address" if address.is_link_local else None)
    if kind:
        raise _refusal(f"{address} is {kind}; a VIP must be a unicast address that clients can reach")
    if isinstance(value, str) and "/" in value and ip_network(value, strict=False).network_address != ip_address(
        value.split("/")[0]
    ):
        raise _refusal(f"found {show(value)}; it has bits behind the prefix; write {show(str(vip))}, or one address")
    return vip


def _backend_address(value: object) -> Address:
    address = parse_address(value)
    if kind := _special(address):
        raise _refusal(f"{address} is {kind}; it must be the unicast address of a backend")
    return address


def _source_address(value: object) -> Address:
    address = parse_address(value)
    kind = _special(address) or ("a link-local address" if address.is_link_local else None)
    if kind:
        raise _refusal(f"{address} is {kind}; it must be a unicast address to which backends can answer")
    return address


def _source(value: object) -> Network:
    if not isinstance(value, str):
        raise ValueError("not a prefix")
    prefix = ip_network(value)
    if kind := _special(prefix.network_address):
        raise _refusal(f"{value} begins with {kind}; it must be a prefix of unicast addresses")
    return prefix


def _client_network(value: object) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str):
        raise ValueError("not a prefix")
    prefix = ip_network(value, strict=False)
    if prefix.network_address != ip_address(value.split("/")[0]):
        raise _refusal(f"found {show(value)}; it has bits behind the prefix; write {show(str(prefix))}, or one address")
    return prefix


def parse_ports(value: object) -> int | PortRange | Literal["any"]:
    """A port, a range of ports, or any; a range of one port is a port. ValueError for anything else."""
    if value == "any":
        return "any"
    if isinstance(value, str | PortRange):
        ports = _port_range(value)
        return ports if ports.first < ports.last else ports.first
    if type(value) is not int or not 1 <= value <= 65535:
        raise ValueError("not a port")
    return value


def _port_range(value: object) -> PortRange:
    if isinstance(value, PortRange):
        return value
    parts = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value) if isinstance(value, str) else None
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]) <= 65535:
        raise ValueError("not a range")
    return PortRange(int(parts[1]), int(parts[2]))


def _file_path(value: str) -> str:
    if not value.startswith("/") or "\0" in value:
        raise ValueError("not a path")
    return value


def _socket_path(value: str) -> str:
    if not value.startswith("/") or "\0" in value or len(os.fsencode(value)) > 107:  # sun_path, unix(7)
        raise ValueError("not a socket path")
    return value


Listed = TypeVar("Listed", str, Network)


def all_different(names: tuple[Listed, ...]) -> tuple[Listed, ...]:
    """For a list in which nothing may come twice."""
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise _refusal(f'"{twice}" is listed twice; keep one')
    return names


def few_sources(addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """No address twice, and no more than the numbers of source ports can tell apart."""
    twice = next((address for number, address in enumerate(addresses) if address in addresses[:number]), None)
    if twice is not None:
        raise _refusal(f'"{twice}" is listed twice; keep one')
    for version in (4, 6):
        count = sum(address.version == version for address in addresses)
        if count > MAX_SOURCES:
            raise _refusal(f"{count} IPv{version} addresses; at most {MAX_SOURCES} can be used")
    return addresses


def few_enough(names: tuple[str, ...]) -> tuple[str, ...]:
    """At most as many interfaces as a worker has rings."""
    if len(names) > MAX_INTERFACES:
        raise _refusal(f"{len(names)} interfaces; a worker reads at most {MAX_INTERFACES}")
    return names


def drain_time(value: object) -> float:
    """Seconds, from what a command says ("5m", 300); raises FastlbError with what would be right."""
    try:
        return TypeAdapter[float](DrainTime).validate_python(value)
    except ValidationError as error:
        raise FastlbError(error.errors(include_url=False)[0]["msg"]) from None


_ADDRESS_SCHEMA: dict[str, Any] = {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}
_RANGE_SCHEMA = {"type": "string", "pattern": "^[0-9]{1,5}-[0-9]{1,5}$"}

Name = Annotated[
    StrictStr,
    Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$"),
    _expects('1 to 64 letters, digits, "_", "." or "-" (in quotes if YAML would take it for a number)'),
]
InterfaceName = Annotated[
    StrictStr,
    Field(pattern=r"^[^\s/:\x00]{1,15}$"),
    _expects('the name of a network interface: 1 to 15 characters without spaces, "/" and ":"'),
]
Vip = Annotated[
    Address | Network,
    PlainValidator(_vip),
    _expects('an IPv4 or IPv6 address, as text, or a prefix such as "203.0.113.0/28"'),
    WithJsonSchema({"type": "string", "anyOf": [*_ADDRESS_SCHEMA["anyOf"], {"pattern": "^[0-9a-fA-F:.]+/[0-9]+$"}]}),
]
BackendAddress = Annotated[
    Address,
    PlainValidator(_backend_address),
    _expects("an IPv4 or IPv6 address, as text"),
    WithJsonSchema(_ADDRESS_SCHEMA),
]
SourceAddress = Annotated[
    Address,
    PlainValidator(_source_address),
    _expects("an IPv4 or IPv6 address, as text"),
    WithJsonSchema(_ADDRESS_SCHEMA),
]
SourcePorts = Annotated[
    PortRange,
    PlainValidator(_port_range),
    PlainSerializer(str),
    _expects('a range of ports such as "1024-32767", within 1-65535'),
    WithJsonSchema(_RANGE_SCHEMA),
]
Ports = Annotated[
    int | PortRange | Literal["any"],
    PlainValidator(parse_ports),
    PlainSerializer(lambda ports: str(ports) if isinstance(ports, PortRange) else ports),
    _expects('a whole number from 1 to 65535, a range such as "8000-8099", or "any"'),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, {"const": "any"}, _RANGE_SCHEMA]}
    ),
]
Port = Annotated[StrictInt, Field(ge=1, le=65535), _expects("a whole number from 1 to 65535")]
Weight = Annotated[StrictInt, Field(ge=0, le=65535), _expects("a whole number from 0 to 65535")]
Workers = Annotated[
    Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=MAX_WORKERS)],
    _expects(f'"auto" or a whole number from 1 to {MAX_WORKERS}'),
]
Seed = Annotated[
    StrictInt, Field(ge=0, le=2**64 - 1), _expects("a whole number from 0 to 18446744073709551615 (64 bits)")
]
FlowCapacity = Annotated[
    StrictInt, Field(ge=64, le=2**30), _expects("a whole number from 64 to 1073741824 (2^30)")
]
RingPoints = Annotated[StrictInt, Field(ge=1, le=1 << 16), _expects("a whole number from 1 to 65536")]
MaglevSize = Annotated[
    StrictInt,
    AfterValidator(_maglev_size),
    _expects(f"one of these primes: {', '.join(map(str, MAGLEV_SIZES))}"),
    WithJsonSchema({"enum": list(MAGLEV_SIZES)}),
]
Timeout = Annotated[
    float,
    _quantity(SECONDS),
    Field(ge=1, le=LONGEST),
    _expects('a time from 1s to 168h: "15s", "5m", "1h", or a number of seconds'),
    _quantity_schema(SECONDS, {"type": "number", "minimum": 1, "maximum": LONGEST}),
]
RingTimeout = Annotated[
    Literal["auto"]
    | Annotated[
        float,
        _quantity(SECONDS),
        Field(ge=0.001, le=1),
        _quantity_schema(SECONDS, {"type": "number", "minimum": 0.001, "maximum": 1}),
    ],
    _expects('"auto" or a time from 1ms to 1s: "1ms", or a number of seconds'),
]
Spin = Annotated[
    float,
    _quantity(FINE_SECONDS),
    Field(ge=0, le=0.01),
    _expects('a time from 0us to 10ms: "50us", or a number of seconds'),
    _quantity_schema(FINE_SECONDS, {"type": "number", "minimum": 0, "maximum": 0.01}),
]
OpenBlocks = Annotated[Literal["auto"] | StrictBool, _expects("auto, true or false")]
BlockSize = Annotated[
    int,
    _quantity(BYTES),
    Field(ge=128 << 10, le=4 << 20),
    AfterValidator(_power_of_two),
    _expects('a power of two from "128KiB" to "4MiB", or that number of bytes'),
    _quantity_schema(BYTES, {"type": "integer", "minimum": 128 << 10, "maximum": 4 << 20}),
]
Blocks = Annotated[StrictInt, Field(ge=2, le=4096), _expects("a whole number from 2 to 4096")]
SocketPath = Annotated[
    StrictStr,
    AfterValidator(_socket_path),
    _expects("an absolute path of at most 107 bytes"),
    WithJsonSchema({"type": "string", "pattern": "^/", "maxLength": 107}),
]
FilePath = Annotated[
    StrictStr,
    AfterValidator(_file_path),
    _expects("an absolute path"),
    WithJsonSchema({"type": "string", "pattern": "^/"}),
]
FlowFile = Annotated[
    StrictStr,
    AfterValidator(lambda value: value if value in ("auto", "none") else _file_path(value)),
    _expects("auto, none or an absolute path"),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "none"]}, {"type": "string", "pattern": "^/"}]}),
]
Flag = Annotated[StrictBool, _expects("true or false")]
Forward = Annotated[StrictStr, _one_of(*MODES), WithJsonSchema({"type": "string", "enum": list(MODES)})]
Source = Annotated[
    Network,
    PlainValidator(_source),
    _expects("the prefix that outer source addresses come from, such as 10.99.0.0/16; or one address"),
    WithJsonSchema({"type": "string"}),
]
GreKey = Annotated[StrictInt, Field(ge=0, le=2**32 - 1), _expects("a whole number from 0 to 4294967295 (32 bits)")]
DontFragment = Annotated[Literal["inner", "always", "never"], _one_of("inner", "always", "never")]
UdpChecksum = Annotated[Literal["auto"] | StrictBool, _expects("auto, true or false")]
MssClamp = Annotated[
    StrictBool | Annotated[StrictInt, Field(ge=536, le=65495)],
    _expects("true (what fits), false, or a whole number from 536 to 65495"),
]
Scheduler = Annotated[StrictStr, _one_of(*SCHEDULERS), WithJsonSchema({"type": "string", "enum": list(SCHEDULERS)})]
AffinityBy = Annotated[Literal["client-ip"], _one_of("client-ip")]
AffinityTimeout = Annotated[
    float,
    _quantity(SECONDS),
    Field(ge=1, le=LONGEST_AFFINITY),
    _expects('a time from 1s to 24h: "300s", "5m", or a number of seconds'),
    _quantity_schema(SECONDS, {"type": "number", "minimum": 1, "maximum": LONGEST_AFFINITY}),
]
ClientPrefix = Annotated[
    StrictInt, Field(ge=1, le=128), _expects("a whole number from 1 to 32 with an IPv4 VIP, from 1 to 128 with IPv6")
]
AffinityEntries = Annotated[
    StrictInt, Field(ge=64, le=2**24), _expects("a whole number from 64 to 16777216 (2^24)")
]
BoundedLoad = Annotated[
    float,
    Field(strict=True, ge=1.01, le=10),
    AfterValidator(_hundredths),
    _expects("a number from 1.01 to 10, in hundredths"),
]
MaxFlows = Annotated[StrictInt, Field(ge=1, le=2**30), _expects("a whole number from 1 to 1073741824 (2^30)")]
CheckType = Annotated[Literal["tcp", "http"], _one_of("tcp", "http")]
CheckTime = Annotated[
    float,
    _quantity(SECONDS),
    Field(ge=0.05, le=3600),
    _expects('a time from 50ms to 1h: "500ms", "2s", or a number of seconds'),
    _quantity_schema(SECONDS, {"type": "number", "minimum": 0.05, "maximum": 3600}),
]
Times = Annotated[StrictInt, Field(ge=1, le=1000), _expects("a whole number from 1 to 1000")]
HttpPath = Annotated[
    StrictStr, Field(pattern=r"^/[!-~]*$", max_length=2000), _expects('a path that begins with /, such as "/healthz"')
]
HostName = Annotated[
    StrictStr, Field(pattern=r"^[!-~]+$", max_length=255), _expects("a host name, as in an HTTP Host header")
]
Window = Annotated[
    float,
    _quantity(SECONDS),
    Field(ge=1, le=86400),
    _expects('a time from 1s to 24h: "30s", or a number of seconds'),
    _quantity_schema(SECONDS, {"type": "number", "minimum": 1, "maximum": 86400}),
]
Aggression = Annotated[
    float, Field(strict=True, ge=0.1, le=10), _expects("a number from 0.1 to 10")
]
Floor = Annotated[float, Field(strict=True, ge=0.01, le=1), _expects("a number from 0.01 to 1")]
ClientNetwork = Annotated[
    Network,
    PlainValidator(_client_network),
    _expects("a prefix of client addresses, such as 198.51.100.0/24; or one address"),
    WithJsonSchema({"type": "string"}),
]
ClientRate = Annotated[StrictInt, Field(ge=1, le=100_000), _expects("a whole number from 1 to 100000")]
ClientBurst = Annotated[StrictInt, Field(ge=1, le=1_000_000), _expects("a whole number from 1 to 1000000")]
NewFlowRate = Annotated[
    Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=100_000_000)],
    _expects('"auto" or a whole number from 1 to 100000000'),
]
OnLeave = Annotated[Literal["keep", "rehash", "reset"], _one_of("keep", "rehash", "reset")]
OnDown = Annotated[Literal["auto", "keep", "rehash", "reset"], _one_of("auto", "keep", "rehash", "reset")]
DrainTime = Annotated[
    float,
    _quantity(SECONDS),
    Field(ge=0, le=LONGEST),
    _expects('a time from 0s to 168h: "30s", "5m", "1h", or a number of seconds'),
]
Protocol = Annotated[Literal["tcp", "udp"], _one_of("tcp", "udp")]
NoBackend = Annotated[Literal["drop", "reset"], _one_of("drop", "reset")]
VipAddress = Annotated[Literal["none", "interface"], _one_of("none", "interface")]
Transmit = Annotated[Literal["auto", "xdp", "sendmmsg"], _one_of("auto", "xdp", "sendmmsg")]
