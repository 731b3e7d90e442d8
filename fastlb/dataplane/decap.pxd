"""Decapsulation: from a tunnel's packet to the packet inside it, and to a TUN device. The receiving end of `encap`.

    | Ethernet | outer IP |                    | inner IP ...     ipip: protocol 4 or 41 (RFC 2003, RFC 4213, RFC 2473)
    | Ethernet | outer IP | GRE 4 [key 4]      | inner IP ...     gre: RFC 2784, RFC 2890
    | Ethernet | outer IP | UDP 8 | GUE 4 + n  | inner IP ...     gue: draft-ietf-intarea-gue, variant 0
    | Ethernet | outer IP | UDP 8              | inner IP ...     gue: variant 1, the IP version tells it

A GSO packet of UDP brings many datagrams of gue, each from its GUE header on, behind one UDP header.

Invariants: no byte beyond `end` is read, and every packet ends in exactly one reason. The inner packet is written as it
is, except for the ECN bits (RFC 6040); its own checksums are checked by the kernel behind the TUN device, or by
`coalesce`.

Every parser has the same form: cursor, end, out-pointer. It checks the bounds first, advances the cursor and returns
the protocol of what follows, or a negative value: minus the reason. The rules for the outer header are those of the
receive filter (kernel/ebpf/decap_filter.py): an IPv6 header may have one Destination Options header, where tunnels put
their encapsulation limit.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from fastlb.dataplane.abi cimport POLLERR, SOL_SOCKET, SO_ERROR, getsockopt, poll, pollfd, tpacket3_hdr
from fastlb.dataplane.checksum cimport difference, fold, sum_addr, sum_bytes, update_checksum
from fastlb.dataplane.coalesce cimport Coalescer, Inner, coalesce, write_waiting
from fastlb.dataplane.machine cimport bswap16, load16, load32, load_acquire_u32, must, unlikely
from fastlb.dataplane.reasons cimport (
    DECAP_ECN, DECAP_GRE_HEADER, DECAP_GRE_KEY, DECAP_GRE_PROTOCOL, DECAP_GUE_CONTROL, DECAP_GUE_HEADER,
    DECAP_GUE_PROTOCOL, DECAP_INNER_HEADER, DECAP_INNER_TRUNCATED, DECAP_NESTED, DECAP_NOT_TUNNEL, DECAP_OFFLOAD,
    DECAP_OUTER_CHECKSUM, DECAP_OUTER_FRAGMENT, DECAP_OUTER_HEADER, DECAP_REASONS, DECAP_RING_CLAMPED, DECAP_RING_HOLE,
    DECAP_UDP_LENGTH, DROP_RING_HOLE)
from fastlb.dataplane.mode cimport GRE_HAS_KEY, GRE_KEY_LEN, GRE_LEN, GUE_LEN, PROTO_GRE, PROTO_IP4, PROTO_IP6
from fastlb.dataplane.ring cimport (
    RxRing, advance, has_frames, hold_block, kernel_may_refill, next_slot, take_frame)
from fastlb.dataplane.types cimport FAMILY_4, FAMILY_6, GSO_ECN, GSO_UDP, PROTO_UDP, VNET_NEEDS_CSUM, Packet
from fastlb.dataplane.wire cimport (
    ETHERTYPE_IP4, ETHERTYPE_IP6, ETH_LEN, ETH_TYPE, EXT_DEST_OPTS, IP4_CSUM, IP4_DST, IP4_FRAG, IP4_FRAG_MASK, IP4_LEN,
    IP4_PROTO, IP4_SRC, IP4_TOTAL, IP6_DST, IP6_LEN, IP6_NEXT, IP6_PAYLOAD, IP6_SRC, UDP_CSUM, UDP_LEN, UDP_LENGTH,
    read_addr4, read_addr6, read_be16)


cdef enum:
    MODE_IPIP = 1            # bits of Decap.modes
    MODE_GRE = 2
    MODE_GUE = 4
    GUE_CONTROL = 0x20       # in the first byte, below the two bits of the variant
    GUE_HLEN = 0x1F          # words of four bytes behind the fixed header
    ECN_NOT_ECT = 0
    ECN_ECT1 = 1
    ECN_CE = 3
    IDLE_MS = 1000           # the longest sleep


cdef struct Decap:
    Coalescer out
    Packet packet            # the one that is taken
    pollfd fds[2]            # the ring's, and the one that ends a sleep
    uint64_t reasons[DECAP_REASONS]
    uint64_t packets
    uint64_t blocks
    RxRing *ring
    uint32_t modes
    uint32_t be_key
    bint has_key
    uint16_t be_port         # of GUE
    uint32_t stopping        # set by another thread, which then writes to fds[1]


# --- the outer headers -----------------------------------------------------------------------------------------------

cdef inline int strip_ip4(const uint8_t **cursor, const uint8_t **end, Packet *p, Inner *inner) noexcept nogil:
    """Step over the outer IPv4 header (RFC 791). ``end`` moves back to where the packet says that it ends."""
    cdef const uint8_t *ip = cursor[0]
    cdef int32_t header, total
    if unlikely(end[0] - ip < IP4_LEN):
        return -DECAP_OUTER_HEADER
    header = (ip[0] & 0x0F) * 4
    total = read_be16(ip + IP4_TOTAL)
    if unlikely(ip[0] >> 4 != 4 or header < IP4_LEN or total < header or end[0] - ip < total):
        return -DECAP_OUTER_HEADER
    if unlikely(read_be16(ip + IP4_FRAG) & IP4_FRAG_MASK):
        return -DECAP_OUTER_FRAGMENT
    if unlikely(fold(sum_bytes(ip, header)) != 0xFFFF):
        return -DECAP_OUTER_CHECKSUM
    p.src = read_addr4(ip + IP4_SRC)
    p.dst = read_addr4(ip + IP4_DST)
    inner.outer_ecn = ip[1] & 3
    cursor[0] = ip + header
    end[0] = ip + total
    return ip[IP4_PROTO]


cdef inline int strip_ip6(const uint8_t **cursor, const uint8_t **end, Packet *p, Inner *inner) noexcept nogil:
    """Step over the outer IPv6 header (RFC 8200). ``end`` moves back to where the packet says that it ends."""
    cdef const uint8_t *ip = cursor[0]
    cdef int32_t total
    if unlikely(end[0] - ip < IP6_LEN):
        return -DECAP_OUTER_HEADER
    total = IP6_LEN + read_be16(ip + IP6_PAYLOAD)
    if unlikely(ip[0] >> 4 != 6 or end[0] - ip < total):
        return -DECAP_OUTER_HEADER
    p.src = read_addr6(ip + IP6_SRC)
    p.dst = read_addr6(ip + IP6_DST)
    inner.outer_ecn = ip[1] >> 4 & 3
    cursor[0] = ip + IP6_LEN
    end[0] = ip + total
    return step_over_options(cursor, end[0], ip[IP6_NEXT])


cdef inline int step_over_options(const uint8_t **cursor, const uint8_t *end, int following) noexcept nogil:
    """Step over one Destination Options header (RFC 8200 section 4.6), as RFC 2473 section 4.1.1 puts into tunnels."""
    cdef const uint8_t *options = cursor[0]
    cdef int32_t length
    if following != EXT_DEST_OPTS:
        return following
    if unlikely(end - options < 8):
        return -DECAP_OUTER_HEADER
    length = (options[1] + 1) * 8
    if unlikely(end - options < length):
        return -DECAP_OUTER_HEADER
    cursor[0] += length
    return options[0]


cdef inline int strip_gre(const uint8_t **cursor, const uint8_t *end, const Decap *decap) noexcept nogil:
    """Step over a GRE header (RFC 2784), with the key of RFC 2890."""
    cdef const uint8_t *gre = cursor[0]
    cdef int32_t length = GRE_LEN
    cdef uint16_t flags, protocol
    cdef bint has_key
    if unlikely(end - gre < GRE_LEN):
        return -DECAP_GRE_HEADER
    flags = read_be16(gre)
    has_key = flags & GRE_HAS_KEY != 0
    if has_key:
        length += GRE_KEY_LEN
    # Every other flag is zero: checksum, sequence number, routing, another version.
    if unlikely(flags & ~<uint16_t>GRE_HAS_KEY or end - gre < length):
        return -DECAP_GRE_HEADER
    if unlikely(has_key != decap.has_key or has_key and load32(gre + GRE_LEN) != decap.be_key):
        return -DECAP_GRE_KEY
    cursor[0] += length
    protocol = read_be16(gre + 2)
    if protocol == ETHERTYPE_IP4:
        return PROTO_IP4
    return PROTO_IP6 if protocol == ETHERTYPE_IP6 else -DECAP_GRE_PROTOCOL


cdef inline bint udp_checksum_holds(const uint8_t *udp, uint16_t length, const Packet *p) noexcept nogil:
    """True if the outer UDP checksum is right or cannot be checked.

    Zero means that there is none (RFC 768, and RFC 6935 for tunnels over IPv6). One that is left to the device is not
    there yet, and where the inner one is left open the outer does not fit yet. A GSO packet has none.
    """
    if load16(udp + UDP_CSUM) == 0 or p.vnet.flags & VNET_NEEDS_CSUM or p.vnet.gso_type:
        return True
    return fold(sum_addr(p.src) + sum_addr(p.dst) + bswap16(length) + <uint32_t>bswap16(PROTO_UDP)
                + sum_bytes(udp, length)) == 0xFFFF


cdef inline int strip_udp(
        const uint8_t **cursor, const uint8_t **end, const Packet *p, const Decap *decap) noexcept nogil:
    """Step over the outer UDP header (RFC 768); PROTO_UDP. ``end`` moves back to where the datagram says that it
    ends."""
    cdef const uint8_t *udp = cursor[0]
    cdef int32_t length
    if unlikely(end[0] - udp < UDP_LEN):
        return -DECAP_UDP_LENGTH
    if unlikely(load16(udp + 2) != decap.be_port):
        return -DECAP_NOT_TUNNEL
    length = read_be16(udp + UDP_LENGTH)
    if unlikely(length < UDP_LEN or end[0] - udp < length):
        return -DECAP_UDP_LENGTH
    if unlikely(not udp_checksum_holds(udp, <uint16_t>length, p)):
        return -DECAP_OUTER_CHECKSUM
    cursor[0] += UDP_LEN
    end[0] = udp + length
    return PROTO_UDP


cdef inline int strip_gue(const uint8_t **cursor, const uint8_t *end) noexcept nogil:
    """Step over a GUE header (draft-ietf-intarea-gue-09 section 3).

    A flag announces a field that can change how the rest must be read; none of them is known here, so any flag is
    refused. Words without a flag are private data, and are stepped over.
    """
    cdef const uint8_t *gue = cursor[0]
    cdef int32_t length
    if unlikely(end - gue < GUE_LEN):
        return -DECAP_GUE_HEADER
    if gue[0] >> 4 == 4:                                 # variant 1: the first bits of an IP header
        return PROTO_IP4
    if gue[0] >> 4 == 6:
        return PROTO_IP6
    length = GUE_LEN + (gue[0] & GUE_HLEN) * 4
    if unlikely(gue[0] >> 6 != 0 or load16(gue + 2) != 0 or end - gue < length):
        return -DECAP_GUE_HEADER
    if unlikely(gue[0] & GUE_CONTROL):
        return -DECAP_GUE_CONTROL
    cursor[0] += length
    return gue[1] if gue[1] == PROTO_IP4 or gue[1] == PROTO_IP6 else -DECAP_GUE_PROTOCOL


cdef inline int strip_outer(
        const uint8_t **cursor, const uint8_t **end, Packet *p, const Decap *decap, Inner *inner) noexcept nogil:
    """Step over Ethernet, IP and UDP. Returns the protocol of what follows, PROTO_UDP for gue, or minus the reason."""
    cdef uint16_t ethertype
    cdef int following
    if unlikely(end[0] - cursor[0] < ETH_LEN):
        return -DECAP_OUTER_HEADER
    ethertype = read_be16(cursor[0] + ETH_TYPE)
    cursor[0] += ETH_LEN
    if ethertype == ETHERTYPE_IP4:
        following = strip_ip4(cursor, end, p, inner)
    elif ethertype == ETHERTYPE_IP6:
        following = strip_ip6(cursor, end, p, inner)
    else:
        return -DECAP_NOT_TUNNEL
    if following == PROTO_UDP and decap.modes & MODE_GUE:
        return strip_udp(cursor, end, p, decap)
    if following == PROTO_GRE and decap.modes & MODE_GRE:
        return following
    if (following == PROTO_IP4 or following == PROTO_IP6) and decap.modes & MODE_IPIP:
        return following
    return following if following < 0 else -DECAP_NOT_TUNNEL


cdef inline int strip_tunnel(
        const uint8_t **cursor, const uint8_t *end, int protocol, const Decap *decap) noexcept nogil:
    """Step over what lies between the outer headers and the inner packet. Returns the inner protocol (PROTO_IP4 or
    PROTO_IP6), or minus the reason."""
    if protocol == PROTO_UDP:
        return strip_gue(cursor, end)
    return strip_gre(cursor, end, decap) if protocol == PROTO_GRE else protocol


# --- the inner packet ------------------------------------------------------------------------------------------------

cdef inline int take_inner4(const uint8_t *ip, const uint8_t *end, Inner *inner) noexcept nogil:
    """Describe an inner IPv4 packet (RFC 791). Returns the protocol that it carries, or minus the reason."""
    cdef int32_t header
    if unlikely(end - ip < IP4_LEN):
        return -DECAP_INNER_TRUNCATED
    header = (ip[0] & 0x0F) * 4
    inner.family = FAMILY_4
    inner.length = read_be16(ip + IP4_TOTAL)
    if unlikely(ip[0] >> 4 != 4 or header < IP4_LEN or <int32_t>inner.length < header):
        return -DECAP_INNER_HEADER
    if unlikely(end - ip < <int32_t>inner.length):
        return -DECAP_INNER_TRUNCATED
    return ip[IP4_PROTO]


cdef inline int take_inner6(const uint8_t *ip, const uint8_t *end, Inner *inner) noexcept nogil:
    """Describe an inner IPv6 packet (RFC 8200). Returns the protocol that it carries, also behind one Destination
    Options header, or minus the reason."""
    cdef const uint8_t *cursor = ip + IP6_LEN
    cdef int following
    if unlikely(end - ip < IP6_LEN):
        return -DECAP_INNER_TRUNCATED
    inner.family = FAMILY_6
    inner.length = IP6_LEN + read_be16(ip + IP6_PAYLOAD)
    if unlikely(ip[0] >> 4 != 6):
        return -DECAP_INNER_HEADER
    if unlikely(end - ip < <int32_t>inner.length):
        return -DECAP_INNER_TRUNCATED
    following = step_over_options(&cursor, ip + inner.length, ip[IP6_NEXT])
    return following if following >= 0 else -DECAP_INNER_HEADER


cdef inline uint8_t ecn_of(const Inner *inner) noexcept nogil:
    return inner.ip[1] & 3 if inner.family == FAMILY_4 else inner.ip[1] >> 4 & 3


cdef inline void set_ecn(Inner *inner, uint8_t ecn) noexcept nogil:
    cdef uint16_t before = load16(inner.ip)
    if inner.family == FAMILY_4:
        inner.ip[1] = <uint8_t>(inner.ip[1] & 0xFC | ecn)
        update_checksum(inner.ip + IP4_CSUM, difference(before, load16(inner.ip)))
    else:
        inner.ip[1] = <uint8_t>(inner.ip[1] & 0xCF | ecn << 4)


cdef inline bint join_ecn(Inner *inner) noexcept nogil:
    """Copy congestion from the outer header to the inner (RFC 6040 section 4.2). Returns False if the packet must be
    dropped."""
    cdef uint8_t ecn = ecn_of(inner)
    cdef uint8_t outer = inner.outer_ecn
    if ecn == ECN_NOT_ECT:
        return outer != ECN_CE
    if ecn != ECN_CE and (outer == ECN_CE or outer == ECN_ECT1) and outer != ecn:
        set_ecn(inner, outer)
    return True


cdef inline bint leaves_open(const Packet *p, const uint8_t *at) noexcept nogil:
    """True if a checksum behind this point is left to the device. One before it is the outer UDP header's, which has
    been stripped."""
    return p.vnet.flags & VNET_NEEDS_CSUM and p.frame + p.vnet.csum_start >= at


cdef inline int take_offloads(const Packet *p, bint joined, Inner *inner) noexcept nogil:
    """Set what of the inner packet is left to the device, in offsets from it. Returns 0, or the reason why that cannot
    be."""
    cdef uint32_t start = p.vnet.csum_start
    cdef uint32_t stripped = <uint32_t>(inner.ip - p.frame)
    memset(&inner.vnet, 0, sizeof(inner.vnet))
    if leaves_open(p, inner.ip):
        if unlikely(start - stripped + p.vnet.csum_offset + 2 > inner.length):
            return DECAP_OFFLOAD
        inner.vnet.flags = VNET_NEEDS_CSUM
        inner.vnet.csum_start = <uint16_t>(start - stripped)
        inner.vnet.csum_offset = p.vnet.csum_offset
    if unlikely(p.vnet.gso_type) and not joined:
        if inner.vnet.flags == 0:                        # not of the inner packet
            return DECAP_OFFLOAD
        inner.vnet.gso_type = p.vnet.gso_type
        inner.vnet.gso_size = p.vnet.gso_size
    return 0


cdef inline bint is_joined(const Packet *p, int protocol, const uint8_t *payload) noexcept nogil:
    """True for a GSO packet of UDP that brings many datagrams of gue; one that came out of a tunnel is none."""
    return (p.vnet.gso_type & ~<uint8_t>GSO_ECN) == GSO_UDP and protocol == PROTO_UDP and not leaves_open(p, payload)


cdef inline int decapsulate(
        const Decap *decap, Packet *p, int protocol, const uint8_t *cursor, const uint8_t *end, bint joined,
        Inner *inner) noexcept nogil:
    """Describe the packet behind the outer headers. Returns 0, or the reason to drop it. The frame's memory may
    change."""
    protocol = strip_tunnel(&cursor, end, protocol, decap)
    if unlikely(protocol < 0):
        return -protocol
    inner.ip = p.frame + (cursor - p.frame)
    if protocol == PROTO_IP4:
        protocol = take_inner4(cursor, end, inner)
    else:
        must(protocol == PROTO_IP6)
        protocol = take_inner6(cursor, end, inner)
    if unlikely(protocol < 0):
        return -protocol
    if unlikely(protocol == PROTO_IP4 or protocol == PROTO_IP6 or protocol == PROTO_GRE):
        return DECAP_NESTED
    if unlikely(not join_ecn(inner)):
        return DECAP_ECN
    return take_offloads(p, joined, inner)


# --- the loop --------------------------------------------------------------------------------------------------------

cdef inline void drop(Decap *decap, int reason) noexcept nogil:
    decap.packets += 1
    decap.reasons[reason] += 1


cdef inline void take_packet(Decap *decap, Packet *p) noexcept nogil:
    """Take one frame, with one packet or many. Its memory is in use until `write_waiting`."""
    cdef const uint8_t *cursor = p.frame
    cdef const uint8_t *end = p.frame + p.length
    cdef const uint8_t *stop
    cdef Inner inner
    cdef int protocol = strip_outer(&cursor, &end, p, decap, &inner)
    cdef bint joined = protocol > 0 and is_joined(p, protocol, cursor)
    cdef int reason
    if unlikely(protocol < 0):
        drop(decap, -protocol)
        return
    if unlikely(joined and p.vnet.gso_size < IP4_LEN):   # too short for any packet
        drop(decap, DECAP_OFFLOAD)
        return
    while True:                                          # bounded by the frame
        stop = cursor + p.vnet.gso_size if joined and end - cursor > p.vnet.gso_size else end
        reason = decapsulate(decap, p, protocol, cursor, stop, joined, &inner)
        if unlikely(reason):
            drop(decap, reason)
        else:
            decap.packets += 1
            coalesce(&decap.out, &inner)
        if stop == end:
            break
        cursor = stop


cdef inline bint read_block(Decap *decap) noexcept nogil:
    """Read the whole of the next closed block; False if there is none."""
    cdef RxRing *ring = decap.ring
    cdef tpacket3_hdr *slot
    cdef int reason
    must(not ring.open_blocks)
    if not has_frames(ring):
        return False
    slot = next_slot(ring, True)
    while slot != NULL:
        reason = take_frame(ring, slot, &decap.packet)
        advance(ring, slot, True)
        if unlikely(reason):
            drop(decap, DECAP_RING_HOLE if reason == DROP_RING_HOLE else DECAP_RING_CLAMPED)
        else:
            take_packet(decap, &decap.packet)
        slot = next_slot(ring, True)
    write_waiting(&decap.out)
    hold_block(ring)
    kernel_may_refill(ring)
    decap.blocks += 1
    return True


cdef inline void sleep_until_called(Decap *decap) noexcept nogil:
    """Sleep until a block is closed, or somebody wants the loop to stop.

    A link that went down leaves an error on its socket, and poll returns at once until somebody has asked for it.
    """
    cdef int error
    cdef unsigned int length = sizeof(error)
    poll(decap.fds, 2, IDLE_MS)
    if decap.fds[0].revents & POLLERR:
        getsockopt(decap.fds[0].fd, SOL_SOCKET, SO_ERROR, &error, &length)


cdef inline void run_decap(Decap *decap) noexcept nogil:
    while not load_acquire_u32(&decap.stopping):
        if not read_block(decap):
            sleep_until_called(decap)
