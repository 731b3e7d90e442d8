"""Forwarding in place: the link header, and network address translation."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastlb.dataplane.checksum cimport (
    difference, fold, sum_addr, update_checksum, update_partial_checksum, update_udp_checksum)
from fastlb.dataplane.machine cimport bswap16, likely, load16, mul_fold, must, store16, store32, unlikely
from fastlb.dataplane.types cimport FAMILY_4, FRAGMENT_NONE, PROTO_TCP, VNET_NEEDS_CSUM, Addr, Hop, Packet
from fastlb.dataplane.wire cimport (
    ETHERTYPE_IP4, ETHERTYPE_IP6, ETH_DST, ETH_LEN, ETH_SRC, ETH_TYPE, IP4_CSUM, IP4_DF, IP4_DST, IP4_FRAG, IP4_ID,
    IP4_SRC, IP4_TTL, IP6_DST, IP6_FRAG_LEN, IP6_FRAG_NUMBER, IP6_HOPS, IP6_LEN, IP6_SRC, OPTION_END, OPTION_NOP,
    TCP_CSUM, TCP_LEN, UDP_CSUM, VLAN_LEN, be_addr4, read_be16, read_be32, write_addr6, write_be16, write_be32)


cdef enum:
    OPTION_MSS = 2
    MSS_LEN = 4


cdef inline bint fits(const Packet *p, uint32_t mtu) noexcept nogil:
    """True if the packet fits the MTU. A GSO packet is cut into segments on its way out, so its segments must fit, not
    its length."""
    if unlikely(p.vnet.gso_type != 0):
        return <uint32_t>(p.l4 - p.l3) + p.l4_header + p.vnet.gso_size <= mtu
    return p.l3_length <= mtu


cdef inline void move_frame(Packet *p, int by) noexcept nogil:
    """Let the frame begin `by` bytes later (earlier when negative); offsets still point at the same headers."""
    must(<int>p.l3 - by >= ETH_LEN)
    p.frame += by
    p.length -= by
    p.l3 -= by
    p.l4 -= by
    if p.vnet.flags & VNET_NEEDS_CSUM:
        p.vnet.csum_start -= by
    if p.vnet.gso_type != 0:
        p.vnet.hdr_len -= by


cdef inline void strip_tags(Packet *p) noexcept nogil:
    if p.l3 != ETH_LEN:
        move_frame(p, p.l3 - ETH_LEN)
        write_be16(p.frame + ETH_TYPE, ETHERTYPE_IP4 if p.family == FAMILY_4 else ETHERTYPE_IP6)
    p.vlan_tpid = 0


cdef inline void restore_tag(Packet *p) noexcept nogil:
    """Put back the tag that the kernel took out. The old EtherType stays where it is, as the one after the tag."""
    move_frame(p, -VLAN_LEN)
    write_be16(p.frame + ETH_TYPE, p.vlan_tpid)
    write_be16(p.frame + ETH_TYPE + 2, p.vlan_tci)
    p.vlan_tpid = 0


cdef inline void set_link_header(Packet *p, const Hop *hop) noexcept nogil:
    """Address the frame to its next hop. VLAN tags belong to the link: they stay on it and do not cross to another."""
    must(hop.fault == 0)
    if unlikely(hop.ifindex != p.ifindex):
        strip_tags(p)
    elif unlikely(p.vlan_tpid != 0):
        restore_tag(p)
    memcpy(p.frame + ETH_DST, hop.dst_mac, 6)
    memcpy(p.frame + ETH_SRC, hop.src_mac, 6)
    p.out_ifindex = hop.ifindex


cdef inline uint8_t *ttl_of(Packet *p) noexcept nogil:
    return p.frame + p.l3 + (IP4_TTL if p.family == FAMILY_4 else IP6_HOPS)


cdef inline bint is_last_hop(Packet *p) noexcept nogil:
    """True if no router may pass the packet on (RFC 1812 section 5.3.1, RFC 8200 section 3)."""
    return ttl_of(p)[0] <= 1


cdef inline void decrement_ttl(Packet *p) noexcept nogil:
    """Decrement the TTL or hop limit, as a router does."""
    cdef uint8_t *ip = p.frame + p.l3
    cdef uint32_t checksum
    must(not is_last_hop(p))
    ttl_of(p)[0] -= 1
    if p.family == FAMILY_4:
        # The word that holds the TTL loses 1 in its first byte: in memory order 1 less, its complement 1 more
        checksum = <uint32_t>load16(ip + IP4_CSUM) + 1
        store16(ip + IP4_CSUM, <uint16_t>(checksum + (checksum >= 0xFFFF)))


cdef inline bint has_number(const Packet *p) noexcept nogil:
    """True if the packet is a fragment, or may be fragmented on its way. Else its identification means nothing (RFC
    6864 section 4).

    ICMP errors are short enough to stay whole.
    """
    if likely(p.family == FAMILY_4):
        return load16(p.frame + p.l3 + IP4_FRAG) != IP4_DF and not p.quoted
    return p.fragment != FRAGMENT_NONE


cdef inline void renumber(Packet *p) noexcept nogil:
    """Change the identification, before the addresses are replaced.

    Senders choose it for a pair of addresses. Translation makes one pair of several, where the same number would let
    fragments of different datagrams be put together. So each pair has a shift of its own: the same for all fragments of
    a datagram, with every worker and every balancer, and numbers that count up still do (segments.pxd counts on).
    """
    cdef uint64_t mixed = mul_fold(
        p.src.lo ^ p.dst.hi ^ <uint64_t>0x9E3779B97F4A7C15ULL, p.dst.lo ^ p.src.hi ^ <uint64_t>0xD6E8FEB86659FD93ULL)
    cdef uint32_t shift = <uint32_t>(mixed ^ mixed >> 32)
    cdef uint8_t *number = p.frame + p.l3
    cdef uint16_t before
    if p.family == FAMILY_4:
        number += IP4_ID
        before = load16(number)
        write_be16(number, <uint16_t>(read_be16(number) + shift))
        update_checksum(p.frame + p.l3 + IP4_CSUM, difference(before, load16(number)))
    else:
        must(IP6_LEN + IP6_FRAG_LEN + p.payload <= p.l3_length)
        number += p.l3_length - p.payload - IP6_FRAG_NUMBER
        write_be32(number, read_be32(number) + shift)


cdef inline void fix_transport_checksum(Packet *p, uint64_t addresses, uint64_t ports) noexcept nogil:
    """Correct the TCP or UDP checksum. `addresses` and `ports`: what the rewritten words add to a sum over the
    pseudo-header and the segment."""
    cdef uint32_t at = p.l4 + (TCP_CSUM if p.protocol == PROTO_TCP else UDP_CSUM)
    cdef uint8_t *field = p.frame + at
    must(at + 2 <= p.length)
    if p.vnet.flags & VNET_NEEDS_CSUM and <uint32_t>p.vnet.csum_start + p.vnet.csum_offset == at:
        update_partial_checksum(field, addresses)     # the device adds the ports itself
    elif p.protocol == PROTO_TCP:
        update_checksum(field, addresses + ports)
    else:
        update_udp_checksum(field, addresses + ports)


cdef inline void translate(
        Packet *p, Addr old, Addr new, uint32_t ip4_field, uint32_t ip6_field, uint32_t port_field, uint16_t be_port,
        ) noexcept nogil:
    """Replace one address and one port, and correct every checksum that covers them."""
    cdef uint8_t *ip = p.frame + p.l3
    cdef uint8_t *port = p.frame + p.l4 + port_field
    cdef uint64_t addresses = difference(sum_addr(old), sum_addr(new))
    cdef uint64_t ports = difference(load16(port), be_port)
    if likely(p.family == FAMILY_4):
        store32(ip + ip4_field, be_addr4(new))
        update_checksum(ip + IP4_CSUM, addresses)
    else:
        write_addr6(ip + ip6_field, new)
    store16(port, be_port)
    fix_transport_checksum(p, addresses, ports)


cdef inline void translate_destination(Packet *p, Addr new, uint16_t be_port) noexcept nogil:
    translate(p, p.dst, new, IP4_DST, IP6_DST, 2, be_port)


cdef inline void translate_source(Packet *p, Addr new, uint16_t be_port) noexcept nogil:
    translate(p, p.src, new, IP4_SRC, IP6_SRC, 0, be_port)


cdef inline void translate_both(
        Packet *p, Addr source, uint16_t be_sport, Addr target, uint16_t be_dport) noexcept nogil:
    """Replace both addresses and both ports at once, so that each checksum is corrected only once."""
    cdef uint8_t *ip = p.frame + p.l3
    cdef uint8_t *ports = p.frame + p.l4
    cdef uint64_t addresses = difference(sum_addr(p.src) + sum_addr(p.dst), sum_addr(source) + sum_addr(target))
    cdef uint64_t port_change = difference(
        <uint64_t>load16(ports) + load16(ports + 2), <uint64_t>be_sport + be_dport)
    if likely(p.family == FAMILY_4):
        store32(ip + IP4_SRC, be_addr4(source))
        store32(ip + IP4_DST, be_addr4(target))
        update_checksum(ip + IP4_CSUM, addresses)
    else:
        write_addr6(ip + IP6_SRC, source)
        write_addr6(ip + IP6_DST, target)
    store16(ports, be_sport)
    store16(ports + 2, be_dport)
    fix_transport_checksum(p, addresses, port_change)


cdef inline void clamp_mss(Packet *p, uint32_t most) noexcept nogil:
    """Lower the maximum segment size that a SYN or SYN-ACK announces (RFC 9293 section 3.7.1); never raise it.

    Bounded by the 40 bytes of options. Without the option the peer assumes 536 or 1220, which fits anyway.
    """
    cdef uint8_t *tcp = p.frame + p.l4
    cdef uint32_t at = TCP_LEN
    cdef uint32_t length
    while at + MSS_LEN <= p.l4_header and tcp[at] != OPTION_END:
        if tcp[at] == OPTION_NOP:
            at += 1
            continue
        length = tcp[at + 1]
        if tcp[at] == OPTION_MSS and length == MSS_LEN:
            if read_be16(tcp + at + 2) > most:
                replace_mss(p, tcp + at + 2, at & 1, <uint16_t>most)
            return
        at += max(length, <uint32_t>2)


cdef inline void replace_mss(Packet *p, uint8_t *field, bint odd, uint16_t value) noexcept nogil:
    """Replace the MSS and correct the checksum; one that the device completes does not cover the option yet. `odd`: the
    option lies across words."""
    cdef uint64_t change = difference(load16(field), bswap16(value))
    write_be16(field, value)
    if p.vnet.flags & VNET_NEEDS_CSUM and <uint32_t>p.vnet.csum_start + p.vnet.csum_offset == <uint32_t>p.l4 + TCP_CSUM:
        return
    if odd:
        change = bswap16(fold(change))
    update_checksum(p.frame + p.l4 + TCP_CSUM, change)
