"""The receive ring: TPACKET_V3 blocks shared with the kernel.

Invariant: a block belongs to the user from `user_may_read` until `kernel_may_refill`, and to the kernel otherwise.
Frames are read, rewritten and transmitted where they lie, so a block goes back only after its last frame has left.
Blocks that were read and still wait for that are held; they go back in the order in which they came.

    frame slot   | tpacket3_hdr 48 | sockaddr_ll 20 | … headroom … | virtio_net_hdr 10 | Ethernet frame …
                                                                                       ^ tp_mac
HEADROOM (PACKET_RESERVE) leaves room in front of a frame for a VLAN tag, or an ICMP error's headers, and the moved
virtio_net_hdr; and it keeps IP headers aligned.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastlb.dataplane.abi cimport (
    TP_STATUS_KERNEL, TP_STATUS_USER, TP_STATUS_VLAN_TPID_VALID, TP_STATUS_VLAN_VALID, tpacket3_hdr,
    tpacket_block_desc)
from fastlb.dataplane.machine cimport load_acquire_u32, prefetch, store_release_u32, unlikely
from fastlb.dataplane.reasons cimport DROP_RING_CLAMPED, DROP_RING_HOLE
from fastlb.dataplane.types cimport VNET_HDR_LEN, Packet
from fastlb.dataplane.wire cimport ETHERTYPE_VLAN


cdef enum:
    HEADROOM = 66


cdef struct RxRing:
    uint8_t *memory
    uint32_t block_size
    uint32_t blocks
    uint32_t first           # of its blocks, in the worker's memory, where rings lie side by side
    uint32_t current         # the next block to read
    uint32_t oldest          # the held block that was read first
    uint32_t held
    uint32_t ifindex
    int fd


cdef inline tpacket_block_desc *current_block(RxRing *ring) noexcept nogil:
    return <tpacket_block_desc *>(ring.memory + <uint64_t>ring.current * ring.block_size)


cdef inline bint user_may_read(RxRing *ring) noexcept nogil:
    """Not when every block is held: then the current one is the oldest, and has been read."""
    return (ring.held < ring.blocks
            and load_acquire_u32(&current_block(ring).hdr.bh1.block_status) & TP_STATUS_USER != 0)


cdef inline void hold_block(RxRing *ring) noexcept nogil:
    """The current block has been read; go on to the next."""
    ring.held += 1
    ring.current = ring.current + 1 if ring.current + 1 < ring.blocks else 0


cdef inline void kernel_may_refill(RxRing *ring) noexcept nogil:
    """Give the oldest held block back."""
    cdef tpacket_block_desc *block = <tpacket_block_desc *>(ring.memory + <uint64_t>ring.oldest * ring.block_size)
    store_release_u32(&block.hdr.bh1.block_status, TP_STATUS_KERNEL)
    ring.held -= 1
    ring.oldest = ring.oldest + 1 if ring.oldest + 1 < ring.blocks else 0


cdef inline tpacket3_hdr *first_frame(tpacket_block_desc *block) noexcept nogil:
    return <tpacket3_hdr *>(<uint8_t *>block + block.hdr.bh1.offset_to_first_pkt)


cdef inline tpacket3_hdr *frame_after(tpacket3_hdr *slot) noexcept nogil:
    """Valid for holes too: the kernel links a slot when it reserves it. The next slot's first lines are prefetched."""
    cdef uint8_t *following = <uint8_t *>slot + slot.tp_next_offset
    prefetch(following + slot.tp_next_offset)
    prefetch(following + slot.tp_next_offset + 3 * 64)
    return <tpacket3_hdr *>following


cdef inline int take_frame(const RxRing *ring, tpacket3_hdr *slot, Packet *p) noexcept nogil:
    """Describe the frame in a slot as a packet: 0, or the reason why there is nothing to process."""
    if unlikely(not slot.tp_status & TP_STATUS_USER):
        return DROP_RING_HOLE
    if unlikely(slot.tp_snaplen != slot.tp_len):
        return DROP_RING_CLAMPED
    p.frame = <uint8_t *>slot + slot.tp_mac
    p.length = slot.tp_snaplen
    p.ifindex = ring.ifindex
    memcpy(&p.vnet, p.frame - VNET_HDR_LEN, VNET_HDR_LEN)
    p.vlan_tpid = 0
    if unlikely(slot.tp_status & TP_STATUS_VLAN_VALID):
        p.vlan_tci = <uint16_t>slot.hv1.tp_vlan_tci
        p.vlan_tpid = slot.hv1.tp_vlan_tpid if slot.tp_status & TP_STATUS_VLAN_TPID_VALID else ETHERTYPE_VLAN
    return 0
