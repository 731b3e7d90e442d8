"""Which way a frame leaves: by AF_XDP from the ring's own memory where that can be, else by sendmmsg.

The order of frames is kept across the two ways: before one is used, whatever waits on the other is sent.

`Transmit.xsks` has a slot for each interface that a worker may send on. A slot's state says whose it is (xsk.pxd):
Python opens sockets and clears up after those that failed, the worker uses them and closes them when they fail.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastlb.dataplane.abi cimport ENODEV
from fastlb.dataplane.mode cimport MAX_OUTER
from fastlb.dataplane.machine cimport load_acquire_u32, unlikely
from fastlb.dataplane.reasons cimport DROP_TX_LINK_DOWN
from fastlb.dataplane.segments cimport gso_kind
from fastlb.dataplane.sendmmsg cimport (
    MessageQueue, enqueue, enqueue_frames, enqueue_joined, enqueue_offloaded, send_messages)
from fastlb.dataplane.types cimport FAMILY_4, GSO_TCP4, GSO_TCP6, GSO_UDP, PROTO_TCP, VNET_NEEDS_CSUM, Packet
from fastlb.dataplane.wire cimport ETH_LEN, MAX_IP, TCP_CSUM, UDP_CSUM
from fastlb.dataplane.xsk cimport (
    XSK_READY, Xsk, give_up, has_backlog, has_room, is_silent, post, push, reap, takes)


cdef enum:
    MAX_XSKS = 16
    MAX_OFFLOADS = 16


cdef struct Transmit:
    MessageQueue messages
    Xsk xsks[MAX_XSKS]
    const uint8_t *memory    # of the worker's rings, which every socket has registered
    uint64_t *reasons        # the pipeline's counters: a frame that cannot leave is a drop
    uint64_t offloaded       # GSO packets in tunnels that the kernel cuts
    uint64_t posted          # frames that left by AF_XDP
    uint64_t posted_bytes    # with those of frames that were lost after all: nobody knows their lengths any more
    uint32_t offloads[MAX_OFFLOADS]  # interfaces behind which GSO packets in tunnels are cut (tunnel_offload.py)
    uint32_t block_shift     # a block is 2**block_shift bytes
    uint32_t now             # milliseconds
    bint waiting             # frames are posted that the kernel has not been told of


cdef inline Xsk *xsk_of(Transmit *out, uint32_t ifindex) noexcept nogil:
    """Return the socket that sends on an interface; NULL if there is none."""
    cdef int i
    for i in range(MAX_XSKS):
        if out.xsks[i].ifindex == ifindex and load_acquire_u32(&out.xsks[i].state) == XSK_READY:
            return &out.xsks[i]
    return NULL


cdef inline void count_lost(Transmit *out, uint32_t frames) noexcept nogil:
    out.reasons[<int>DROP_TX_LINK_DOWN] += frames
    out.posted -= frames


cdef inline void push_one(Transmit *out, Xsk *xsk) noexcept nogil:
    cdef uint32_t lost = push(xsk, out.block_shift, out.now)
    if unlikely(lost):
        count_lost(out, lost)


cdef inline void push_all(Transmit *out) noexcept nogil:
    cdef int i
    if not out.waiting:
        return
    out.waiting = False
    for i in range(MAX_XSKS):
        if load_acquire_u32(&out.xsks[i].state) == XSK_READY and out.xsks[i].in_flight:
            push_one(out, &out.xsks[i])


cdef inline void flush(Transmit *out) noexcept nogil:
    """Hand everything that waits to the kernel."""
    if out.messages.count:
        send_messages(&out.messages)
    push_all(out)


cdef inline Xsk *xsk_with_room(Transmit *out, const Packet *p) noexcept nogil:
    """Return the socket by which a frame can leave now; NULL if it leaves by sendmmsg."""
    cdef Xsk *xsk = xsk_of(out, p.out_ifindex)
    if xsk == NULL or not takes(xsk, p):
        return NULL
    if unlikely(not has_room(xsk)):
        push_one(out, xsk)
        if xsk_of(out, p.out_ifindex) != xsk or not has_room(xsk):  # its slot may be another's by now
            return NULL
    return xsk


cdef inline bint offloads_tunnels(const Transmit *out, uint32_t ifindex) noexcept nogil:
    cdef int i
    for i in range(MAX_OFFLOADS):
        if load_acquire_u32(&out.offloads[i]) == ifindex:
            return True
    return False


cdef inline bint is_offloadable(const Packet *p) noexcept nogil:
    """True for a GSO packet in a tunnel that the kernel can cut, too: its segments leave whole, its outer header can
    count its bytes, and nothing lies between that and the Ethernet header."""
    return (
        p.outer != 0 and p.vnet.gso_type != 0 and p.fragment_size == 0 and p.outer + p.l3_length <= MAX_IP
        and p.l3 - p.outer == ETH_LEN)


cdef inline bint has_sound_offloads(const Packet *p) noexcept nogil:
    """True for a GSO packet whose offloads fit its headers, as those of a sender on this machine need not. The egress
    program reads as many bytes as the longest outer headers have."""
    cdef uint8_t kind = gso_kind(p)
    if not p.vnet.flags & VNET_NEEDS_CSUM or p.vnet.csum_start != p.l4 or p.length < ETH_LEN + MAX_OUTER:
        return False
    if p.protocol == PROTO_TCP:
        return p.vnet.csum_offset == TCP_CSUM and kind == (GSO_TCP4 if p.family == FAMILY_4 else GSO_TCP6)
    return p.vnet.csum_offset == UDP_CSUM and kind == GSO_UDP


cdef inline void enqueue_cut(Transmit *out, Packet *p) noexcept nogil:
    """Queue what leaves in several frames: cut here, unless the kernel can.

    Where the outer header has no checksum, a GSO packet in a tunnel has its open checksums inside; a GSO packet of UDP
    has them outside.
    """
    if not is_offloadable(p) or not offloads_tunnels(out, p.out_ifindex):
        enqueue_frames(&out.messages, p)
    elif p.summed:
        enqueue_joined(&out.messages, p)
        out.offloaded += 1
    elif has_sound_offloads(p):
        enqueue_offloaded(&out.messages, p)
        out.offloaded += 1
    else:
        enqueue_frames(&out.messages, p)


cdef inline void transmit(Transmit *out, Packet *p) noexcept nogil:
    """Queue one frame; its memory stays in use until it is sent: see `block_is_free`."""
    cdef Xsk *xsk
    if unlikely(p.segment_size):
        push_all(out)
        enqueue_cut(out, p)
        return
    xsk = xsk_with_room(out, p)
    if unlikely(xsk == NULL):
        push_all(out)
        enqueue(&out.messages, p)
        return
    if unlikely(out.messages.count):
        send_messages(&out.messages)
    post(xsk, out.memory, out.block_shift, p, out.now)
    out.posted += 1
    out.posted_bytes += p.length
    out.waiting = True


cdef inline void send_outside_rings(Transmit *out, Packet *p) noexcept nogil:
    """Send a frame that does not lie in the rings, at once and after all that waits."""
    push_all(out)
    if p.segment_size:
        enqueue_cut(out, p)
    else:
        enqueue(&out.messages, p)
    send_messages(&out.messages)


cdef inline bint collect(Transmit *out, uint32_t now) noexcept nogil:
    """Take completions back and close sockets that went silent or are unwanted; True while anything is in flight."""
    cdef bint in_flight = False
    cdef int i
    out.now = now
    for i in range(MAX_XSKS):
        if load_acquire_u32(&out.xsks[i].state) == XSK_READY:
            in_flight = attend_to(out, &out.xsks[i]) or in_flight
    return in_flight


cdef inline bint attend_to(Transmit *out, Xsk *xsk) noexcept nogil:
    """Do one socket's part of `collect`. What the kernel's full queue left behind is pushed again."""
    cdef uint32_t lost
    if xsk.in_flight:
        reap(xsk, out.block_shift, out.now)
        if unlikely(has_backlog(xsk)):
            push_one(out, xsk)
    if unlikely(is_silent(xsk, out.now) or load_acquire_u32(&xsk.unwanted)):
        lost = xsk.in_flight
        give_up(xsk, ENODEV if xsk.unwanted else 0)
        count_lost(out, lost)
    return xsk.in_flight != 0


cdef inline bint block_is_free(Transmit *out, uint32_t block) noexcept nogil:
    """True if every frame of this block has left. sendmmsg copies, so only sockets in flight matter."""
    cdef int i
    for i in range(MAX_XSKS):
        if out.xsks[i].in_flight and out.xsks[i].outstanding[block]:
            return False
    return True
