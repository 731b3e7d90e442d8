"""ICMP errors about flows: whose they are, and what translation does to the packet that they quote.

An error is sent to the source of the packet that it is about, so that packet's flow is the way to where it belongs:

    about what a backend sent to a client     to the VIP      | quotes VIP -> client      |    on to the backend
    about what fastlb sent to a backend (nat) to the client   | quotes client -> backend  |    on to the client

`parse_error` therefore gives the packet the quoted addresses and ports the other way round: those of the answer to what
is quoted. From then on it is classified like that answer, as by the eBPF programs (kernel/ebpf/classification.py). Of
the quoted packet there may be no more than eight bytes behind its IP header (RFC 792), which is the ports and no
checksum. Its identification stays as translation has made it (rewrite.pxd, `renumber`): nobody finds a flow by it.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.checksum cimport difference, fold, sum_addr, sum_bytes, update_checksum
from fastlb.dataplane.machine cimport load16, must, store16, store32
from fastlb.dataplane.reasons cimport DROP_ICMP_HEADER, PASS_ICMP_QUOTE, PASS_NOT_TCP_UDP, PASS_TRUNCATED
from fastlb.dataplane.types cimport FAMILY_4, PROTO_TCP, PROTO_UDP, Addr, Packet
from fastlb.dataplane.wire cimport (
    EXT_FRAGMENT, IP4_CSUM, IP4_DST, IP4_FRAG, IP4_LEN, IP4_OFFSET_MASK, IP4_PROTO, IP4_SRC, IP4_TTL, IP6_DST,
    IP6_FRAG_LEN, IP6_HOPS, IP6_LEN, IP6_NEXT, IP6_OFFSET_MASK, IP6_SRC, TCP_CSUM, UDP_CSUM, be_addr4, read_addr4,
    read_addr6, read_be16, same_addr, write_addr6)


cdef enum:
    PROTO_ICMP4 = 1
    PROTO_ICMP6 = 58
    ICMP_LEN = 8
    ICMP_CSUM = 2
    ICMP4_ECHO = 8
    ICMP6_ECHO = 128
    ICMP4_ECHO_REPLY = 0
    ICMP6_ECHO_REPLY = 129
    ECHO_TTL = 64


cdef inline bint is_error4(uint8_t type) noexcept nogil:
    """True for destination unreachable, time exceeded and parameter problem (RFC 792)."""
    return type == 3 or type == 11 or type == 12


cdef inline bint is_error6(uint8_t type) noexcept nogil:
    """True for destination unreachable, packet too big, time exceeded and parameter problem (RFC 4443)."""
    return 1 <= type <= 4


cdef inline bint is_inside(const uint8_t *end, const Packet *p) noexcept nogil:
    """True if what ends at `end` belongs to the IP packet. A frame may be longer, which the eBPF programs do not look
    at."""
    return end <= p.frame + p.l3 + p.l3_length


cdef inline int parse_icmp(const uint8_t *icmp, const uint8_t *end, Packet *p) noexcept nogil:
    """Parse an ICMP error or an echo request, whose own IP header has been parsed. Returns 0, or minus the reason."""
    if end - icmp < 4:
        return -PASS_TRUNCATED
    p.l4 = <uint16_t>(icmp - p.frame)
    p.protocol = p.asked = 0
    p.be_sport = p.be_dport = 0
    if icmp[0] == (ICMP4_ECHO if p.family == FAMILY_4 else ICMP6_ECHO):
        if not is_inside(icmp + ICMP_LEN, p):
            p.fault = DROP_ICMP_HEADER
        return 0
    if not (is_error4(icmp[0]) if p.family == FAMILY_4 else is_error6(icmp[0])):
        return -PASS_NOT_TCP_UDP
    return parse_quoted4(icmp + ICMP_LEN, end, p) if p.family == FAMILY_4 else parse_quoted6(icmp + ICMP_LEN, end, p)


cdef inline int parse_quoted4(const uint8_t *ip, const uint8_t *end, Packet *p) noexcept nogil:
    cdef int32_t header
    if end - ip < IP4_LEN:
        return -PASS_ICMP_QUOTE
    header = (ip[0] & 0x0F) * 4
    if ip[0] >> 4 != 4 or header < IP4_LEN or read_be16(ip + IP4_FRAG) & IP4_OFFSET_MASK:
        return -PASS_ICMP_QUOTE
    return parse_quoted_ports(ip, header, ip[IP4_PROTO], end, read_addr4(ip + IP4_SRC), read_addr4(ip + IP4_DST), p)


cdef inline int parse_quoted6(const uint8_t *ip, const uint8_t *end, Packet *p) noexcept nogil:
    """Parse a quoted IPv6 header. Of extension headers only that of a first fragment is stepped over, because large
    datagrams are what links are too narrow for."""
    cdef int32_t header = IP6_LEN
    cdef uint8_t protocol
    if end - ip < IP6_LEN:
        return -PASS_ICMP_QUOTE
    protocol = ip[IP6_NEXT]
    if protocol == EXT_FRAGMENT:
        if end - ip < IP6_LEN + IP6_FRAG_LEN:
            return -PASS_ICMP_QUOTE
        if read_be16(ip + IP6_LEN + 2) & IP6_OFFSET_MASK:
            return -PASS_ICMP_QUOTE
        protocol = ip[IP6_LEN]
        header += IP6_FRAG_LEN
    return parse_quoted_ports(ip, header, protocol, end, read_addr6(ip + IP6_SRC), read_addr6(ip + IP6_DST), p)


cdef inline int parse_quoted_ports(
        const uint8_t *ip, int32_t header, uint8_t protocol, const uint8_t *end, Addr source, Addr target, Packet *p,
        ) noexcept nogil:
    """Set the tuple of the answer to the quoted packet. An error that was not sent to the sender of that packet is a
    fault."""
    if protocol != PROTO_TCP and protocol != PROTO_UDP:
        return -PASS_ICMP_QUOTE
    if end - ip < header + 4:
        return -PASS_ICMP_QUOTE
    if not same_addr(p.dst, source) or not is_inside(ip + header + 8, p):
        p.fault = DROP_ICMP_HEADER
    p.quoted = <uint16_t>(ip - p.frame)
    p.quoted_l4 = <uint16_t>(ip + header - p.frame)
    p.protocol = p.asked = protocol
    p.sender = p.src
    p.src, p.dst = target, source
    p.be_sport, p.be_dport = load16(ip + header + 2), load16(ip + header)
    return 0


# --- translation (RFC 5508) ------------------------------------------------------------------------------------------

cdef inline bint quotes_checksum(const Packet *p) noexcept nogil:
    """True if the quoted packet reaches as far as its transport checksum."""
    cdef uint32_t at = p.quoted_l4 + (TCP_CSUM if p.protocol == PROTO_TCP else UDP_CSUM)
    return at + 2 <= <uint32_t>p.l3 + p.l3_length


cdef inline void translate_quoted(
        Packet *p, Addr old, Addr new, uint32_t ip4_field, uint32_t ip6_field, uint32_t port_field, uint16_t be_port,
        ) noexcept nogil:
    """Replace one address and port of the quoted packet; its checksums follow, and so does the error's own."""
    cdef uint8_t *ip = p.frame + p.quoted
    cdef uint8_t *port = p.frame + p.quoted_l4 + port_field
    cdef uint8_t *field = p.frame + p.quoted_l4 + (TCP_CSUM if p.protocol == PROTO_TCP else UDP_CSUM)
    cdef uint64_t addresses = difference(sum_addr(old), sum_addr(new))
    cdef uint64_t ports = difference(load16(port), be_port)
    cdef uint64_t change = addresses + ports
    cdef uint16_t before
    if p.family == FAMILY_4:
        before = load16(ip + IP4_CSUM)
        store32(ip + ip4_field, be_addr4(new))
        update_checksum(ip + IP4_CSUM, addresses)
        change += difference(before, load16(ip + IP4_CSUM))
    else:
        write_addr6(ip + ip6_field, new)
    store16(port, be_port)
    if quotes_checksum(p) and (p.protocol == PROTO_TCP or load16(field) != 0):
        before = load16(field)
        update_checksum(field, addresses + ports)
        if p.protocol == PROTO_UDP and load16(field) == 0:
            store16(field, 0xFFFF)
        change += difference(before, load16(field))
    update_checksum(p.frame + p.l4 + ICMP_CSUM, change)


