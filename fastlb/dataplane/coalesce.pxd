"""TCP segments into GSO packets: what a NIC's GRO does for the host, done for packets that go to a TUN device.

Invariants: the packets of a flow are written in the order in which they came, and a segment is merged only if both its
checksums were right. The kernel checks every packet that is written by itself, but no GSO packet.

Segments wait in bundles, one a flow, where they lie in the ring; `write_waiting` must come before that memory goes
back. A write is one packet, with struct virtio_net_hdr in front (IFF_VNET_HDR, Documentation/networking/tuntap.rst):

    | virtio_net_hdr 10 | IP | TCP | payload | payload of the second | payload of the third | ...
     '--- parts[0] ----' '---- parts[1] ----' '----- parts[2] ------'

What may be merged is what Linux merges (tcp_gro_receive), so that no receiver can tell: the same addresses, ports, TTL,
TOS, acknowledgement, window and options; the next sequence number; the same length, or a shorter last one. PSH and FIN
end a GSO packet.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

from fastlb.dataplane.abi cimport EINTR, errno, iovec, writev
from fastlb.dataplane.checksum cimport fold, pseudo_sum, sum_bytes
from fastlb.dataplane.machine cimport load16, load32, load64, must, store16, unlikely
from fastlb.dataplane.types cimport (
    FAMILY_4, GSO_TCP4, GSO_TCP6, PROTO_TCP, VNET_HDR_LEN, VNET_NEEDS_CSUM, VnetHdr)
from fastlb.dataplane.wire cimport (
    IP4_CSUM, IP4_FRAG, IP4_FRAG_MASK, IP4_ID, IP4_LEN, IP4_PROTO, IP4_SRC, IP4_TOTAL, IP6_LEN, IP6_NEXT,
    IP6_PAYLOAD, IP6_SRC, MAX_IP, TCP_ACK, TCP_ACK_NO, TCP_CSUM, TCP_FIN, TCP_FLAGS, TCP_LEN, TCP_OFFSET, TCP_SEQ,
    read_be16, read_be32, write_be16)


cdef enum:
    BUNDLES = 8              # flows that can wait at once; another one has the oldest written
    MAX_PARTS = 64           # segments of a GSO packet: 64 KiB of those that Ethernet carries
    IP4_PLAIN = 0x45         # version 4, no options
    IP4_DONT_FRAGMENT = 0x40  # in the byte at IP4_FRAG
    TCP_PSH = 0x08
    TCP_ECE = 0x40
    TCP_WINDOW = 14


cdef struct Inner:
    # A packet that came out of a tunnel. Nothing may be written in front of it: another one may wait there.
    uint8_t *ip
    VnetHdr vnet             # its offloads, with offsets from ip
    uint32_t length          # of the whole packet, by its own header
    uint16_t l4              # offset of the TCP header; 0: not a whole TCP packet without IP options or extensions
    uint16_t header          # bytes of the IP and TCP headers; 0: never part of a GSO packet
    uint8_t family
    uint8_t outer_ecn


cdef struct Bundle:
    iovec parts[1 + MAX_PARTS]
    Inner first
    uint32_t count           # segments; 0: the bundle is free
    uint32_t length          # from the IP header on
    uint32_t next_seq
    uint32_t size            # payload bytes of each segment but the last
    uint8_t last_flags


cdef struct Coalescer:
    Bundle bundles[BUNDLES]
    uint64_t delivered       # packets
    uint64_t refused         # packets in writes that failed
    uint64_t merged          # packets that left in a GSO packet
    uint64_t writes
    uint32_t next_bundle     # the bundle that makes room next
    int fd


# --- what a packet is ------------------------------------------------------------------------------------------------

cdef inline bint checksums_hold(const Inner *p) noexcept nogil:
    """True if both checksums are right. One that is left open counts as right: the packet came over no wire that could
    damage it."""
    cdef uint32_t l4_length = p.length - p.l4
    if p.family == FAMILY_4 and unlikely(fold(sum_bytes(p.ip, IP4_LEN)) != 0xFFFF):
        return False
    if p.vnet.flags & VNET_NEEDS_CSUM:
        return p.vnet.csum_start == p.l4 and p.vnet.csum_offset == TCP_CSUM
    return fold(pseudo_sum(p.ip, PROTO_TCP, l4_length) + sum_bytes(p.ip + p.l4, l4_length)) == 0xFFFF


cdef inline void find_tcp(Inner *p) noexcept nogil:
    """Fill in ``l4`` and ``header``."""
    cdef uint16_t l4
    p.l4 = p.header = 0
    if p.family == FAMILY_4:
        if p.ip[0] != IP4_PLAIN or p.ip[IP4_PROTO] != PROTO_TCP or read_be16(p.ip + IP4_FRAG) & IP4_FRAG_MASK:
            return
        l4 = IP4_LEN
    else:
        if p.ip[IP6_NEXT] != PROTO_TCP:
            return
        l4 = IP6_LEN
    if p.length >= <uint32_t>(l4 + TCP_LEN):
        p.l4 = l4
        if is_mergeable(p):
            p.header = l4 + (p.ip[l4 + TCP_OFFSET] >> 4) * 4


cdef inline bint is_mergeable(const Inner *p) noexcept nogil:
    """True for undamaged data with an acknowledgement, without anything that a receiver must see by itself."""
    cdef const uint8_t *tcp = p.ip + p.l4
    cdef uint32_t header = (tcp[TCP_OFFSET] >> 4) * 4
    if header < TCP_LEN or p.length > MAX_IP or p.length <= p.l4 + header:
        return False
    if not tcp[TCP_FLAGS] & TCP_ACK or tcp[TCP_FLAGS] & ~<uint8_t>(TCP_ACK | TCP_PSH | TCP_FIN | TCP_ECE):
        return False
    return p.vnet.gso_type == 0 and checksums_hold(p)


cdef inline bint same_flow(const Inner *a, const Inner *b) noexcept nogil:
    if a.family != b.family or load32(a.ip + a.l4) != load32(b.ip + b.l4):
        return False
    if a.family == FAMILY_4:
        return load64(a.ip + IP4_SRC) == load64(b.ip + IP4_SRC)
    return memcmp(a.ip + IP6_SRC, b.ip + IP6_SRC, 32) == 0


cdef inline bint same_ip_header(const Bundle *bundle, const Inner *p) noexcept nogil:
    """True if the IP headers differ only where segmentation changes them. IDs must count up where the packet may be
    fragmented (RFC 6864)."""
    cdef const uint8_t *first = bundle.first.ip
    if p.family != FAMILY_4:                             # class and flow label; next header and hop limit
        return load32(first) == load32(p.ip) and load16(first + IP6_NEXT) == load16(p.ip + IP6_NEXT)
    if load16(first) != load16(p.ip) or load32(first + IP4_FRAG) != load32(p.ip + IP4_FRAG):
        return False
    return (p.ip[IP4_FRAG] & IP4_DONT_FRAGMENT
            or read_be16(p.ip + IP4_ID) == <uint16_t>(read_be16(first + IP4_ID) + bundle.count))


cdef inline bint same_tcp_header(const Bundle *bundle, const Inner *p) noexcept nogil:
    """True if the TCP headers differ only in PSH, FIN and the sequence number, which must be the next."""
    cdef const uint8_t *first = bundle.first.ip + bundle.first.l4
    cdef const uint8_t *tcp = p.ip + p.l4
    return (p.header == bundle.first.header and read_be32(tcp + TCP_SEQ) == bundle.next_seq
            and load32(first + TCP_ACK_NO) == load32(tcp + TCP_ACK_NO)
            and first[TCP_OFFSET] == tcp[TCP_OFFSET]
            and (first[TCP_FLAGS] | TCP_PSH | TCP_FIN) == (tcp[TCP_FLAGS] | TCP_PSH | TCP_FIN)
            and load16(first + TCP_WINDOW) == load16(tcp + TCP_WINDOW)
            and memcmp(first + TCP_LEN, tcp + TCP_LEN, p.header - p.l4 - TCP_LEN) == 0)


cdef inline bint belongs(const Bundle *bundle, const Inner *p) noexcept nogil:
    """True if this is the next segment of the bundle."""
    cdef uint32_t payload = p.length - p.header
    return (payload <= bundle.size and bundle.length + payload <= MAX_IP
            and same_ip_header(bundle, p) and same_tcp_header(bundle, p))


# --- the way out -----------------------------------------------------------------------------------------------------

cdef inline void write_parts(Coalescer *out, const Inner *first, iovec *parts, uint32_t count) noexcept nogil:
    """Write `count` packets in one write; the first of them is whole. What the kernel refuses is counted, and never
    retried."""
    cdef ssize_t written
    parts[0].iov_base = <void *>&first.vnet
    parts[0].iov_len = VNET_HDR_LEN
    parts[1].iov_base = first.ip
    parts[1].iov_len = first.length
    written = writev(out.fd, parts, 1 + count)
    while unlikely(written < 0 and errno == EINTR):
        written = writev(out.fd, parts, 1 + count)
    out.writes += 1
    if unlikely(written < 0):
        out.refused += count
    else:
        out.delivered += count


cdef inline void write_packet(Coalescer *out, const Inner *p) noexcept nogil:
    cdef iovec parts[2]
    write_parts(out, p, parts, 1)


cdef inline void make_gso_packet(Bundle *bundle) noexcept nogil:
    """Give the first segment's headers the values of all segments together. The checksum is left open: it holds the
    pseudo-header's sum."""
    cdef Inner *p = &bundle.first
    cdef uint8_t *tcp = p.ip + p.l4
    if p.family == FAMILY_4:
        write_be16(p.ip + IP4_TOTAL, <uint16_t>bundle.length)
        store16(p.ip + IP4_CSUM, 0)
        store16(p.ip + IP4_CSUM, <uint16_t>~fold(sum_bytes(p.ip, IP4_LEN)))
    else:
        write_be16(p.ip + IP6_PAYLOAD, <uint16_t>(bundle.length - IP6_LEN))
    tcp[TCP_FLAGS] |= bundle.last_flags
    store16(tcp + TCP_CSUM, fold(pseudo_sum(p.ip, PROTO_TCP, bundle.length - p.l4)))
    p.vnet.flags = VNET_NEEDS_CSUM
    p.vnet.gso_type = GSO_TCP4 if p.family == FAMILY_4 else GSO_TCP6
    p.vnet.hdr_len = p.header
    p.vnet.gso_size = <uint16_t>bundle.size
    p.vnet.csum_start = p.l4
    p.vnet.csum_offset = TCP_CSUM


