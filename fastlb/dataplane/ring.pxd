"""The receive ring: TPACKET_V3 blocks shared with the kernel.

Invariant: a block belongs to the user from `is_closed` until `kernel_may_refill`, and to the kernel otherwise.
Frames are read, rewritten and transmitted where they lie, so a block goes back only after its last frame has left.
Blocks that were read and still wait for that are held; they go back in the order in which they came.

The kernel closes a block when it is full, or a millisecond after its first frame. Open blocks: with ``open_blocks``, a
frame is taken as soon as it is complete, while the kernel still fills the rest of its block. No document promises that
this works; the order in which Linux writes a slot makes it work on a processor that keeps the order of stores (x86-64),
and workers/selftest.py tries it at every start. What it rests on:

  - the next slot begins where a frame ends, rounded up to 8 bytes;
  - a slot's memory is zero before the kernel writes it, because a block's used bytes are zeroed before it goes back;
  - the kernel writes the frame first, then each of the fields that `is_complete` looks at.

A slot that is never completed (a hole) ends such reading until its block is closed.

    frame slot   | tpacket3_hdr 48 | sockaddr_ll 20 | … headroom … | virtio_net_hdr 10 | Ethernet frame …
                                                                                       ^ tp_mac
HEADROOM (PACKET_RESERVE) leaves room in front of a frame for a VLAN tag, or an ICMP error's headers, and the moved
virtio_net_hdr; and it keeps IP headers aligned.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastlb.dataplane.abi cimport (
    TP_STATUS_KERNEL, TP_STATUS_USER, TP_STATUS_VLAN_TPID_VALID, TP_STATUS_VLAN_VALID, sockaddr_ll, tpacket3_hdr,
    tpacket_block_desc)
from fastlb.dataplane.machine cimport (
    load_acquire_u16, load_acquire_u32, must, prefetch, store_release_u32, unlikely)
from fastlb.dataplane.reasons cimport DROP_RING_CLAMPED, DROP_RING_HOLE
from fastlb.dataplane.types cimport VNET_HDR_LEN, Packet
from fastlb.dataplane.wire cimport ETHERTYPE_VLAN


cdef enum:
    HEADROOM = 66
    BLOCK_HEADER = 48        # tpacket_block_desc: the first slot follows
    SLOT_HEADER = 68         # tpacket3_hdr and sockaddr_ll


cdef struct RxRing:
    uint8_t *memory
    uint32_t block_size
    uint32_t blocks
    uint32_t first           # of its blocks, in the worker's memory, where rings lie side by side
    uint32_t current         # the block that is being read, or comes next
    uint32_t next            # offset of the next slot in it
    uint32_t taken           # slots taken out of it
    uint32_t oldest          # the held block that was read first
    uint32_t held
    uint32_t ifindex
    bint open_blocks         # read them
    int fd


cdef inline void init_ring(
        RxRing *ring, uint8_t *memory, uint32_t first, uint32_t block_size, uint32_t blocks, bint open_blocks,
        ) noexcept nogil:
    ring.memory, ring.first, ring.block_size, ring.blocks = memory, first, block_size, blocks
    ring.next = BLOCK_HEADER
    ring.open_blocks = open_blocks


cdef inline tpacket_block_desc *current_block(RxRing *ring) noexcept nogil:
    return <tpacket_block_desc *>(ring.memory + <uint64_t>ring.current * ring.block_size)


cdef inline bint all_held(const RxRing *ring) noexcept nogil:
    """True if all blocks are held. Then the current block is the oldest, and has been read."""
    return ring.held == ring.blocks


cdef inline bint is_closed(RxRing *ring) noexcept nogil:
    """True if the current block is full, or its time over. The kernel no longer touches it then."""
    return load_acquire_u32(&current_block(ring).hdr.bh1.block_status) & TP_STATUS_USER != 0


cdef inline bint is_complete(RxRing *ring) noexcept nogil:
    """True if the kernel has written the whole next slot of an open block.

    Each field is read by itself: the kernel writes them in no order that matters, but all of them after the frame.
    """
    cdef tpacket3_hdr *slot = <tpacket3_hdr *>(<uint8_t *>current_block(ring) + ring.next)
    cdef sockaddr_ll *link = <sockaddr_ll *>(<uint8_t *>slot + sizeof(tpacket3_hdr))
    if unlikely(ring.next + SLOT_HEADER > ring.block_size):
        return False
    return (load_acquire_u32(&slot.tp_status) & TP_STATUS_USER and load_acquire_u32(&slot.tp_snaplen)
            and load_acquire_u32(&slot.tp_len) and load_acquire_u16(&slot.tp_mac)
            and load_acquire_u32(<uint32_t *>&link.sll_ifindex))


cdef inline bint has_frames(RxRing *ring) noexcept nogil:
    """True if there is a frame to take, or a closed block to finish with."""
    return not all_held(ring) and (is_closed(ring) or ring.open_blocks and is_complete(ring))


cdef inline tpacket3_hdr *next_slot(RxRing *ring, bint closed) noexcept nogil:
    """Return the next slot of the current block, a complete frame or a hole; NULL if there is none at the moment."""
    cdef tpacket_block_desc *block = current_block(ring)
    if closed:
        if ring.taken == block.hdr.bh1.num_pkts:
            return NULL
    elif not is_complete(ring):
        return NULL
    return <tpacket3_hdr *>(<uint8_t *>block + ring.next)


cdef inline void advance(RxRing *ring, tpacket3_hdr *slot, bint closed) noexcept nogil:
    """Move on to the next slot.

    In a closed block the kernel's own link leads on, past holes too; the slot that comes then is prefetched. In an open
    block that link may be cut while it is read.
    """
    cdef uint8_t *following
    ring.taken += 1
    if closed:
        ring.next += slot.tp_next_offset
        following = <uint8_t *>slot + 2 * <uint64_t>slot.tp_next_offset
        prefetch(following)
        prefetch(following + 3 * 64)
    else:
        ring.next += (slot.tp_mac + slot.tp_snaplen + 7) & ~<uint32_t>7


cdef inline void hold_block(RxRing *ring) noexcept nogil:
    """Hold the current block, which is closed and has been read; go on to the next."""
    must(not all_held(ring))
    ring.held += 1
    ring.current = ring.current + 1 if ring.current + 1 < ring.blocks else 0
    ring.next = BLOCK_HEADER
    ring.taken = 0


cdef inline void kernel_may_refill(RxRing *ring) noexcept nogil:
    """Give the oldest held block back, with its used bytes zeroed where open blocks are read."""
    cdef tpacket_block_desc *block = <tpacket_block_desc *>(ring.memory + <uint64_t>ring.oldest * ring.block_size)
    must(ring.held > 0)
    if ring.open_blocks and block.hdr.bh1.blk_len > BLOCK_HEADER:
        memset(<uint8_t *>block + BLOCK_HEADER, 0, block.hdr.bh1.blk_len - BLOCK_HEADER)
    store_release_u32(&block.hdr.bh1.block_status, TP_STATUS_KERNEL)
    ring.held -= 1
    ring.oldest = ring.oldest + 1 if ring.oldest + 1 < ring.blocks else 0


cdef inline int take_frame(const RxRing *ring, tpacket3_hdr *slot, Packet *p) noexcept nogil:
    """Describe the frame in a slot as a packet. Returns 0, or the reason why there is nothing to process."""
    if unlikely(not slot.tp_status & TP_STATUS_USER):
        return DROP_RING_HOLE
    if unlikely(slot.tp_snaplen != slot.tp_len):
        return DROP_RING_CLAMPED
    must(slot.tp_mac >= SLOT_HEADER + HEADROOM and ring.next + slot.tp_mac + slot.tp_snaplen <= ring.block_size)
    p.frame = <uint8_t *>slot + slot.tp_mac
    p.length = slot.tp_snaplen
    p.ifindex = ring.ifindex
    memcpy(&p.vnet, p.frame - VNET_HDR_LEN, VNET_HDR_LEN)
    p.vlan_tpid = 0
    if unlikely(slot.tp_status & TP_STATUS_VLAN_VALID):
        p.vlan_tci = <uint16_t>slot.hv1.tp_vlan_tci
        p.vlan_tpid = slot.hv1.tp_vlan_tpid if slot.tp_status & TP_STATUS_VLAN_TPID_VALID else ETHERTYPE_VLAN
    return 0