cdef inline void replace_address(
        Packet *p, Addr old, Addr new, uint32_t ip4_field, uint32_t ip6_field) noexcept nogil:
    """Replace an address of the error's own IP header, which ICMPv6 sums up as well (RFC 4443 section 2.3)."""
    cdef uint8_t *ip = p.frame + p.l3
    cdef uint64_t change = difference(sum_addr(old), sum_addr(new))
    if p.family == FAMILY_4:
        store32(ip + ip4_field, be_addr4(new))
        update_checksum(ip + IP4_CSUM, change)
    else:
        write_addr6(ip + ip6_field, new)
        update_checksum(p.frame + p.l4 + ICMP_CSUM, change)


cdef inline void translate_to_backend(Packet *p, Addr vip, Addr backend, uint16_t be_port) noexcept nogil:
    """Translate an error about a packet from the VIP to the client: it goes to the backend, which had sent that
    packet."""
    must(p.quoted > p.l4)
    translate_quoted(p, vip, backend, IP4_SRC, IP6_SRC, 0, be_port)
    replace_address(p, vip, backend, IP4_DST, IP6_DST)


cdef inline void translate_to_client(Packet *p, Addr backend, Addr vip, uint16_t be_port) noexcept nogil:
    """Translate an error about a packet from the client to the backend: it quotes the VIP then, and comes from the VIP
    if the backend itself complained."""
    must(p.quoted > p.l4)
    translate_quoted(p, backend, vip, IP4_DST, IP6_DST, 2, be_port)
    if same_addr(p.sender, backend):
        replace_address(p, backend, vip, IP4_SRC, IP6_SRC)