cdef inline void write_bundle(Coalescer *out, Bundle *bundle) noexcept nogil:
    """Write a bundle and free it."""
    must(0 < bundle.count <= MAX_PARTS and bundle.length <= MAX_IP)
    if bundle.count > 1:
        make_gso_packet(bundle)
        out.merged += bundle.count
    write_parts(out, &bundle.first, bundle.parts, bundle.count)
    bundle.count = 0


# --- bundles ---------------------------------------------------------------------------------------------------------

cdef inline Bundle *bundle_of(Coalescer *out, const Inner *p) noexcept nogil:
    """Return where segments of the packet's flow wait; NULL if none do."""
    cdef int i
    for i in range(BUNDLES):
        if out.bundles[i].count and same_flow(&out.bundles[i].first, p):
            return &out.bundles[i]
    return NULL


cdef inline Bundle *free_bundle(Coalescer *out) noexcept nogil:
    cdef Bundle *bundle = &out.bundles[out.next_bundle]
    out.next_bundle = out.next_bundle + 1 if out.next_bundle + 1 < BUNDLES else 0
    if bundle.count:
        write_bundle(out, bundle)
    return bundle


cdef inline void start_bundle(Coalescer *out, const Inner *p) noexcept nogil:
    cdef Bundle *bundle = free_bundle(out)
    bundle.first = p[0]
    bundle.count = 1
    bundle.length = p.length
    bundle.size = p.length - p.header
    bundle.next_seq = read_be32(p.ip + p.l4 + TCP_SEQ) + bundle.size
    bundle.last_flags = 0


