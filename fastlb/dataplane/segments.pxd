"""One packet that leaves as several frames: a GSO packet's segments inside a tunnel, or fragments, or both.

No virtio_net_hdr can describe segmentation inside a tunnel, so the core cuts, unless there is another way to tell the
kernel (kernel/ebpf/tunnel_offload.py). Nothing is copied but headers: each frame is a corrected copy of them, and a
stretch of the payload where it lies.

    | link, outer headers, IP, TCP or UDP | payload ………………………………………… |       a GSO packet, or a long TCP segment
    | link, outer headers, IP             | TCP or UDP, payload …………………… |       a packet that is fragmented
    | link, outer IP                      | the rest of a tunnel's packet … |       the same (encap.pxd, `split_outer`)
      MAX_HEADERS: copied to every frame   a stretch for each frame

First a packet is cut into segments; one that is no GSO packet has one segment, itself. Then each segment is fragmented,
where it must be. The datagrams of a GSO packet of UDP can need both, because each of them must arrive whole.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastlb.dataplane.checksum cimport fold, pseudo_sum, sum_bytes
from fastlb.dataplane.encap cimport close_outer, complete_checksum
from fastlb.dataplane.machine cimport must, store16
from fastlb.dataplane.rewrite cimport fits
from fastlb.dataplane.types cimport (
    FAMILY_4, FRAGMENT_NONE, GSO_ECN, GSO_TCP4, GSO_TCP6, GSO_UDP, PROTO_TCP, VNET_NEEDS_CSUM, Packet)
from fastlb.dataplane.wire cimport (
    EXT_FRAGMENT, IP4_CSUM, IP4_DF, IP4_FRAG, IP4_ID, IP4_LEN, IP4_MF, IP4_TOTAL, IP6_FRAG_LEN, IP6_LEN,
    IP6_NEXT, IP6_PAYLOAD, OPTION_END, OPTION_NOP, TCP_CSUM, TCP_CWR, TCP_FIN, TCP_FLAGS, TCP_PSH, TCP_RST,
    TCP_SEQ, TCP_SYN, TCP_URG, UDP_CSUM, UDP_LENGTH, read_be16, read_be32, write_be16, write_be32)


cdef enum:
    MAX_HEADERS = 256        # link 26, outer 52, IPv6 with extension headers, TCP 60
    MAX_GROWTH = 64          # of a frame by a tunnel, a tag and a fragment header
    MIN_MTU6 = 1280          # RFC 8200 section 5: no sender goes below
    MIN_FRAME_PAYLOAD = 32   # bytes behind the headers where an MTU cuts a packet; below TCP's least
    MAX_SEGMENTS = 2048      # of a packet; cut to fragments as well, at most 4,096 frames (MIN_FRAME_PAYLOAD)
    OPTION_COPIED = 0x80     # RFC 791 section 3.1: such options are in every fragment


cdef struct Cutter:
    const Packet *packet
    uint32_t headers         # bytes of the last frame's; an IPv6 fragment's are longer than what is copied
    uint32_t start           # of the packet's payload, from its frame's beginning
    uint32_t at              # where the payload begins that no segment has yet
    uint32_t end
    uint32_t segments        # so far
    uint32_t frames
    uint32_t ip              # where the header is that each fragment has, and its end
    uint32_t fixed
    uint32_t offset          # of the next fragment in its segment, from `fixed` on
    uint32_t length          # of the segment, from there on; `inside` bytes of it are headers
    uint32_t inside
    const uint8_t *payload   # of the segment
    uint8_t segment[MAX_HEADERS]  # its headers


# --- what may be cut, and how ----------------------------------------------------------------------------------------

cdef inline uint8_t gso_kind(const Packet *p) noexcept nogil:
    """Return which kind of GSO packet it is; 0 if it is none."""
    return p.vnet.gso_type & ~<uint8_t>GSO_ECN


cdef inline bint may_be_fragmented(const Packet *p) noexcept nogil:
    return p.family == FAMILY_4 and not p.frame[p.l3 + IP4_FRAG] & IP4_DF


cdef inline bint is_promised(const Packet *p) noexcept nogil:
    """True for a packet, or segments of a GSO packet, of a size that passes everywhere, so that no sender goes below
    it."""
    return p.family != FAMILY_4 and fits(p, MIN_MTU6)


cdef inline bint is_divisible(const Packet *p, uint32_t size) noexcept nogil:
    """True for a GSO packet of a kind that can be cut here to segments of this size, with headers that can be
    copied."""
    cdef uint8_t kind = gso_kind(p)
    if (kind != GSO_TCP4 and kind != GSO_TCP6 and kind != GSO_UDP) or p.l3_length > size * MAX_SEGMENTS:
        return False
    if p.fragment != FRAGMENT_NONE or p.quoted:
        return False
    return p.l4 + p.l4_header <= MAX_HEADERS - MAX_GROWTH


cdef inline bint cut_to(Packet *p, uint32_t mtu) noexcept nogil:
    """Let the packet leave in frames of at most `mtu` bytes: fragments, or shorter TCP segments than it asks for.

    Fragments are of IPv4 only. False if so narrow a link would make the frames too many, or the headers are too long.
    """
    cdef uint8_t kind = gso_kind(p)
    cdef bint fragmented = kind == 0 or kind == GSO_UDP
    cdef uint32_t header = (p.frame[p.l3] & 0x0F) * 4 if fragmented else <uint32_t>(p.l4 - p.l3) + p.l4_header
    cdef uint32_t size = p.l3_length if kind == 0 else (p.vnet.gso_size if fragmented else mtu - header)
    must(not fragmented or may_be_fragmented(p))
    if mtu < header + MIN_FRAME_PAYLOAD or (kind != 0 and not is_divisible(p, size)):
        return False
    if kind == 0:
        complete_checksum(p)
    p.segment_size = size
    p.fragment_size = (mtu - header) & ~<uint32_t>7 if fragmented else 0     # RFC 791: offsets count eight bytes
    return True


cdef inline uint32_t max_frames(const Packet *p) noexcept nogil:
    """Return a bound on how many frames the packet leaves in."""
    cdef uint32_t segments
    if p.segment_size == 0:
        return 1
    segments = (p.l3_length - 1) // p.segment_size + 1
    return segments * (min(p.segment_size, p.l3_length) // p.fragment_size + 2) if p.fragment_size else segments


cdef inline bint cut_segment(Packet *p, uint32_t mtu) noexcept nogil:
    """Let TCP data that came in too long segments leave in shorter ones: the stream is the same.

    False for what is not that, or damaged: each segment gets a checksum of its own, which must not heal anything.
    """
    cdef uint8_t before = p.vnet.gso_type
    if p.protocol != PROTO_TCP or p.quoted or p.fragment != FRAGMENT_NONE:
        return False
    if p.tcp_flags & (TCP_SYN | TCP_RST | TCP_URG) or (before == 0 and not has_sound_checksum(p)):
        return False
    if before == 0:
        p.vnet.gso_type = GSO_TCP4 if p.family == FAMILY_4 else GSO_TCP6
    if gso_kind(p) != GSO_UDP and cut_to(p, mtu):
        return True
    p.vnet.gso_type = before
    return False


cdef inline bint has_sound_checksum(const Packet *p) noexcept nogil:
    """True if the checksum of a TCP segment is right, or left to the device."""
    cdef uint32_t length = p.l3_length - (p.l4 - p.l3)
    cdef uint64_t total = pseudo_sum(p.frame + p.l3, PROTO_TCP, length) + sum_bytes(p.frame + p.l4, length)
    return p.vnet.flags & VNET_NEEDS_CSUM or fold(total) == 0xFFFF


# --- cutting ---------------------------------------------------------------------------------------------------------

cdef inline bint splits_outer(const Packet *p) noexcept nogil:
    """True if the tunnel's packet is fragmented. The one inside can be only in IPv4: see `cut_to`."""
    return p.fragment_size != 0 and p.family != FAMILY_4


