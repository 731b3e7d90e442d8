"""The types of configuration values. Each knows its range and says what would be right, whatever is wrong.

A value passes from the inside of an ``Annotated`` outwards: its type and range first, then `expects`, which
replaces pydantic's message by a sentence. Times are in seconds, sizes in bytes, ports in host order.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from fastlb.config import addresses
from fastlb.config.quantities import (
    BYTES,
    FINE_SECONDS,
    MAX_AFFINITY_TIME,
    MAX_TIME,
    SECONDS,
    hundredths,
    power_of_two,
    quantity,
    quantity_schema,
)
from fastlb.config.refusal import expects, one_of, refusal
from fastlb.errors import FastlbError
from fastlb.model.checks import CHECKS
from fastlb.model.modes import MODES, SCHEDULERS
from fastlb.model.names import MAX_WORKERS
from fastlb.model.net import Address, Network, PortRange

MAX_BACKENDS = 65534  # of one service: a Maglev table holds 16-bit positions
MAX_INTERFACES = 16  # rings of a worker
MAX_BURST = 3600  # seconds' worth, as in admission.pxd
MAGLEV_SIZES = (  # primes
    *(251, 509, 1021, 2039, 4093, 8191, 16381, 32749),
    *(65537, 131071, 262139, 524287, 1048573),
)


def _maglev_size(value: int) -> int:
    if value not in MAGLEV_SIZES:
        raise ValueError("not one of the sizes")
    return value


def few_enough(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of interfaces if a worker has rings for all of them."""
    if len(names) > MAX_INTERFACES:
        raise refusal(f"{len(names)} interfaces; a worker reads at most {MAX_INTERFACES}")
    return names


def drain_time(value: object) -> float:
    """Return seconds from what a command says ("5m", 300); raises FastlbError, which says what would be right."""
    try:
        return _DRAIN_TIME.validate_python(value)
    except ValidationError as error:
        raise FastlbError(error.errors(include_url=False)[0]["msg"]) from None


_ADDRESS_SCHEMA: dict[str, Any] = {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}
_RANGE_SCHEMA = {"type": "string", "pattern": "^[0-9]{1,5}-[0-9]{1,5}$"}

