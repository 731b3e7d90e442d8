"""Tunnels: the packet becomes the payload of another, from the balancer to the backend.

    | outer IP 20, 40 | the mode's own headers (mode.pxd) | packet

Inner and outer version are free of each other: the backend's address says which the outer is. The headers are written
in front of the packet, into the headroom that the ring reserves. The inner packet stays as it is; its TTL too, as in
dsr, because for the client the VIP is one hop away. Flows are told apart on the way, by routers and by the receive
queues of the backend, by the outer source address, the UDP source port (gue) and the flow label (IPv6, RFC 6438).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastlb.dataplane.checksum cimport fold, pseudo_sum, sum_bytes
from fastlb.dataplane.machine cimport bswap16, must, store16, store32
from fastlb.dataplane.mode cimport outer_length, outer_protocol, wants_sum, write_tunnel_header
from fastlb.dataplane.rewrite cimport move_frame
from fastlb.dataplane.route cimport mask_addr
from fastlb.dataplane.types cimport (
    DF_ALWAYS, DF_INNER, FAMILY_4, PROTO_UDP, VNET_NEEDS_CSUM, Addr, Backend, Hop, Packet, Service, Source)
from fastlb.dataplane.wire cimport (
    ETHERTYPE_IP4, ETHERTYPE_IP6, ETH_DST, ETH_LEN, ETH_SRC, IP4_CSUM, IP4_DF, IP4_DST, IP4_FRAG, IP4_ID, IP4_LEN,
    IP4_PROTO, IP4_SRC, IP4_TOTAL, IP4_TTL, IP6_DST, IP6_FRAG_LEN, IP6_HOPS, IP6_LEN, IP6_NEXT, IP6_PAYLOAD, IP6_SRC,
    UDP_CSUM, UDP_LENGTH, VLAN_LEN, be_addr4, read_be16, write_addr6, write_be16, write_be32)


cdef enum:
    OUTER_TTL = 64
    MAX_TAGS = 12            # the one that the kernel took out, and two in the frame
    MIN_FRAGMENT = 64        # bytes of a tunnel's packet in each of its fragments, at least


cdef inline Addr source_of_flow(const Source *source, uint8_t family, uint64_t flow) noexcept nogil:
    """Return the outer source address: the prefix, and behind it bits that are the same for all packets of a flow."""
    cdef Addr host
    if source.length == (32 if family == FAMILY_4 else 128):
        return source.addr
    host.hi = flow
    host.lo = flow * <uint64_t>0x9E3779B97F4A7C15ULL
    if family == FAMILY_4:
        host.hi = 0
        host.lo &= <uint64_t>0xFFFFFFFF00000000ULL
    cdef Addr network = mask_addr(host, family, source.length)
    host.hi ^= network.hi ^ source.addr.hi
    host.lo ^= network.lo ^ source.addr.lo
    return host


cdef inline void complete_checksum(Packet *p) noexcept nogil:
    """Compute the checksum that was left to the device. The field holds the pseudo-header's sum already (virtio 1.2,
    section 5.1.6.2)."""
    cdef uint32_t end = p.l3 + p.l3_length
    cdef uint32_t field = <uint32_t>p.vnet.csum_start + p.vnet.csum_offset
    cdef uint16_t checksum
    if not p.vnet.flags & VNET_NEEDS_CSUM or field + 2 > end:
        return
    checksum = <uint16_t>~fold(sum_bytes(p.frame + p.vnet.csum_start, end - p.vnet.csum_start))
    if checksum == 0 and p.protocol == PROTO_UDP:
        checksum = 0xFFFF                                # RFC 768: zero would mean that there is none
    store16(p.frame + field, checksum)
    p.vnet.flags &= ~<uint8_t>VNET_NEEDS_CSUM


# --- the outer headers -----------------------------------------------------------------------------------------------

cdef inline uint8_t traffic_class(const uint8_t *ip) noexcept nogil:
    """Return DSCP and ECN, which the outer header takes over whole (RFC 2983 section 3.1, RFC 6040 section 4.1)."""
    return ip[1] if ip[0] >> 4 == 4 else (read_be16(ip) >> 4) & 0xFF


cdef inline bint dont_fragment(const Service *service, const uint8_t *inner) noexcept nogil:
    if service.df != DF_INNER:
        return service.df == DF_ALWAYS
    return inner[0] >> 4 != 4 or inner[IP4_FRAG] & IP4_DF


cdef inline void write_outer_ip4(
        uint8_t *ip, const Service *service, uint8_t protocol, Addr source, Addr target, uint16_t number,
        const uint8_t *inner, uint32_t payload) noexcept nogil:
    """Write the outer IPv4 header. ``number`` tells the fragments of different packets apart (RFC 6864).

    The checksum is taken from the words in registers: reading back what has just been stored by other widths would wait
    for the stores, half of what wrapping a packet costs.
    """
    cdef uint32_t start = 0x45 | <uint32_t>traffic_class(inner) << 8 | <uint32_t>bswap16(
        <uint16_t>(IP4_LEN + payload)) << 16
    cdef uint32_t fragment = bswap16(number) | <uint32_t>(IP4_DF if dont_fragment(service, inner) else 0) << 16
    cdef uint32_t hop = OUTER_TTL | <uint32_t>protocol << 8
    cdef uint64_t total = <uint64_t>start + fragment + hop + be_addr4(source) + be_addr4(target)
    store32(ip, start)
    store32(ip + IP4_ID, fragment)
    store32(ip + IP4_TTL, hop | <uint32_t><uint16_t>~fold(total) << 16)
    store32(ip + IP4_SRC, be_addr4(source))
    store32(ip + IP4_DST, be_addr4(target))


cdef inline void write_outer_ip6(
        uint8_t *ip, uint8_t protocol, Addr source, Addr target, uint64_t flow, const uint8_t *inner, uint32_t payload,
        ) noexcept nogil:
    write_be32(ip, 6 << 28 | <uint32_t>traffic_class(inner) << 20 | <uint32_t>(flow & 0xFFFFF))
    write_be16(ip + IP6_PAYLOAD, <uint16_t>payload)
    ip[IP6_NEXT] = protocol
    ip[IP6_HOPS] = OUTER_TTL
    write_addr6(ip + IP6_SRC, source)
    write_addr6(ip + IP6_DST, target)


cdef inline void close_outer(
        uint8_t *ip, uint32_t outer, uint32_t inner_length, uint64_t inner_sum, bint summed) noexcept nogil:
    """Correct lengths and checksums of the outer headers. ``summed``: gue's UDP checksum is wanted, and ``inner_sum``
    is known."""
    cdef uint32_t header = IP4_LEN if ip[0] >> 4 == 4 else IP6_LEN
    cdef uint8_t protocol = ip[IP4_PROTO] if header == IP4_LEN else ip[IP6_NEXT]
    cdef uint8_t *udp = ip + header
    cdef uint32_t payload = outer - header + inner_length
    cdef uint16_t checksum
    if header == IP4_LEN:
        write_be16(ip + IP4_TOTAL, <uint16_t>(header + payload))
        store16(ip + IP4_CSUM, 0)
        store16(ip + IP4_CSUM, <uint16_t>~fold(sum_bytes(ip, IP4_LEN)))
    else:
        write_be16(ip + IP6_PAYLOAD, <uint16_t>payload)
    if protocol != PROTO_UDP:
        return
    write_be16(udp + UDP_LENGTH, <uint16_t>payload)
    store16(udp + UDP_CSUM, 0)
    if summed:
        checksum = <uint16_t>~fold(pseudo_sum(ip, PROTO_UDP, payload) + sum_bytes(udp, outer - header) + inner_sum)
        store16(udp + UDP_CSUM, checksum if checksum != 0 else <uint16_t>0xFFFF)


cdef inline void leave_checksum(uint8_t *ip, uint32_t outer, uint32_t inner_length) noexcept nogil:
    """Correct gue's lengths, and leave the UDP checksum to the device: see `complete_checksum`."""
    cdef uint32_t header = IP4_LEN if ip[0] >> 4 == 4 else IP6_LEN
    close_outer(ip, outer, inner_length, 0, False)
    store16(ip + header + UDP_CSUM, fold(pseudo_sum(ip, PROTO_UDP, outer - header + inner_length)))