cdef inline void append(Coalescer *out, Bundle *bundle, const Inner *p) noexcept nogil:
    """Add the next segment. If nothing may follow it, the bundle is written."""
    cdef uint32_t payload = p.length - p.header
    must(bundle.count < MAX_PARTS)
    bundle.count += 1
    bundle.parts[bundle.count].iov_base = p.ip + p.header
    bundle.parts[bundle.count].iov_len = payload
    bundle.length += payload
    bundle.next_seq += payload
    bundle.last_flags = p.ip[p.l4 + TCP_FLAGS] & (TCP_PSH | TCP_FIN)
    if payload < bundle.size or bundle.last_flags or bundle.count == MAX_PARTS:
        write_bundle(out, bundle)


cdef inline void coalesce(Coalescer *out, Inner *p) noexcept nogil:
    """Write the packet now, or let it wait for more. Packets of its flow that wait already always go first."""
    cdef Bundle *bundle
    find_tcp(p)
    if p.l4 == 0:
        write_packet(out, p)
        return
    bundle = bundle_of(out, p)
    if bundle != NULL:
        if p.header and belongs(bundle, p):
            append(out, bundle, p)
            return
        write_bundle(out, bundle)
    if p.header and not p.ip[p.l4 + TCP_FLAGS] & (TCP_PSH | TCP_FIN):
        start_bundle(out, p)
    else:
        write_packet(out, p)


cdef inline void write_waiting(Coalescer *out) noexcept nogil:
    """Write everything that waits. The packets' memory is not used after this."""
    cdef int i
    for i in range(BUNDLES):
        if out.bundles[i].count:
            write_bundle(out, &out.bundles[i])


cdef inline void init_coalescer(Coalescer *out, int fd) noexcept nogil:
    memset(out, 0, sizeof(Coalescer))
    out.fd = fd
