"""The worker's own loop over ordinary memory, where the test plays the kernel: it fills blocks, and it completes.

One AF_XDP socket's rings lie in plain arrays. By default the kernel takes whatever is posted at once, and completes
nothing until it is told to; `stall` makes it take nothing.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fastlb._core cimport Pipeline
from fastlb.dataplane.abi cimport TP_STATUS_KERNEL, TP_STATUS_USER, tpacket3_hdr, tpacket_block_desc, xdp_desc
from fastlb.dataplane.ring cimport init_ring
from fastlb.dataplane.sendmmsg cimport init_messages
from fastlb.dataplane.transmit cimport MAX_XSKS
from fastlb.dataplane.types cimport VNET_HDR_LEN
from fastlb.dataplane.worker cimport WorkerState, read_rings, take_back
from fastlb.dataplane.xsk cimport XSK_READY, XSK_RING, Xsk

cdef enum:
    FIRST_SLOT = 48          # behind the block's own header
    MAC = 168                # of a frame in its slot, with HEADROOM in front


cdef class Worker:
    """Rings of ``blocks`` blocks each, side by side. ``counts``: where the counters of the socket start."""

    cdef WorkerState *state
    cdef Pipeline pipeline
    cdef uint8_t *memory
    cdef uint32_t block_size
    cdef uint32_t shown[4]           # the shared counters: tx producer and consumer, completion producer and consumer
    cdef uint32_t seen               # descriptors that the test has looked at

    def __cinit__(self, Pipeline pipeline not None, uint32_t rings, uint32_t blocks, uint32_t block_size,
                  uint32_t ifindex, int fd, uint32_t counts=0):
        cdef uint32_t i
        self.pipeline = pipeline
        self.memory = <uint8_t *>calloc(rings * blocks, block_size)
        self.state = <WorkerState *>calloc(1, sizeof(WorkerState))
        if self.memory == NULL or self.state == NULL:
            raise MemoryError
        init_messages(&self.state.out.messages, -1, pipeline.state.reasons)
        self.state.pipe, self.state.publication = &pipeline.state, &pipeline.publication
        self.block_size = block_size
        self.state.out.memory, self.state.out.block_shift = self.memory, block_size.bit_length() - 1
        self.state.out.reasons = pipeline.state.reasons
        self.state.ring_count = rings
        for i in range(rings):
            init_ring(&self.state.rings[i], self.memory + <size_t>i * blocks * block_size, i * blocks, block_size,
                      blocks, False)
        self.open(ifindex, fd, counts, rings * blocks)

    cdef int open(self, uint32_t ifindex, int fd, uint32_t counts, uint32_t blocks) except -1:
        cdef Xsk *xsk = &self.state.out.xsks[MAX_XSKS - 1]
        cdef uint32_t i
        for i in range(4):
            self.shown[i] = counts
        self.seen = counts
        xsk.tx.entries = calloc(XSK_RING, sizeof(xdp_desc))
        xsk.completions.entries = calloc(XSK_RING, sizeof(uint64_t))
        xsk.outstanding = <uint32_t *>calloc(blocks, sizeof(uint32_t))
        if xsk.tx.entries == NULL or xsk.completions.entries == NULL or xsk.outstanding == NULL:
            raise MemoryError
        xsk.tx.producer = xsk.tx.consumer = &self.shown[0]
        xsk.completions.producer, xsk.completions.consumer = &self.shown[2], &self.shown[3]
        xsk.blocks, xsk.producer, xsk.ifindex, xsk.fd = blocks, counts, ifindex, fd
        xsk.with_metadata = True
        xsk.state = XSK_READY
        return 0

    def __dealloc__(self):
        if self.state != NULL:
            free(self.state.out.xsks[MAX_XSKS - 1].tx.entries)
            free(self.state.out.xsks[MAX_XSKS - 1].completions.entries)
            free(self.state.out.xsks[MAX_XSKS - 1].outstanding)
        free(self.state)
        free(self.memory)

    cdef tpacket_block_desc *block(self, uint32_t at) noexcept:
        return <tpacket_block_desc *>(self.memory + <size_t>at * self.block_size)

    # --- the kernel's part -----------------------------------------------------------------------------------------

    def fill(self, uint32_t at, list frames):
        """Close a block with these frames, each (virtio_net_hdr, bytes); it must be the kernel's."""
        cdef tpacket_block_desc *block = self.block(at)
        cdef uint8_t *slot = <uint8_t *>block + FIRST_SLOT
        if block.hdr.bh1.block_status != TP_STATUS_KERNEL:
            raise ValueError(f"block {at} is the worker's")
        for offload, frame in frames:
            slot = write_slot(slot, offload, frame)
        if slot > <uint8_t *>block + self.block_size:
            raise ValueError("these frames are too long for a block")
        block.hdr.bh1.num_pkts = len(frames)
        block.hdr.bh1.offset_to_first_pkt = FIRST_SLOT
        block.hdr.bh1.block_status = TP_STATUS_USER

    def mine(self):
        """The numbers of the blocks that are the worker's."""
        cdef uint32_t i
        return [i for i in range(self.state.out.xsks[MAX_XSKS - 1].blocks)
                if self.block(i).hdr.bh1.block_status != TP_STATUS_KERNEL]

    def posted(self):
        """What was shown to the kernel since the last call: (address, length, options) of each descriptor."""
        cdef const xdp_desc *ring = <const xdp_desc *>self.state.out.xsks[MAX_XSKS - 1].tx.entries
        cdef const xdp_desc *desc
        found = []
        while self.seen != self.shown[0]:
            desc = &ring[self.seen % XSK_RING]
            found.append((desc.addr, desc.len, desc.options))
            self.seen = self.seen + 1
        return found

    def bytes_at(self, uint64_t address, uint32_t length):
        return (<const char *>self.memory)[address:address + length]

    def complete(self, addresses):
        """Say that these were sent, in this order."""
        cdef uint64_t *ring = <uint64_t *>self.state.out.xsks[MAX_XSKS - 1].completions.entries
        for address in addresses:
            ring[self.shown[2] % XSK_RING] = address
            self.shown[2] = self.shown[2] + 1

    def stall(self):
        """Take nothing any more: a kick goes to the socket's descriptor, and the consumer stays where it is."""
        self.shown[1] = self.shown[0]
        self.state.out.xsks[MAX_XSKS - 1].tx.consumer = &self.shown[1]

    def resume(self):
        self.state.out.xsks[MAX_XSKS - 1].tx.consumer = &self.shown[0]

    # --- the worker's part -----------------------------------------------------------------------------------------

    def turn(self, uint32_t now):
        """One turn of the worker's loop; whether it found a block to read."""
        take_back(self.state, now)
        return read_rings(self.state, now)

    def take_back(self, uint32_t now):
        """The turn's first half alone; whether frames are on their way out."""
        return take_back(self.state, now)

    def unwant(self):
        self.state.out.xsks[MAX_XSKS - 1].unwanted = 1

    def socket(self):
        """(state, error, frames in flight, those by block, frames that count as sent)"""
        cdef const Xsk *xsk = &self.state.out.xsks[MAX_XSKS - 1]
        cdef uint32_t i
        return (xsk.state, xsk.error, xsk.in_flight, [xsk.outstanding[i] for i in range(xsk.blocks)],
                self.state.out.posted)


cdef uint8_t *write_slot(uint8_t *slot, bytes offload, bytes frame):
    cdef tpacket3_hdr *header = <tpacket3_hdr *>slot
    cdef uint32_t length = len(frame)
    memset(slot, 0, MAC)
    header.tp_mac = MAC
    header.tp_len = header.tp_snaplen = length
    header.tp_status = TP_STATUS_USER
    header.tp_next_offset = (MAC + length + 15) // 16 * 16
    memcpy(slot + MAC - VNET_HDR_LEN, <const char *>offload, VNET_HDR_LEN)
    memcpy(slot + MAC, <const char *>frame, length)
    return slot + header.tp_next_offset
