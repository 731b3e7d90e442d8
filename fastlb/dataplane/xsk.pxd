"""AF_XDP transmit sockets whose memory is the receive rings themselves: a frame leaves from where it arrived.

The whole memory of the worker's rings is registered as one UMEM, which all of its sockets share; each is bound for
transmission only, in copy mode, without any XDP program.

Invariant: a descriptor's memory belongs to the kernel from `post` until its address comes back in the completion ring.
`outstanding` counts such descriptors by ring block; a block whose count is not 0 on every socket must not go back to
the receive ring.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from fastlb.dataplane.abi cimport (
    DESC_TX_METADATA, EAGAIN, EBUSY, EINTR, ENOBUFS, MSG_DONTWAIT, TXMD_CHECKSUM, close_descriptor, errno, sendto,
    tx_metadata, xdp_desc)
from fastlb.dataplane.machine cimport load_acquire_u32, store_release_u32, unlikely
from fastlb.dataplane.types cimport VNET_NEEDS_CSUM, Packet


cdef enum:
    XSK_RING = 2048          # descriptors, and completions
    XSK_CHUNK = 4096
    XSK_METADATA = 24        # in front of a frame, when its checksum is left to the device
    XSK_MAX_FRAME = XSK_CHUNK - XSK_METADATA  # longer ones are silently invalid once metadata is registered
    XSK_MAX_KICKS = 256      # a kick takes up to 32 frames, so this is four full rings
    XSK_SILENCE_MS = 10      # without one completion: the link is gone, though nobody said so


cdef enum XskState:
    XSK_OPEN = 0             # Python's: being set up, or taken down
    XSK_READY = 1            # the worker's
    XSK_FAILED = 2           # Python's again: closed by the worker


cdef struct XskRing:
    uint32_t *producer
    uint32_t *consumer
    void *entries
    void *memory             # of the mapping, to unmap it
    size_t length


cdef struct Xsk:
    XskRing tx
    XskRing completions
    uint32_t *outstanding    # by block of the worker's memory
    uint32_t blocks
    uint32_t in_flight       # the sum of `outstanding`
    uint32_t producer        # descriptors written, the last of them perhaps not yet shown to the kernel
    uint32_t progress        # milliseconds: the last completion, or the first post after none was in flight
    uint32_t ifindex
    uint32_t state
    uint32_t error           # errno that ended it, 0 for silence
    uint32_t unwanted        # set by Python: the worker shall close it
    int fd
    bint with_metadata


cdef inline bint takes(const Xsk *xsk, const Packet *p) noexcept nogil:
    """True if the frame can leave by AF_XDP: GSO packets and long frames cannot, open checksums only with metadata.

    The kernel answers a checksum outside its frame with an error for the whole socket, so that leaves by sendmmsg, too.
    """
    if p.vnet.gso_type != 0 or p.length > XSK_MAX_FRAME:
        return False
    return not p.vnet.flags & VNET_NEEDS_CSUM or (
        xsk.with_metadata and <uint32_t>p.vnet.csum_start + p.vnet.csum_offset + 2 <= p.length)


cdef inline bint has_room(const Xsk *xsk) noexcept nogil:
    """True if the transmit ring has room, and the completion ring, which has the same size, for everything in
    flight."""
    return xsk.in_flight < XSK_RING


cdef inline void reap(Xsk *xsk, uint32_t block_shift, uint32_t now) noexcept nogil:
    """Take back what the kernel has sent. Bounded by the completion ring."""
    cdef uint32_t consumer = xsk.completions.consumer[0]
    cdef uint32_t producer = load_acquire_u32(xsk.completions.producer)
    cdef const uint64_t *addresses = <const uint64_t *>xsk.completions.entries
    if consumer == producer:
        return
    xsk.in_flight -= producer - consumer
    xsk.progress = now
    while consumer != producer:
        xsk.outstanding[addresses[consumer & (XSK_RING - 1)] >> block_shift] -= 1
        consumer += 1
    store_release_u32(xsk.completions.consumer, consumer)


cdef inline void give_up(Xsk *xsk, uint32_t error) noexcept nogil:
    """Close the descriptor: nothing can be kicked any more, and Python may clear up and open another.

    The mapped rings keep the socket itself, and with it the interface's queue, until Python unmaps them.
    """
    close_descriptor(xsk.fd)
    memset(xsk.outstanding, 0, xsk.blocks * sizeof(uint32_t))
    xsk.in_flight = 0
    xsk.error = error
    store_release_u32(&xsk.state, XSK_FAILED)


cdef inline void post(Xsk *xsk, const uint8_t *memory, uint32_t block_shift, Packet *p, uint32_t now) noexcept nogil:
    """Describe one frame; the kernel sees it with the next `push`. There must be room."""
    cdef xdp_desc *desc = &(<xdp_desc *>xsk.tx.entries)[xsk.producer & (XSK_RING - 1)]
    cdef tx_metadata *metadata
    desc.addr = <uint64_t>(p.frame - memory)
    desc.len = p.length
    desc.options = 0
    if p.vnet.flags & VNET_NEEDS_CSUM:
        metadata = <tx_metadata *>(p.frame - XSK_METADATA)
        memset(metadata, 0, sizeof(tx_metadata))
        metadata.flags = TXMD_CHECKSUM
        metadata.csum_start = p.vnet.csum_start
        metadata.csum_offset = p.vnet.csum_offset
        desc.options = DESC_TX_METADATA
    if xsk.in_flight == 0:
        xsk.progress = now
    xsk.outstanding[desc.addr >> block_shift] += 1
    xsk.in_flight += 1
    xsk.producer += 1


cdef inline bint has_backlog(const Xsk *xsk) noexcept nogil:
    """True if anything is posted that the kernel has not taken."""
    return load_acquire_u32(xsk.tx.consumer) != xsk.producer


cdef inline uint32_t push(Xsk *xsk, uint32_t block_shift, uint32_t now) noexcept nogil:
    """Have the kernel send what was posted, until its queue is full. Returns how many frames were lost.

    EBUSY is one frame that the device did not take, for want of a carrier: it is complete, and not sent.
    """
    cdef uint32_t lost = 0
    cdef int kicks = 0
    store_release_u32(xsk.tx.producer, xsk.producer)
    while has_backlog(xsk) and kicks < XSK_MAX_KICKS:
        kicks += 1
        if sendto(xsk.fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0:
            if errno == EBUSY:
                lost += 1
            elif not passing(errno):
                lost += xsk.in_flight
                give_up(xsk, errno)
                return lost
        reap(xsk, block_shift, now)
    return lost


cdef inline bint passing(int error) noexcept nogil:
    """True for an error that will pass: more to send than one call takes, or a queue that is full for the moment."""
    return error == EAGAIN or error == ENOBUFS or error == EINTR


cdef inline bint is_silent(const Xsk *xsk, uint32_t now) noexcept nogil:
    """True if frames are in flight and nothing completes: a link that went down may stop without an error."""
    return xsk.in_flight != 0 and <int>(now - xsk.progress) > XSK_SILENCE_MS