cdef inline void translate_client_in_error(Packet *p, Addr source, uint16_t be_port) noexcept nogil:
    """Replace the client in an error to a backend of fullnat, which knows its client by an address of ours; whoever
    complains is behind that, too."""
    translate_quoted(p, p.src, source, IP4_DST, IP6_DST, 2, be_port)
    replace_address(p, p.sender, source, IP4_SRC, IP6_SRC)


cdef inline void translate_source_in_error(Packet *p, Addr client, uint16_t be_port) noexcept nogil:
    """Replace the source address of fullnat in an error to a client: what the client sent came from its own address."""
    translate_quoted(p, p.dst, client, IP4_SRC, IP6_SRC, 0, be_port)
    replace_address(p, p.dst, client, IP4_DST, IP6_DST)


cdef inline void answer_echo(Packet *p) noexcept nogil:
    """Turn an echo request into its reply (RFC 792, RFC 4443 section 4.2)."""
    cdef uint8_t *ip = p.frame + p.l3
    cdef uint8_t *icmp = p.frame + p.l4
    cdef uint16_t before = load16(icmp)
    icmp[0] = ICMP4_ECHO_REPLY if p.family == FAMILY_4 else ICMP6_ECHO_REPLY
    update_checksum(icmp + ICMP_CSUM, difference(before, load16(icmp)))
    if load16(icmp + ICMP_CSUM) == 0:  # of a reply that is all zeros it would be wrong, and this is as right otherwise
        store16(icmp + ICMP_CSUM, 0xFFFF)
    if p.family == FAMILY_4:
        ip[IP4_TTL] = ECHO_TTL
        store32(ip + IP4_SRC, be_addr4(p.dst))
        store32(ip + IP4_DST, be_addr4(p.src))
        store16(ip + IP4_CSUM, 0)
        store16(ip + IP4_CSUM, <uint16_t>~fold(sum_bytes(ip, (ip[0] & 0x0F) * 4)))
    else:
        ip[IP6_HOPS] = ECHO_TTL
        write_addr6(ip + IP6_SRC, p.dst)
        write_addr6(ip + IP6_DST, p.src)
