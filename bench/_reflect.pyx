"""The least that a forwarder over TPACKET_V3 rings can do: new MAC addresses, and out. The yardstick.

Nothing is parsed, looked up or counted, and none of fastlb's own ring or transmit code is used: only its declarations
of kernel structures. Three ways out, each as its manual has it, BATCH frames a system call:

    sendmmsg   iovecs into the receive ring; the frame goes with the virtio_net_hdr that it came with
    xdp        an AF_XDP socket whose UMEM is the receive ring itself
    tx_ring    a TPACKET_V2 transmit ring, into which the frame is copied

Invariant: a block goes back to the kernel when its last frame has left. sendmmsg and the transmit ring have copied a
frame by then; AF_XDP has put its address into the completion ring.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from fastlb.dataplane.abi cimport (
    MSG_DONTWAIT, POLLIN, TP_STATUS_KERNEL, TP_STATUS_USER, iovec, mmsghdr, poll, pollfd, sendmmsg, sendto,
    tpacket3_hdr, tpacket_block_desc, xdp_desc)
from fastlb.dataplane.machine cimport (
    load_acquire_u32, load_acquire_u64, prefetch, store_release_u32, store_release_u64)

cdef extern from "<linux/if_packet.h>" nogil:
    enum:
        TP_STATUS_AVAILABLE
        TP_STATUS_SEND_REQUEST

    struct tpacket2_hdr:
        uint32_t tp_status
        uint32_t tp_len
        uint32_t tp_snaplen

cdef extern from "<linux/if_xdp.h>" nogil:
    enum:
        XDP_RING_NEED_WAKEUP


cdef enum:
    SIDES = 2
    BATCH = 64
    VNET_HDR = 10
    MACS = 12
    SLOT_HEADER = 32         # from a transmit slot to its frame: tpacket2_hdr, aligned to 16
    IDLE_MS = 50


cdef enum WayOut:
    SENDMMSG = 0
    XDP = 1
    TX_RING = 2


cdef struct Side:
    uint8_t *ring
    uint32_t block_size
    uint32_t blocks
    uint32_t current
    uint8_t macs[MACS]       # the next hop's and our own over there
    WayOut way
    int out                  # the socket to send from
    uint32_t count           # frames since the last flush
    # sendmmsg
    mmsghdr messages[BATCH]
    iovec frames[BATCH]
    # xdp: what was posted and what was completed, each a number since the start
    xdp_desc *descriptors
    uint32_t descriptor_mask
    uint32_t *tx_producer
    uint32_t *tx_flags
    uint32_t *completed
    uint32_t *reaped
    uint32_t posted
    # tx_ring
    uint8_t *slots
    uint32_t slot_count
    uint32_t slot_size
    uint32_t slot


# --- three ways to queue a frame, and to send what is queued ---------------------------------------------------------


cdef inline void put_message(Side *side, uint8_t *frame, uint32_t length) noexcept nogil:
    side.frames[side.count].iov_base = frame - VNET_HDR
    side.frames[side.count].iov_len = length + VNET_HDR


cdef void send_messages(Side *side) noexcept nogil:
    """What the kernel does not take at once is lost, as on a wire."""
    cdef uint32_t done = 0
    cdef int sent
    while done < side.count:
        sent = sendmmsg(side.out, &side.messages[done], side.count - done, MSG_DONTWAIT)
        done += sent if sent > 0 else 1


cdef inline void put_descriptor(Side *side, uint8_t *frame, uint32_t length) noexcept nogil:
    cdef xdp_desc *desc = &side.descriptors[side.posted & side.descriptor_mask]
    desc.addr = <uint64_t>(frame - side.ring)
    desc.len = length
    desc.options = 0
    side.posted += 1


cdef void send_descriptors(Side *side, const uint32_t *stopping) noexcept nogil:
    """Until every completion is back: a system call takes fewer frames than a batch has."""
    store_release_u32(side.tx_producer, side.posted)
    while side.reaped[0] != side.posted and not load_acquire_u32(stopping):
        if load_acquire_u32(side.tx_flags) & XDP_RING_NEED_WAKEUP:
            sendto(side.out, NULL, 0, MSG_DONTWAIT, NULL, 0)
        store_release_u32(side.reaped, load_acquire_u32(side.completed))


cdef inline tpacket2_hdr *next_slot(Side *side) noexcept nogil:
    return <tpacket2_hdr *>(side.slots + <size_t>side.slot * side.slot_size)


cdef inline void put_slot(Side *side, uint8_t *frame, uint32_t length) noexcept nogil:
    """There is room for a batch: each is sent before the next begins. A frame that is too long is lost."""
    cdef tpacket2_hdr *slot = next_slot(side)
    if load_acquire_u32(&slot.tp_status) != TP_STATUS_AVAILABLE or length > side.slot_size - SLOT_HEADER:
        return
    memcpy(<uint8_t *>slot + SLOT_HEADER, frame, length)
    slot.tp_len = length
    store_release_u32(&slot.tp_status, TP_STATUS_SEND_REQUEST)
    side.slot = (side.slot + 1) % side.slot_count


cdef inline void put(Side *side, uint8_t *frame, uint32_t length) noexcept nogil:
    if side.way == XDP:
        put_descriptor(side, frame, length)
    elif side.way == SENDMMSG:
        put_message(side, frame, length)
    else:
        put_slot(side, frame, length)
    side.count += 1


cdef inline void flush(Side *side, const uint32_t *stopping) noexcept nogil:
    if side.way == XDP:
        send_descriptors(side, stopping)
    elif side.way == SENDMMSG:
        send_messages(side)
    else:
        sendto(side.out, NULL, 0, MSG_DONTWAIT, NULL, 0)
    side.count = 0


# --- the ring ---------------------------------------------------------------------------------------------------------


cdef inline void reflect(Side *side, tpacket3_hdr *slot) noexcept nogil:
    cdef uint8_t *frame = <uint8_t *>slot + slot.tp_mac
    if not slot.tp_status & TP_STATUS_USER or slot.tp_snaplen != slot.tp_len:
        return
    memcpy(frame, side.macs, MACS)
    put(side, frame, slot.tp_snaplen)


cdef inline uint32_t read_block(Side *side, const uint32_t *stopping) noexcept nogil:
    """Reflect all of the current block and give it back; how many frames it had, 0 when it is not ours yet."""
    cdef tpacket_block_desc *block = <tpacket_block_desc *>(side.ring + <size_t>side.current * side.block_size)
    cdef tpacket3_hdr *slot
    cdef uint32_t count, _
    if not load_acquire_u32(&block.hdr.bh1.block_status) & TP_STATUS_USER:
        return 0
    count = block.hdr.bh1.num_pkts
    slot = <tpacket3_hdr *>(<uint8_t *>block + block.hdr.bh1.offset_to_first_pkt)
    for _ in range(count):
        prefetch(<uint8_t *>slot + slot.tp_next_offset)
        prefetch(<uint8_t *>slot + slot.tp_next_offset + slot.tp_mac)
        reflect(side, slot)
        if side.count == BATCH:
            flush(side, stopping)
        slot = <tpacket3_hdr *>(<uint8_t *>slot + slot.tp_next_offset)
    if side.count:
        flush(side, stopping)
    store_release_u32(&block.hdr.bh1.block_status, TP_STATUS_KERNEL)
    side.current = (side.current + 1) % side.blocks
    return count


cdef class Reflector:
    """One or two rings, each reflected out of an interface of its own.

    ``sides``: of each ring (address in memory, its socket, block size, blocks, MACs of the frames that leave, way out),
    where the MACs are the next hop's and our own, twelve bytes, and the way out is one of

        ("sendmmsg", socket)
        ("xdp", socket, descriptors, how many, producer, flags, completions' producer, completions' consumer)
        ("tx_ring", socket, slots, how many, size of a slot)

    with addresses for all that lies in memory.
    """

    cdef Side *sides
    cdef uint32_t side_count
    cdef pollfd fds[SIDES]
    cdef uint64_t done
    cdef uint32_t stopping

    def __cinit__(self, sides):
        if not 0 < len(sides) <= SIDES:
            raise ValueError(f"a reflector has at most {SIDES} rings")
        self.sides = <Side *>calloc(SIDES, sizeof(Side))
        if self.sides == NULL:
            raise MemoryError
        for ring, way_in, block_size, blocks, macs, way_out in sides:
            self.fds[<int>self.side_count].fd = way_in
            self.fds[<int>self.side_count].events = POLLIN
            describe_ring(&self.sides[self.side_count], ring, block_size, blocks, macs)
            describe_way_out(&self.sides[self.side_count], way_out)
            self.side_count += 1

    def transmitted(self):
        """Frames of all blocks that were given back."""
        return load_acquire_u64(&self.done)

    def run(self):
        """Reflect until another thread calls ``stop``."""
        with nogil:
            while not load_acquire_u32(&self.stopping):
                if not self.read_rings():
                    poll(self.fds, self.side_count, IDLE_MS)

    cdef uint32_t read_rings(self) noexcept nogil:
        cdef uint32_t count = 0
        cdef uint32_t i
        for i in range(self.side_count):
            count += read_block(&self.sides[i], &self.stopping)
        store_release_u64(&self.done, self.done + count)
        return count

    def stop(self):
        store_release_u32(&self.stopping, 1)

    def __dealloc__(self):
        free(self.sides)


cdef int describe_ring(Side *side, uintptr_t ring, uint32_t block_size, uint32_t blocks, bytes macs) except -1:
    side.ring = <uint8_t *>ring
    side.block_size, side.blocks = block_size, blocks
    memcpy(side.macs, <const char *>macs, MACS)
    return 0


cdef int describe_way_out(Side *side, tuple way_out) except -1:
    cdef uintptr_t descriptors, producer, flags, completed, reaped, slots
    cdef str name
    name, side.out, *rest = way_out
    if name == "sendmmsg":
        side.way = SENDMMSG
        for message in range(BATCH):
            side.messages[<int>message].msg_hdr.msg_iov = &side.frames[<int>message]
            side.messages[<int>message].msg_hdr.msg_iovlen = 1
    elif name == "xdp":
        side.way = XDP
        descriptors, count, producer, flags, completed, reaped = rest
        side.descriptors, side.descriptor_mask = <xdp_desc *>descriptors, count - 1
        side.tx_producer, side.tx_flags = <uint32_t *>producer, <uint32_t *>flags
        side.completed, side.reaped = <uint32_t *>completed, <uint32_t *>reaped
    elif name == "tx_ring":
        side.way = TX_RING
        slots, side.slot_count, side.slot_size = rest
        side.slots = <uint8_t *>slots
    else:
        raise ValueError(f"no way out is called {name!r}")
    return 0
