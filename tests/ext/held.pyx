"""The worker's own loop over ordinary memory, where the test plays the kernel: it fills blocks, and it completes.

A block is filled at once, or as Linux does it (net/packet/af_packet.c): a slot is reserved, which links it, clears its
status and counts it; the frame is copied; one field after another is written. Nothing else of a slot's former contents
is cleared. Closing the block cuts the last slot's link.

One AF_XDP socket's rings lie in plain arrays. By default the kernel takes whatever is posted at once, and completes
nothing until it is told to; `stall` makes it take nothing.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fastlb._core cimport Pipeline
from fastlb.dataplane.abi cimport (
    TP_STATUS_KERNEL, TP_STATUS_USER, TP_STATUS_VLAN_TPID_VALID, TP_STATUS_VLAN_VALID, sockaddr_ll, tpacket3_hdr,
    tpacket_block_desc, xdp_desc)
from fastlb.dataplane.fragment cimport SETS, WAYS
from fastlb.dataplane.reasons cimport reason_name
from fastlb.dataplane.ring cimport RxRing, advance, init_ring, is_closed, next_slot, take_frame
from fastlb.dataplane.sendmmsg cimport init_messages
from fastlb.dataplane.transmit cimport MAX_XSKS
from fastlb.dataplane.types cimport VNET_HDR_LEN, Packet
from fastlb.dataplane.worker cimport WorkerState, read_rings, take_back
from fastlb.dataplane.xsk cimport XSK_READY, XSK_RING, Xsk

cdef enum:
    FIRST_SLOT = 48          # behind the block's own header
    MAC = 158                # of a frame in its slot, with HEADROOM and the virtio_net_hdr in front
    BEYOND = 128             # bytes behind the last block, where nobody may read: they would look like a frame


def claim_notes(Pipeline pipeline not None):
    """What a worker leaves that dies while it has a fragment's note; here it had all of them."""
    cdef int at
    for at in range(SETS * WAYS):
        pipeline.state.fragments.notes[at].claimed = 1