cdef inline void start_cutting(Cutter *cutter, const Packet *p) noexcept nogil:
    """Begin with the first frame of a packet that has a `segment_size`."""
    cutter.packet = p
    cutter.ip = p.l3 - p.outer if splits_outer(p) else p.l3
    cutter.fixed = cutter.ip + ((p.frame[cutter.ip] & 0x0F) * 4 if p.frame[cutter.ip] >> 4 == 4 else IP6_LEN)
    cutter.start = cutter.fixed if p.vnet.gso_type == 0 else <uint32_t>p.l4 + p.l4_header
    cutter.at = cutter.start
    cutter.end = p.l3 + p.l3_length
    cutter.segments = cutter.frames = 0
    cutter.inside = cutter.start - cutter.fixed
    cutter.offset = cutter.length = 0
    must(p.segment_size > 0 and cutter.fixed <= cutter.start and cutter.start + IP6_FRAG_LEN <= MAX_HEADERS)
    must(cutter.end <= p.length and (p.fragment_size == 0 or p.fragment_size > cutter.inside))


cdef inline uint32_t next_frame(Cutter *cutter, uint8_t *headers, const uint8_t **payload) noexcept nogil:
    """Write the next frame's headers (`cutter.headers` bytes). Returns the length of its payload, 0 if there is no
    more."""
    cdef uint32_t length
    if cutter.packet.fragment_size:
        length = next_fragment(cutter, headers, payload)
    else:
        length = next_segment(cutter, headers, payload)
    cutter.frames += 1
    return length


