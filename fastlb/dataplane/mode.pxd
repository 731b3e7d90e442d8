"""What tells the forwarding modes apart: which legs pass, and what a tunnel writes in front of a packet.

    ipip  | IP 20, 40 | packet                        RFC 2003, RFC 2473, RFC 4213
    gre   | IP 20, 40 | GRE 4, key 4 | packet         RFC 2784, RFC 2890
    gue   | IP 20, 40 | UDP 8 | GUE 4 | packet        draft-ietf-intarea-gue, variant 0: what `fou … gue` receives

A new tunnel mode is a number in types.pxd, its header here, its name in snapshot.pxi and its row in model/modes.py.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.machine cimport store16, store32
from fastlb.dataplane.types cimport (
    FAMILY_4, FORWARD_FULLNAT, FORWARD_GRE, FORWARD_GUE, FORWARD_IPIP, PROTO_UDP, Service)
from fastlb.dataplane.wire cimport (
    ETHERTYPE_IP4, ETHERTYPE_IP6, IP4_LEN, IP6_LEN, UDP_CSUM, UDP_LEN, UDP_LENGTH, write_be16, write_be32)


cdef enum:
    PROTO_IP4 = 4            # IPv4 in IP
    PROTO_IP6 = 41           # IPv6 in IP
    PROTO_GRE = 47
    GRE_LEN = 4
    GRE_KEY_LEN = 4
    GRE_HAS_KEY = 0x2000     # the only flag that is known here
    GUE_LEN = 4
    MAX_OUTER = IP6_LEN + UDP_LEN + GUE_LEN  # bytes of the longest headers


cdef inline bint translates(const Service *service) noexcept nogil:
    """True in nat and fullnat, where both legs of a flow pass and are translated."""
    return service.forward <= FORWARD_FULLNAT


cdef inline bint is_tunnel(const Service *service) noexcept nogil:
    """True if packets are wrapped into other packets."""
    return service.forward >= FORWARD_IPIP


cdef inline uint32_t tunnel_header_length(int forward, bint with_key) noexcept nogil:
    """Return the bytes between the outer IP header and the inner packet; 0 where there is nothing."""
    if forward == FORWARD_GRE:
        return GRE_LEN + (GRE_KEY_LEN if with_key else 0)
    return UDP_LEN + GUE_LEN if forward == FORWARD_GUE else 0


cdef inline uint32_t outer_length(const Service *service, uint8_t family) noexcept nogil:
    """Return the bytes that a tunnel adds towards a backend of this family; 0 in the other modes."""
    cdef uint32_t ip = IP4_LEN if family == FAMILY_4 else IP6_LEN
    return ip + tunnel_header_length(service.forward, service.with_key) if is_tunnel(service) else 0


cdef inline uint8_t outer_protocol(const Service *service, uint8_t inner_version) noexcept nogil:
    """Return the protocol that the outer IP header names."""
    if service.forward == FORWARD_GRE:
        return PROTO_GRE
    if service.forward == FORWARD_GUE:
        return PROTO_UDP
    return PROTO_IP4 if inner_version == 4 else PROTO_IP6


cdef inline bint wants_sum(const Service *service, uint8_t family) noexcept nogil:
    """True if the tunnel has an outer UDP header that needs a checksum over everything."""
    if service.forward != FORWARD_GUE:
        return False
    return not (service.zero_checksum4 if family == FAMILY_4 else service.zero_checksum6)


cdef inline void write_gre(uint8_t *gre, const Service *service, uint8_t inner_version) noexcept nogil:
    write_be16(gre, GRE_HAS_KEY if service.with_key else 0)
    write_be16(gre + 2, ETHERTYPE_IP4 if inner_version == 4 else ETHERTYPE_IP6)
    if service.with_key:
        store32(gre + GRE_LEN, service.be_key)


cdef inline void write_gue(
        uint8_t *udp, const Service *service, uint8_t inner_version, uint64_t flow, uint32_t payload) noexcept nogil:
    """Write UDP and GUE headers, without a checksum. The source port is of the dynamic range (RFC 6335)."""
    write_be16(udp, 0xC000 | <uint16_t>(flow >> 20 & 0x3FFF))
    store16(udp + 2, service.be_tunnel_port)
    write_be16(udp + UDP_LENGTH, <uint16_t>payload)
    write_be16(udp + UDP_CSUM, 0)
    write_be32(udp + UDP_LEN, <uint32_t>(PROTO_IP4 if inner_version == 4 else PROTO_IP6) << 16)


cdef inline void write_tunnel_header(
        uint8_t *inner, const Service *service, uint8_t inner_version, uint64_t flow, uint32_t payload) noexcept nogil:
    """Write what stands right in front of the inner packet. `flow`: the same for all packets of a flow; `payload`: the
    bytes behind the outer IP header."""
    if service.forward == FORWARD_GRE:
        write_gre(inner - tunnel_header_length(FORWARD_GRE, service.with_key), service, inner_version)
    elif service.forward == FORWARD_GUE:
        write_gue(inner - tunnel_header_length(FORWARD_GUE, False), service, inner_version, flow, payload)