cdef class Worker:
    """Rings of ``blocks`` blocks each, side by side. ``counts``: where the counters of the socket start.

    Blocks are numbered through all rings; addresses are offsets in the memory of all of them.
    """

    cdef WorkerState *state
    cdef Pipeline pipeline
    cdef uint8_t *memory
    cdef uint32_t block_size
    cdef uint32_t shown[4]           # the shared counters: tx producer and consumer, completion producer and consumer
    cdef uint32_t seen               # descriptors that the test has looked at
    cdef dict last                   # the address of a block's last slot, by block

    def __cinit__(self, Pipeline pipeline not None, uint32_t rings, uint32_t blocks, uint32_t block_size,
                  uint32_t ifindex, int fd, uint32_t counts=0, bint open_blocks=False):
        cdef uint32_t i
        self.pipeline = pipeline
        self.last = {}
        self.memory = <uint8_t *>calloc(1, <size_t>rings * blocks * block_size + BEYOND)
        self.state = <WorkerState *>calloc(1, sizeof(WorkerState))
        if self.memory == NULL or self.state == NULL:
            raise MemoryError
        memset(self.memory + <size_t>rings * blocks * block_size, 0xFF, BEYOND)
        init_messages(&self.state.out.messages, -1, pipeline.state.reasons)
        self.state.pipe, self.state.publication = &pipeline.state, &pipeline.publication
        self.block_size = block_size
        self.state.out.memory, self.state.out.block_shift = self.memory, block_size.bit_length() - 1
        self.state.out.reasons = pipeline.state.reasons
        self.state.ring_count = rings
        for i in range(rings):
            init_ring(&self.state.rings[i], self.memory + <size_t>i * blocks * block_size, i * blocks, block_size,
                      blocks, open_blocks)
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

    def open_block(self, uint32_t at):
        """Turn to a block, which must be the kernel's."""
        cdef tpacket_block_desc *block = self.block(at)
        if block.hdr.bh1.block_status != TP_STATUS_KERNEL:
            raise ValueError(f"block {at} is the worker's")
        block.hdr.bh1.num_pkts = 0
        block.hdr.bh1.offset_to_first_pkt = block.hdr.bh1.blk_len = FIRST_SLOT
        self.last[at] = at * <uint64_t>self.block_size + FIRST_SLOT

    def reserve(self, uint32_t at, uint32_t length, tag=None):
        """The address of a slot for a frame of so many bytes in an open block; ``tag``: of a VLAN, (TPID, TCI)."""
        cdef tpacket_block_desc *block = self.block(at)
        cdef uint32_t size = (MAC + length + 7) & ~<uint32_t>7
        cdef uint64_t address = at * <uint64_t>self.block_size + block.hdr.bh1.blk_len
        cdef tpacket3_hdr *slot = <tpacket3_hdr *>(self.memory + address)
        if block.hdr.bh1.blk_len + size > self.block_size:
            raise ValueError("these frames are too long for a block")
        slot.tp_next_offset = size
        slot.tp_status = 0
        if tag is not None:
            slot.hv1.tp_vlan_tpid, slot.hv1.tp_vlan_tci = tag
            slot.tp_status = TP_STATUS_VLAN_VALID | TP_STATUS_VLAN_TPID_VALID
        block.hdr.bh1.blk_len += size
        block.hdr.bh1.num_pkts += 1
        self.last[at] = address
        return address

    def copy(self, uint64_t address, bytes offload, bytes frame):
        """The frame into its slot, with its virtio_net_hdr in front."""
        memcpy(self.memory + address + MAC - VNET_HDR_LEN, <const char *>offload, VNET_HDR_LEN)
        memcpy(self.memory + address + MAC, <const char *>frame, len(frame))

    def write(self, uint64_t address, str field, uint32_t value):
        """One field of a slot."""
        cdef tpacket3_hdr *slot = <tpacket3_hdr *>(self.memory + address)
        cdef sockaddr_ll *link = <sockaddr_ll *>(self.memory + address + sizeof(tpacket3_hdr))
        if field == "tp_status":
            slot.tp_status |= value
        elif field == "tp_len":
            slot.tp_len = value
        elif field == "tp_snaplen":
            slot.tp_snaplen = value
        elif field == "tp_mac":
            slot.tp_mac = <uint16_t>value
        elif field == "sll_ifindex":
            link.sll_ifindex = <int>value
        else:
            raise KeyError(field)

    def finish(self, uint64_t address, bytes offload, bytes frame, uint32_t whole=0):
        """Everything that is left of a slot. ``whole``: the length of a frame that was clamped to these bytes."""
        self.copy(address, offload, frame)
        self.write(address, "tp_status", TP_STATUS_USER)
        self.write(address, "tp_len", whole or len(frame))
        self.write(address, "tp_snaplen", len(frame))
        self.write(address, "tp_mac", MAC)
        self.write(address, "sll_ifindex", 1)

    def close_block(self, uint32_t at):
        """Hand a block over, full or not."""
        (<tpacket3_hdr *>(self.memory + <uint64_t>self.last[at])).tp_next_offset = 0
        self.block(at).hdr.bh1.block_status = TP_STATUS_USER

    def fill(self, uint32_t at, list frames):
        """Open a block and close it with these frames, each (virtio_net_hdr, bytes)."""
        self.open_block(at)
        for offload, frame in frames:
            self.finish(self.reserve(at, len(frame)), offload, frame)
        self.close_block(at)

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

    def looks_closed(self, uint32_t ring):
        """What a turn finds before it reads a ring, and keeps to until it has."""
        return is_closed(&self.state.rings[ring])

    def step(self, uint32_t ring, bint closed):
        """One slot as a turn takes it: the frame, the reason why there is none, or None when there is no slot."""
        cdef RxRing *read = &self.state.rings[ring]
        cdef tpacket3_hdr *slot = next_slot(read, closed)
        cdef Packet packet
        cdef int reason
        if slot == NULL:
            return None
        reason = take_frame(read, slot, &packet)
        advance(read, slot, closed)
        return (<bytes>reason_name(reason)).decode() if reason else packet.frame[:packet.length]

    def reads(self):
        """(frames taken early, blocks that were read to their end)"""
        return self.state.early, self.state.blocks_read

    def unwant(self):
        self.state.out.xsks[MAX_XSKS - 1].unwanted = 1

    def socket(self):
        """(state, error, frames in flight, those by block, frames that count as sent)"""
        cdef const Xsk *xsk = &self.state.out.xsks[MAX_XSKS - 1]
        cdef uint32_t i
        return (xsk.state, xsk.error, xsk.in_flight, [xsk.outstanding[i] for i in range(xsk.blocks)],
                self.state.out.posted)