cdef inline uint32_t next_segment(Cutter *cutter, uint8_t *headers, const uint8_t **payload) noexcept nogil:
    cdef const Packet *p = cutter.packet
    cdef uint32_t length = min(p.segment_size, cutter.end - cutter.at)
    cdef uint64_t payload_sum
    if length == 0:
        return 0
    payload[0] = p.frame + cutter.at
    memcpy(headers, p.frame, cutter.start)
    cutter.headers = cutter.start
    if p.vnet.gso_type:
        payload_sum = sum_bytes(payload[0], length)
        mend_segment(cutter, headers, length, payload_sum)
        if p.outer and (p.fragment_size == 0 or splits_outer(p)):
            mend_outer(cutter, headers, length, payload_sum, cutter.segments)
    cutter.at += length
    cutter.segments += 1
    return length


cdef inline uint32_t next_fragment(Cutter *cutter, uint8_t *headers, const uint8_t **payload) noexcept nogil:
    """Write the next fragment's headers. The first one of a segment has all of its headers, and some payload behind
    them."""
    cdef const Packet *p = cutter.packet
    cdef uint32_t offset, length
    if cutter.offset == cutter.length and not next_to_fragment(cutter):
        return 0
    offset = cutter.offset
    length = min(p.fragment_size, cutter.length - offset)
    memcpy(headers, cutter.segment, cutter.fixed)
    cutter.headers = cutter.fixed
    if headers[cutter.ip] >> 4 == 4:
        mend_fragment(headers + cutter.ip, offset, length, offset + length < cutter.length)
    elif length < cutter.length:                         # RFC 8021: none for a whole packet
        write_fragment_header(cutter, headers + cutter.ip, offset, length)
        cutter.headers += IP6_FRAG_LEN
    cutter.offset += length
    payload[0] = cutter.payload + offset - cutter.inside
    if offset == 0:
        memcpy(headers + cutter.headers, cutter.segment + cutter.fixed, cutter.inside)
        cutter.headers += cutter.inside
        payload[0] = cutter.payload
        length -= cutter.inside
    if p.outer and not splits_outer(p):
        mend_outer(cutter, headers, length, sum_bytes(payload[0], length) if p.summed else 0, cutter.frames)
    return length


cdef inline bint next_to_fragment(Cutter *cutter) noexcept nogil:
    """Take the next segment, whose first fragment is next then; False if there is none."""
    cdef uint32_t length = next_segment(cutter, cutter.segment, &cutter.payload)
    cutter.offset = 0
    cutter.length = cutter.inside + length if length else 0
    return length != 0


cdef inline void close_ip4(uint8_t *ip, uint32_t header) noexcept nogil:
    store16(ip + IP4_CSUM, 0)
    store16(ip + IP4_CSUM, <uint16_t>~fold(sum_bytes(ip, header)))


