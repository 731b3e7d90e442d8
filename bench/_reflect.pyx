"""The least that a forwarder over a TPACKET_V3 ring can do: new MAC addresses, and out by sendmmsg. The yardstick.

Frames leave from the ring's memory with the virtio_net_hdr that they came with. Nothing is parsed, looked up or
counted, and none of fastlb's own ring or transmit code is used: only its declarations of kernel structures.
"""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from fastlb.dataplane.abi cimport (
    MSG_DONTWAIT, POLLIN, TP_STATUS_KERNEL, TP_STATUS_USER, iovec, mmsghdr, poll, pollfd, sendmmsg, tpacket3_hdr,
    tpacket_block_desc)
from fastlb.dataplane.machine cimport load_acquire_u32, store_release_u32


cdef enum:
    SIDES = 2
    MESSAGES = 64
    VNET_HDR = 10
    MACS = 12
    IDLE_MS = 50


cdef struct Side:
    uint8_t *ring
    uint32_t block_size
    uint32_t blocks
    uint32_t current
    int way_out              # a packet socket bound to the other interface
    uint8_t macs[MACS]       # the next hop's and our own over there
    mmsghdr messages[MESSAGES]
    iovec frames[MESSAGES]
    uint32_t count


cdef void flush(Side *side) noexcept nogil:
    """What the kernel does not take at once is lost, as on a wire."""
    cdef uint32_t done = 0
    cdef int sent
    while done < side.count:
        sent = sendmmsg(side.way_out, &side.messages[done], side.count - done, MSG_DONTWAIT)
        done += sent if sent > 0 else 1
    side.count = 0


cdef void reflect(Side *side, tpacket3_hdr *slot) noexcept nogil:
    cdef uint8_t *frame = <uint8_t *>slot + slot.tp_mac
    if not slot.tp_status & TP_STATUS_USER or slot.tp_snaplen != slot.tp_len:
        return
    memcpy(frame, side.macs, MACS)
    side.frames[side.count].iov_base = frame - VNET_HDR
    side.frames[side.count].iov_len = slot.tp_snaplen + VNET_HDR
    side.count += 1
    if side.count == MESSAGES:
        flush(side)


cdef bint read_block(Side *side) noexcept nogil:
    """Reflect all of the current block and give it back; False when it is not ours yet."""
    cdef tpacket_block_desc *block = <tpacket_block_desc *>(side.ring + <size_t>side.current * side.block_size)
    cdef tpacket3_hdr *slot
    cdef uint32_t _
    if not load_acquire_u32(&block.hdr.bh1.block_status) & TP_STATUS_USER:
        return False
    slot = <tpacket3_hdr *>(<uint8_t *>block + block.hdr.bh1.offset_to_first_pkt)
    for _ in range(block.hdr.bh1.num_pkts):
        reflect(side, slot)
        slot = <tpacket3_hdr *>(<uint8_t *>slot + slot.tp_next_offset)
    flush(side)
    store_release_u32(&block.hdr.bh1.block_status, TP_STATUS_KERNEL)
    side.current = (side.current + 1) % side.blocks
    return True


cdef class Reflector:
    """Two rings, each reflected out of the other's interface.

    ``sides``: for each ring its (address in memory, socket, socket to send from, MACs of the frames that leave), where
    the MACs are the next hop's and our own, twelve bytes.
    """

    cdef Side *sides
    cdef pollfd fds[SIDES]
    cdef uint32_t stopping

    def __cinit__(self, sides, uint32_t block_size, uint32_t blocks):
        cdef Side *side
        cdef uintptr_t ring
        cdef bytes macs
        self.sides = <Side *>calloc(SIDES, sizeof(Side))
        if self.sides == NULL:
            raise MemoryError
        for i, (address, way_in, way_out, macs) in enumerate(sides):
            side = &self.sides[<int>i]
            ring = address
            side.ring = <uint8_t *>ring
            side.block_size, side.blocks, side.way_out = block_size, blocks, way_out
            memcpy(side.macs, <const char *>macs, MACS)
            for message in range(MESSAGES):
                side.messages[<int>message].msg_hdr.msg_iov = &side.frames[<int>message]
                side.messages[<int>message].msg_hdr.msg_iovlen = 1
            self.fds[<int>i].fd = way_in
            self.fds[<int>i].events = POLLIN

    def run(self):
        """Reflect until another thread calls ``stop``."""
        with nogil:
            while not load_acquire_u32(&self.stopping):
                if not read_block(&self.sides[0]) | read_block(&self.sides[1]):
                    poll(self.fds, SIDES, IDLE_MS)

    def stop(self):
        store_release_u32(&self.stopping, 1)

    def __dealloc__(self):
        free(self.sides)
