"""From a frame to the five-tuple, or to the reason why there is none.

Invariant: no byte beyond `end` is read. The tuple is found by the rules of the receive filter
(kernel/ebpf/classification.py), so that what the filter took is never handed back. (An embedded frame may carry two
tags; the kernel takes the outer one out before the filter.) Anything else that is wrong with a packet is kept as its
`fault`: it becomes a drop when, and only when, the packet turns out to be ours.

Every parser has the same form: cursor, end, packet. It checks the bounds first, advances the cursor and returns the
type of what follows, or a negative value: minus the reason.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

from fastlb.dataplane.icmperror cimport PROTO_ICMP4, PROTO_ICMP6, parse_icmp
from fastlb.dataplane.machine cimport load16, must, unlikely
from fastlb.dataplane.reasons cimport (
    DROP_FRAGMENT_SHAPE, DROP_IP_LENGTH, DROP_ROUTING_HEADER, DROP_TCP_FLAGS, DROP_TCP_HEADER, DROP_UDP_LENGTH,
    PASS_EXTENSION_HEADERS, PASS_FRAGMENT, PASS_IP_HEADER, PASS_NOT_IP, PASS_NOT_TCP_UDP, PASS_TRUNCATED)
from fastlb.dataplane.types cimport (
    FAMILY_4, FAMILY_6, FRAGMENT_FIRST, FRAGMENT_LATER, FRAGMENT_NONE, LATER_BIT, PROTO_TCP, PROTO_UDP, Packet)
from fastlb.dataplane.wire cimport (
    ETHERTYPE_IP4, ETHERTYPE_IP6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, ETH_LEN, ETH_TYPE, EXT_AUTH, EXT_DEST_OPTS,
    EXT_FRAGMENT, EXT_HOP_BY_HOP, EXT_ROUTING, IP4_DST, IP4_FRAG, IP4_FRAG_MASK, IP4_ID, IP4_LEN, IP4_MF,
    IP4_OFFSET_MASK, IP4_PROTO, IP4_SRC, IP4_TOTAL, IP6_DST, IP6_FRAG_MASK, IP6_LEN, IP6_NEXT, IP6_OFFSET_MASK,
    IP6_PAYLOAD, IP6_SRC, MAX_EXT_HEADERS, TCP_FIN, TCP_FLAGS, TCP_LEN, TCP_OFFSET, TCP_RST, TCP_SYN, UDP_LEN,
    UDP_LENGTH, VLAN_LEN, read_addr4, read_addr6, read_be16, read_be32)


cdef enum:
    MAX_DATAGRAM = 65535     # bytes behind the IP header, at most


cdef inline int parse_ethernet(const uint8_t **cursor, const uint8_t *end, Packet *p) noexcept nogil:
    """Step over the Ethernet header and up to two tags (802.1Q, 802.1ad)."""
    cdef int ethertype
    cdef int _tag
    if unlikely(end - cursor[0] < ETH_LEN):
        return -PASS_NOT_IP
    ethertype = read_be16(cursor[0] + ETH_TYPE)
    cursor[0] += ETH_LEN
    for _tag in range(2):
        if ethertype != ETHERTYPE_VLAN and ethertype != ETHERTYPE_QINQ:
            break
        if end - cursor[0] < VLAN_LEN:
            return -PASS_NOT_IP
        ethertype = read_be16(cursor[0] + 2)
        cursor[0] += VLAN_LEN
    return ethertype


cdef inline void note_fragment(
        Packet *p, const uint8_t *content, uint32_t datagram, uint16_t offset, bint more) noexcept nogil:
    """Note what a fragment says of itself, and whether that can be (RFC 8200 section 4.5). `content`: where its payload
    begins."""
    cdef int32_t payload = <int32_t>p.l3_length - <int32_t>(content - p.frame - p.l3)
    p.fragment = FRAGMENT_LATER if offset else FRAGMENT_FIRST
    p.datagram = datagram
    p.offset = offset
    p.more = more
    p.payload = max(payload, 0)
    if payload <= 0 or (more and payload % 8) or offset + payload > MAX_DATAGRAM:
        p.fault = DROP_FRAGMENT_SHAPE


cdef inline int parse_ip4(const uint8_t **cursor, const uint8_t *end, Packet *p) noexcept nogil:
    """Parse an IPv4 header (RFC 791). Options are stepped over."""
    cdef const uint8_t *ip = cursor[0]
    cdef int32_t header
    cdef uint16_t field
    if unlikely(end - ip < IP4_LEN):
        return -PASS_TRUNCATED
    header = (ip[0] & 0x0F) * 4
    if unlikely(ip[0] >> 4 != 4 or header < IP4_LEN):
        return -PASS_IP_HEADER
    if unlikely(end - ip < header):
        return -PASS_TRUNCATED
    p.family = FAMILY_4
    p.l3_length = read_be16(ip + IP4_TOTAL)
    if unlikely(<int32_t>p.l3_length < header or end - ip < <int32_t>p.l3_length):
        p.fault = DROP_IP_LENGTH
    p.src = read_addr4(ip + IP4_SRC)
    p.dst = read_addr4(ip + IP4_DST)
    cursor[0] += header
    field = read_be16(ip + IP4_FRAG)
    if unlikely(field & IP4_FRAG_MASK):
        note_fragment(p, cursor[0], read_be16(ip + IP4_ID), (field & IP4_OFFSET_MASK) * 8, (field & IP4_MF) != 0)
    return ip[IP4_PROTO]


cdef inline bint is_extension(int header) noexcept nogil:
    return (header == EXT_HOP_BY_HOP or header == EXT_ROUTING or header == EXT_FRAGMENT or header == EXT_DEST_OPTS
            or header == EXT_AUTH)


cdef inline int parse_extensions(const uint8_t **cursor, const uint8_t *end, int following, Packet *p) noexcept nogil:
    """Step over at most MAX_EXT_HEADERS extension headers, each with its length in its second byte (RFC 8200 section
    4)."""
    cdef const uint8_t *ext
    cdef int _walked
    for _walked in range(MAX_EXT_HEADERS):
        if following == EXT_FRAGMENT:
            following = parse_fragment_header(cursor, end, p)
            if following < 0 or p.fragment != FRAGMENT_NONE:
                return following                         # other headers behind it: later ones would not show them
            continue
        if not is_extension(following):
            return following
        ext = cursor[0]
        if end - ext < 8:
            return -PASS_TRUNCATED
        if following == EXT_ROUTING and ext[3] != 0:
            p.fault = DROP_ROUTING_HEADER
        # AH counts words of four bytes less two (RFC 4302), the others words of eight less one.
        cursor[0] += (ext[1] + 2) * 4 if following == EXT_AUTH else (ext[1] + 1) * 8
        following = ext[0]
    return following


cdef inline int parse_fragment_header(const uint8_t **cursor, const uint8_t *end, Packet *p) noexcept nogil:
    """Parse a Fragment header (RFC 8200 section 4.5). A datagram that is its only fragment counts as any packet (RFC
    6946)."""
    cdef const uint8_t *ext = cursor[0]
    cdef uint16_t field
    if end - ext < 8:
        return -PASS_TRUNCATED
    field = read_be16(ext + 2)
    cursor[0] += 8
    if field & IP6_FRAG_MASK:
        note_fragment(p, cursor[0], read_be32(ext + 4), field & IP6_OFFSET_MASK, field & 1)
    return ext[0]


cdef inline int parse_ip6(const uint8_t **cursor, const uint8_t *end, Packet *p) noexcept nogil:
    """Parse an IPv6 header (RFC 8200)."""
    cdef const uint8_t *ip = cursor[0]
    cdef int following
    if unlikely(end - ip < IP6_LEN):
        return -PASS_TRUNCATED
    if unlikely(ip[0] >> 4 != 6):
        return -PASS_IP_HEADER
    p.family = FAMILY_6
    p.l3_length = IP6_LEN + read_be16(ip + IP6_PAYLOAD)
    if unlikely(end - ip < <int32_t>p.l3_length):
        p.fault = DROP_IP_LENGTH
    p.src = read_addr6(ip + IP6_SRC)
    p.dst = read_addr6(ip + IP6_DST)
    following = ip[IP6_NEXT]
    cursor[0] += IP6_LEN
    if following != PROTO_TCP and following != PROTO_UDP:
        following = parse_extensions(cursor, end, following, p)
    return following


cdef inline void check_tcp(const uint8_t *tcp, int32_t available, Packet *p) noexcept nogil:
    """Check a TCP header (RFC 9293): what a backend would have to throw away is dropped here, under a name."""
    if unlikely(available < TCP_LEN):
        p.fault = DROP_TCP_HEADER
        return
    p.l4_header = (tcp[TCP_OFFSET] >> 4) * 4
    p.tcp_flags = tcp[TCP_FLAGS]
    if unlikely(p.l4_header < TCP_LEN or p.l4_header > available):
        p.fault = DROP_TCP_HEADER
    elif unlikely(p.tcp_flags & TCP_SYN and p.tcp_flags & (TCP_FIN | TCP_RST)):
        p.fault = DROP_TCP_FLAGS


cdef inline void check_udp(const uint8_t *udp, int32_t available, Packet *p) noexcept nogil:
    """Check a UDP header (RFC 768): a length below the header's, or beyond the packet, is wrong."""
    cdef int32_t length
    if unlikely(available < UDP_LEN):
        p.fault = DROP_UDP_LENGTH
        return
    p.l4_header = UDP_LEN
    length = read_be16(udp + UDP_LENGTH)
    if unlikely(length < UDP_LEN or (length > available and p.fragment == FRAGMENT_NONE)):
        p.fault = DROP_UDP_LENGTH