cdef inline void mend_fragment(uint8_t *ip, uint32_t offset, uint32_t length, bint more) noexcept nogil:
    """Correct the IPv4 header of a fragment (RFC 791 section 3.2). A packet that is a fragment itself can be cut
    again."""
    cdef uint32_t header = (ip[0] & 0x0F) * 4
    write_be16(ip + IP4_FRAG, <uint16_t>((read_be16(ip + IP4_FRAG) + offset // 8) | (IP4_MF if more else 0)))
    write_be16(ip + IP4_TOTAL, <uint16_t>(header + length))
    if offset:
        blank_options(ip + IP4_LEN, header - IP4_LEN)
    close_ip4(ip, header)


cdef inline void write_fragment_header(Cutter *cutter, uint8_t *ip, uint32_t offset, uint32_t length) noexcept nogil:
    """Write a Fragment header (RFC 8200 section 4.5). The packet has no extension headers, because it is a tunnel's."""
    cdef uint8_t *fragment = ip + IP6_LEN
    cdef bint more = offset + length < cutter.length
    fragment[0] = ip[IP6_NEXT]
    fragment[1] = 0
    write_be16(fragment + 2, <uint16_t>(offset + more))
    write_be32(fragment + 4, cutter.packet.datagram + cutter.segments - 1)
    ip[IP6_NEXT] = EXT_FRAGMENT
    write_be16(ip + IP6_PAYLOAD, <uint16_t>(IP6_FRAG_LEN + length))


cdef inline void blank_options(uint8_t *option, uint32_t left) noexcept nogil:
    """Replace options that only the first fragment has by padding. Bounded by the header's 40 bytes."""
    cdef uint32_t length, at
    while left and option[0] != OPTION_END:
        length = 1 if option[0] == OPTION_NOP else (option[1] if left > 1 else left)
        length = min(max(length, <uint32_t>1), left)
        if not option[0] & OPTION_COPIED:
            for at in range(length):
                option[at] = OPTION_NOP
        option += length
        left -= length


cdef inline void mend_segment(
        Cutter *cutter, uint8_t *headers, uint32_t length, uint64_t payload_sum) noexcept nogil:
    """Correct a segment's headers as the kernel's own segmentation does: IPv4 numbers count up, FIN and PSH go last,
    CWR first (RFC 3168)."""
    cdef const Packet *p = cutter.packet
    cdef uint8_t *ip = headers + p.l3
    cdef uint8_t *l4 = headers + p.l4
    cdef uint32_t whole = cutter.start - p.l3 + length
    cdef uint32_t transport = p.l4_header + length
    cdef uint64_t pseudo
    cdef uint16_t checksum
    if p.family == FAMILY_4:
        write_be16(ip + IP4_TOTAL, <uint16_t>whole)
        write_be16(ip + IP4_ID, <uint16_t>(read_be16(ip + IP4_ID) + cutter.segments))
        close_ip4(ip, p.l4 - p.l3)
    else:
        write_be16(ip + IP6_PAYLOAD, <uint16_t>(whole - IP6_LEN))
    pseudo = pseudo_sum(ip, p.protocol, transport) + payload_sum
    if p.protocol == PROTO_TCP:
        write_be32(l4 + TCP_SEQ, read_be32(l4 + TCP_SEQ) + cutter.at - cutter.start)
        if cutter.at + length < cutter.end:
            l4[TCP_FLAGS] &= ~<uint8_t>(TCP_FIN | TCP_PSH)
        if cutter.segments:
            l4[TCP_FLAGS] &= ~<uint8_t>TCP_CWR
        store16(l4 + TCP_CSUM, 0)
        store16(l4 + TCP_CSUM, <uint16_t>~fold(pseudo + sum_bytes(l4, p.l4_header)))
    else:
        write_be16(l4 + UDP_LENGTH, <uint16_t>transport)
        store16(l4 + UDP_CSUM, 0)
        checksum = <uint16_t>~fold(pseudo + sum_bytes(l4, p.l4_header))
        store16(l4 + UDP_CSUM, checksum if checksum != 0 else <uint16_t>0xFFFF)


cdef inline void mend_outer(
        Cutter *cutter, uint8_t *headers, uint32_t length, uint64_t payload_sum, uint32_t number) noexcept nogil:
    cdef const Packet *p = cutter.packet
    cdef uint8_t *outer = headers + p.l3 - p.outer
    cdef uint32_t inner_headers = cutter.headers - p.l3
    cdef uint64_t total = 0
    if outer[0] >> 4 == 4:
        write_be16(outer + IP4_ID, <uint16_t>(read_be16(outer + IP4_ID) + number))
    if p.summed:
        total = sum_bytes(headers + p.l3, inner_headers) + payload_sum
    close_outer(outer, p.outer, inner_headers + length, total, p.summed)