# --- the whole -------------------------------------------------------------------------------------------------------

cdef inline uint32_t tags_to_keep(const Packet *p, const Hop *hop, uint8_t *tags) noexcept nogil:
    """Copy the VLAN tags that the frame keeps: they belong to the link and do not cross to another. Returns their
    length."""
    cdef uint32_t inside = p.l3 - ETH_LEN
    cdef uint32_t taken_out = VLAN_LEN if p.vlan_tpid != 0 else 0
    if hop.ifindex != p.ifindex:
        return 0
    must(inside + taken_out <= MAX_TAGS)
    if taken_out:
        write_be16(tags, p.vlan_tpid)
        write_be16(tags + 2, p.vlan_tci)
    if inside:
        memcpy(tags + taken_out, p.frame + ETH_LEN - 2, inside)
    return inside + taken_out


cdef inline void encapsulate(
        Packet *p, const Service *service, const Backend *backend, const Source *source, const Hop *hop,
        uint16_t number) noexcept nogil:
    """Wrap the packet and address the frame to its next hop. `p.l3` still points at the inner packet."""
    cdef uint32_t outer = outer_length(service, backend.family)
    cdef uint8_t tags[MAX_TAGS]
    cdef uint32_t kept = tags_to_keep(p, hop, tags)
    cdef uint32_t payload = p.l3_length + outer - (IP4_LEN if backend.family == FAMILY_4 else IP6_LEN)
    cdef uint8_t *ip
    cdef uint8_t *inner
    cdef uint8_t version
    cdef Addr from_
    must(outer > 0 and hop.fault == 0 and p.l3 + p.l3_length <= p.length)
    if wants_sum(service, backend.family) and p.vnet.gso_type == 0:
        complete_checksum(p)
    p.length = p.l3 + p.l3_length                        # without Ethernet's padding
    move_frame(p, <int>p.l3 - <int>(ETH_LEN + kept + outer))
    p.vlan_tpid = 0
    memcpy(p.frame + ETH_DST, hop.dst_mac, 6)
    memcpy(p.frame + ETH_SRC, hop.src_mac, 6)
    if kept:
        memcpy(p.frame + ETH_LEN - 2, tags, kept)
    ip = p.frame + ETH_LEN + kept
    write_be16(ip - 2, ETHERTYPE_IP4 if backend.family == FAMILY_4 else ETHERTYPE_IP6)
    inner = ip + outer
    version = inner[0] >> 4
    from_ = source_of_flow(source, backend.family, p.fingerprint)
    if backend.family == FAMILY_4:
        write_outer_ip4(ip, service, outer_protocol(service, version), from_, backend.addr, number, inner, payload)
    else:
        write_outer_ip6(ip, outer_protocol(service, version), from_, backend.addr, p.fingerprint, inner, payload)
    write_tunnel_header(inner, service, version, p.fingerprint, payload)
    p.outer = <uint16_t>outer
    p.out_ifindex = hop.ifindex
    p.summed = wants_sum(service, backend.family)
    if p.summed and p.segment_size == 0:
        close_outer(ip, outer, p.l3_length, sum_bytes(inner, p.l3_length), True)


cdef inline bint split_outer(Packet *p, uint8_t family, uint32_t mtu, uint32_t number) noexcept nogil:
    """Let the tunnel's own packets leave in fragments; False where the link is too narrow even for that.

    That is one packet, or each one of a GSO packet. Whoever unwraps them must put them together first, as kernels do.
    """
    cdef uint32_t header = IP4_LEN if family == FAMILY_4 else IP6_LEN + IP6_FRAG_LEN
    cdef uint32_t inside = <uint32_t>p.outer + p.l4 + p.l4_header - p.l3 if p.segment_size else 0
    must(p.outer > 0 and p.family != FAMILY_4)
    if mtu < header + max(<uint32_t>MIN_FRAGMENT, inside):
        return False
    if p.segment_size == 0:
        must(p.vnet.flags & VNET_NEEDS_CSUM == 0)
        p.segment_size = p.l3_length + p.outer
    p.datagram = number
    p.fragment_size = (mtu - header) & ~<uint32_t>7
    if family == FAMILY_4:
        p.frame[p.l3 - p.outer + IP4_FRAG] &= ~<uint8_t>IP4_DF
    return True