cdef inline int end_later_fragment(const uint8_t *content, int protocol, Packet *p) noexcept nogil:
    """End with a fragment that has no ports: the tables are asked for its address alone. Nothing may overwrite TCP
    flags that have been seen (RFC 1858)."""
    p.protocol = <uint8_t>protocol
    p.asked = <uint8_t>(protocol | LATER_BIT)
    p.l4 = <uint16_t>(content - p.frame)
    p.be_sport = p.be_dport = 0
    if protocol == PROTO_TCP and p.offset < TCP_LEN:
        p.fault = DROP_FRAGMENT_SHAPE
    return 0


cdef inline bint is_icmp(int protocol, const uint8_t *cursor, const Packet *p) noexcept nogil:
    """True for ICMP that is looked at. ICMPv6 behind extension headers is the host's, as in the receive filter."""
    if p.family == FAMILY_4:
        return protocol == PROTO_ICMP4
    return protocol == PROTO_ICMP6 and cursor == p.frame + p.l3 + IP6_LEN


cdef inline int parse(Packet *p) noexcept nogil:
    """Fill in the packet's tuple. Returns 0, or minus the reason why it has none."""
    cdef const uint8_t *cursor = p.frame
    cdef const uint8_t *end = p.frame + p.length
    cdef int following = parse_ethernet(&cursor, end, p)
    cdef int32_t available
    p.fault = 0
    p.quoted = 0
    p.fragment = FRAGMENT_NONE
    p.segment_size = p.fragment_size = 0
    p.outer = 0
    p.summed = False
    p.tcp_flags = 0
    p.l4_header = 0
    p.l3 = <uint16_t>(cursor - p.frame)
    if following == ETHERTYPE_IP4:
        following = parse_ip4(&cursor, end, p)
    elif following == ETHERTYPE_IP6:
        following = parse_ip6(&cursor, end, p)
    elif following >= 0:
        return -PASS_NOT_IP
    if unlikely(following < 0):
        return following
    if unlikely(following != PROTO_TCP and following != PROTO_UDP):
        if p.family == FAMILY_6 and is_extension(following):
            return -PASS_EXTENSION_HEADERS
        if not is_icmp(following, cursor, p):
            return -PASS_NOT_TCP_UDP
        return parse_icmp(cursor, end, p) if p.fragment == FRAGMENT_NONE else -PASS_FRAGMENT
    if unlikely(p.fragment == FRAGMENT_LATER):
        return end_later_fragment(cursor, following, p)
    if unlikely(end - cursor < 4):
        return -PASS_TRUNCATED
    p.protocol = p.asked = <uint8_t>following
    p.l4 = <uint16_t>(cursor - p.frame)
    must(p.l3 < p.l4 and p.frame + p.l4 == cursor)
    p.be_sport = load16(cursor)
    p.be_dport = load16(cursor + 2)
    available = <int32_t>p.l3_length - (p.l4 - p.l3)
    if unlikely(p.fault):
        return 0
    if following == PROTO_TCP:
        check_tcp(cursor, available, p)
    else:
        check_udp(cursor, available, p)
    return 0