Name = Annotated[
    StrictStr,
    Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$"),
    expects('1 to 64 letters, digits, "_", "." or "-" (in quotes if YAML would take it for a number)'),
]
InterfaceName = Annotated[
    StrictStr,
    Field(pattern=r"^[^\s/:\x00]{1,15}$"),
    expects('the name of a network interface: 1 to 15 characters without spaces, "/" and ":"'),
]
Vip = Annotated[
    Address | Network,
    PlainValidator(addresses.vip),
    expects('an IPv4 or IPv6 address, as text, or a prefix such as "203.0.113.0/28"'),
    WithJsonSchema({"type": "string", "anyOf": [*_ADDRESS_SCHEMA["anyOf"], {"pattern": "^[0-9a-fA-F:.]+/[0-9]+$"}]}),
]
BackendAddress = Annotated[
    Address,
    PlainValidator(addresses.backend_address),
    expects("an IPv4 or IPv6 address, as text"),
    WithJsonSchema(_ADDRESS_SCHEMA),
]
SourceAddress = Annotated[
    Address,
    PlainValidator(addresses.source_address),
    expects("an IPv4 or IPv6 address, as text"),
    WithJsonSchema(_ADDRESS_SCHEMA),
]
SourcePorts = Annotated[
    PortRange,
    PlainValidator(addresses.port_range),
    PlainSerializer(str),
    expects('a range of ports such as "1024-32767", within 1-65535'),
    WithJsonSchema(_RANGE_SCHEMA),
]
Ports = Annotated[
    int | PortRange | Literal["any"],
    PlainValidator(addresses.parse_ports),
    PlainSerializer(lambda ports: str(ports) if isinstance(ports, PortRange) else ports),
    expects('a whole number from 1 to 65535, a range such as "8000-8099", or "any"'),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, {"const": "any"}, _RANGE_SCHEMA]}
    ),
]
Port = Annotated[StrictInt, Field(ge=1, le=65535), expects("a whole number from 1 to 65535")]
Weight = Annotated[StrictInt, Field(ge=0, le=65535), expects("a whole number from 0 to 65535")]
Workers = Annotated[
    Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=MAX_WORKERS)],
    expects(f'"auto" or a whole number from 1 to {MAX_WORKERS}'),
]
Seed = Annotated[
    StrictInt, Field(ge=0, le=2**64 - 1), expects("a whole number from 0 to 18446744073709551615 (64 bits)")
]
FlowCapacity = Annotated[
    StrictInt, Field(ge=64, le=2**30), expects("a whole number from 64 to 1073741824 (2^30)")
]
RingPoints = Annotated[StrictInt, Field(ge=1, le=1 << 16), expects("a whole number from 1 to 65536")]
MaglevSize = Annotated[
    StrictInt,
    AfterValidator(_maglev_size),
    expects(f"one of these primes: {', '.join(map(str, MAGLEV_SIZES))}"),
    WithJsonSchema({"enum": list(MAGLEV_SIZES)}),
]
Timeout = Annotated[
    float,
    quantity(SECONDS),
    Field(ge=1, le=MAX_TIME),
    expects('a time from 1s to 168h: "15s", "5m", "1h", or a number of seconds'),
    quantity_schema(SECONDS, {"type": "number", "minimum": 1, "maximum": MAX_TIME}),
]
RingTimeout = Annotated[
    Literal["auto"]
    | Annotated[
        float,
        quantity(SECONDS),
        Field(ge=0.001, le=1),
        quantity_schema(SECONDS, {"type": "number", "minimum": 0.001, "maximum": 1}),
    ],
    expects('"auto" or a time from 1ms to 1s: "1ms", or a number of seconds'),
]
Spin = Annotated[
    float,
    quantity(FINE_SECONDS),
    Field(ge=0, le=0.01),
    expects('a time from 0us to 10ms: "50us", or a number of seconds'),
    quantity_schema(FINE_SECONDS, {"type": "number", "minimum": 0, "maximum": 0.01}),
]
OpenBlocks = Annotated[Literal["auto"] | StrictBool, expects("auto, true or false")]
BlockSize = Annotated[
    int,
    quantity(BYTES),
    Field(ge=128 << 10, le=4 << 20),
    AfterValidator(power_of_two),
    expects('a power of two from "128KiB" to "4MiB", or that number of bytes'),
    quantity_schema(BYTES, {"type": "integer", "minimum": 128 << 10, "maximum": 4 << 20}),
]
Blocks = Annotated[StrictInt, Field(ge=2, le=4096), expects("a whole number from 2 to 4096")]
SocketPath = Annotated[
    StrictStr,
    AfterValidator(addresses.socket_path),
    expects(f"an absolute path of at most {addresses.MAX_SOCKET_PATH} bytes"),
    WithJsonSchema({"type": "string", "pattern": "^/", "maxLength": addresses.MAX_SOCKET_PATH}),
]
FilePath = Annotated[
    StrictStr,
    AfterValidator(addresses.file_path),
    expects("an absolute path"),
    WithJsonSchema({"type": "string", "pattern": "^/"}),
]
FlowFile = Annotated[
    StrictStr,
    AfterValidator(lambda value: value if value in ("auto", "none") else addresses.file_path(value)),
    expects("auto, none or an absolute path"),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "none"]}, {"type": "string", "pattern": "^/"}]}),
]
Flag = Annotated[StrictBool, expects("true or false")]
Forward = Annotated[StrictStr, one_of(*MODES), WithJsonSchema({"type": "string", "enum": list(MODES)})]
Source = Annotated[
    Network,
    PlainValidator(addresses.source_prefix),
    expects("the prefix that outer source addresses come from, such as 10.99.0.0/16; or one address"),
    WithJsonSchema({"type": "string"}),
]
GreKey = Annotated[StrictInt, Field(ge=0, le=2**32 - 1), expects("a whole number from 0 to 4294967295 (32 bits)")]
DontFragment = Annotated[Literal["inner", "always", "never"], one_of("inner", "always", "never")]
UdpChecksum = Annotated[Literal["auto"] | StrictBool, expects("auto, true or false")]
MssClamp = Annotated[
    StrictBool | Annotated[StrictInt, Field(ge=536, le=65495)],
    expects("true (what fits), false, or a whole number from 536 to 65495"),
]
Scheduler = Annotated[StrictStr, one_of(*SCHEDULERS), WithJsonSchema({"type": "string", "enum": list(SCHEDULERS)})]
AffinityBy = Annotated[Literal["client-ip"], one_of("client-ip")]
AffinityTimeout = Annotated[
    float,
    quantity(SECONDS),
    Field(ge=1, le=MAX_AFFINITY_TIME),
    expects('a time from 1s to 24h: "300s", "5m", or a number of seconds'),
    quantity_schema(SECONDS, {"type": "number", "minimum": 1, "maximum": MAX_AFFINITY_TIME}),
]
ClientPrefix = Annotated[
    StrictInt, Field(ge=1, le=128), expects("a whole number from 1 to 32 with an IPv4 VIP, from 1 to 128 with IPv6")
]
AffinityEntries = Annotated[
    StrictInt, Field(ge=64, le=2**24), expects("a whole number from 64 to 16777216 (2^24)")
]
BoundedLoad = Annotated[
    float,
    Field(strict=True, ge=1.01, le=10),
    AfterValidator(hundredths),
    expects("a number from 1.01 to 10, in hundredths"),
]
MaxFlows = Annotated[StrictInt, Field(ge=1, le=2**30), expects("a whole number from 1 to 1073741824 (2^30)")]
CheckType = Annotated[StrictStr, one_of(*CHECKS), WithJsonSchema({"type": "string", "enum": list(CHECKS)})]
CheckTime = Annotated[
    float,
    quantity(SECONDS),
    Field(ge=0.05, le=3600),
    expects('a time from 50ms to 1h: "500ms", "2s", or a number of seconds'),
    quantity_schema(SECONDS, {"type": "number", "minimum": 0.05, "maximum": 3600}),
]
Times = Annotated[StrictInt, Field(ge=1, le=1000), expects("a whole number from 1 to 1000")]
HttpPath = Annotated[
    StrictStr, Field(pattern=r"^/[!-~]*$", max_length=2000), expects('a path that begins with /, such as "/healthz"')
]
HostName = Annotated[
    StrictStr, Field(pattern=r"^[!-~]+$", max_length=255), expects("a host name, as in an HTTP Host header")
]
Window = Annotated[
    float,
    quantity(SECONDS),
    Field(ge=1, le=86400),
    expects('a time from 1s to 24h: "30s", or a number of seconds'),
    quantity_schema(SECONDS, {"type": "number", "minimum": 1, "maximum": 86400}),
]
Aggression = Annotated[
    float, Field(strict=True, ge=0.1, le=10), expects("a number from 0.1 to 10")
]
Floor = Annotated[float, Field(strict=True, ge=0.01, le=1), expects("a number from 0.01 to 1")]
ClientNetwork = Annotated[
    Network,
    PlainValidator(addresses.client_network),
    expects("a prefix of client addresses, such as 198.51.100.0/24; or one address"),
    WithJsonSchema({"type": "string"}),
]
ClientRate = Annotated[StrictInt, Field(ge=1, le=100_000), expects("a whole number from 1 to 100000")]
ClientBurst = Annotated[StrictInt, Field(ge=1, le=1_000_000), expects("a whole number from 1 to 1000000")]
NewFlowRate = Annotated[
    Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=100_000_000)],
    expects('"auto" or a whole number from 1 to 100000000'),
]
OnLeave = Annotated[Literal["keep", "rehash", "reset"], one_of("keep", "rehash", "reset")]
OnDown = Annotated[Literal["auto", "keep", "rehash", "reset"], one_of("auto", "keep", "rehash", "reset")]
DrainTime = Annotated[
    float,
    quantity(SECONDS),
    Field(ge=0, le=MAX_TIME),
    expects('a time from 0s to 168h: "30s", "5m", "1h", or a number of seconds'),
]
Protocol = Annotated[Literal["tcp", "udp"], one_of("tcp", "udp")]
NoBackend = Annotated[Literal["drop", "reset"], one_of("drop", "reset")]
VipAddress = Annotated[Literal["none", "interface"], one_of("none", "interface")]
Transmit = Annotated[Literal["auto", "xdp", "sendmmsg"], one_of("auto", "xdp", "sendmmsg")]

_DRAIN_TIME: TypeAdapter[float] = TypeAdapter(DrainTime)
