"""The way out that always works: sendmmsg on one packet socket, with iovecs into the receive ring.

A message is a virtio_net_hdr and the frame behind it, so frames with an open checksum and GSO packets leave as they
came. Where a packet is cut (segments.pxd), a message is a frame's headers, which lie in the queue, and its payload,
which lies in the ring; or several of those. The kernel has copied a message when sendmmsg returns; the ring's block may
then go back.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastlb.dataplane.abi cimport (
    AF_PACKET, EAGAIN, EINTR, EMSGSIZE, ENETDOWN, ENOBUFS, ENODEV, ENXIO, MSG_DONTWAIT, errno, iovec, mmsghdr,
    sendmmsg, sockaddr_ll)
from fastlb.dataplane.encap cimport leave_checksum
from fastlb.dataplane.machine cimport load16, must, unlikely
from fastlb.dataplane.mode cimport GUE_LEN
from fastlb.dataplane.reasons cimport DROP_TX_ERROR, DROP_TX_FULL, DROP_TX_LINK_DOWN, DROP_TX_TOO_BIG
from fastlb.dataplane.segments cimport MAX_HEADERS, Cutter, next_frame, start_cutting
from fastlb.dataplane.types cimport GSO_UDP, VNET_HDR_LEN, VNET_NEEDS_CSUM, Packet, VnetHdr
from fastlb.dataplane.wire cimport ETHERTYPE_OFFLOAD, ETH_TYPE, MAX_IP, UDP_CSUM, UDP_LEN, write_be16


cdef enum:
    TX_BATCH = 64            # messages a call: beyond that the system call itself no longer shows


cdef struct MessageQueue:
    mmsghdr messages[TX_BATCH]
    iovec parts[TX_BATCH][2]  # the whole frame; or headers and payload, several of them if joined
    sockaddr_ll links[TX_BATCH]
    uint8_t headers[TX_BATCH][VNET_HDR_LEN + MAX_HEADERS]
    uint64_t *reasons        # the pipeline's counters: a frame that cannot leave is a drop
    uint64_t sent
    uint64_t sent_bytes
    int count
    int slots                # of parts and headers that the messages take: one for each frame
    int fd


cdef inline void init_messages(MessageQueue *queue, int fd, uint64_t *reasons) noexcept nogil:
    cdef int i
    memset(queue, 0, sizeof(MessageQueue))
    queue.fd = fd
    queue.reasons = reasons
    for i in range(TX_BATCH):
        queue.links[i].sll_family = AF_PACKET
        queue.links[i].sll_halen = 6
        queue.messages[i].msg_hdr.msg_name = &queue.links[i]
        queue.messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_ll)


cdef inline int reason_of_errno(int error) noexcept nogil:
    if error == EAGAIN or error == ENOBUFS:
        return DROP_TX_FULL
    if error == EMSGSIZE:
        return DROP_TX_TOO_BIG
    if error == ENETDOWN or error == ENXIO or error == ENODEV:
        return DROP_TX_LINK_DOWN
    return DROP_TX_ERROR


cdef inline void send_messages(MessageQueue *queue) noexcept nogil:
    """Hand everything queued to the kernel. A message that it refuses is counted and skipped; it is never retried."""
    cdef int done = 0
    cdef int sent, i
    while done < queue.count:
        sent = sendmmsg(queue.fd, &queue.messages[done], queue.count - done, MSG_DONTWAIT)
        if unlikely(sent <= 0):
            if errno == EINTR:
                continue
            queue.reasons[reason_of_errno(errno)] += 1
            done += 1
            continue
        for i in range(done, done + sent):
            queue.sent_bytes += queue.messages[i].msg_len - VNET_HDR_LEN
        queue.sent += sent
        done += sent
    queue.count = queue.slots = 0


cdef inline void end_message(
        MessageQueue *queue, int slot, int parts, uint32_t ifindex, uint16_t be_type) noexcept nogil:
    """Complete the message whose parts begin at `slot`. `be_type`: the EtherType that the kernel is told; 0 for the
    frame's own."""
    must(0 <= queue.count <= slot < queue.slots <= TX_BATCH)
    queue.messages[queue.count].msg_hdr.msg_iov = queue.parts[slot]
    queue.messages[queue.count].msg_hdr.msg_iovlen = parts
    queue.links[queue.count].sll_ifindex = ifindex
    queue.links[queue.count].sll_protocol = be_type
    queue.count += 1
    if queue.slots == TX_BATCH:
        send_messages(queue)


cdef inline void enqueue_as(MessageQueue *queue, Packet *p, uint16_t be_type) noexcept nogil:
    cdef iovec *part = queue.parts[queue.slots]
    if p.vnet.gso_type != 0:
        p.vnet.hdr_len = p.l4 + p.l4_header              # exact, so that the kernel copies no payload as header
    memcpy(p.frame - VNET_HDR_LEN, &p.vnet, VNET_HDR_LEN)
    part.iov_base = p.frame - VNET_HDR_LEN
    part.iov_len = p.length + VNET_HDR_LEN
    queue.slots += 1
    end_message(queue, queue.slots - 1, 1, p.out_ifindex, be_type)


cdef inline void enqueue(MessageQueue *queue, Packet *p) noexcept nogil:
    """Queue one frame; its memory stays in use until the next `send_messages`."""
    enqueue_as(queue, p, 0)


cdef inline void enqueue_offloaded(MessageQueue *queue, Packet *p) noexcept nogil:
    """Queue a GSO packet in its tunnel. The egress program that its mark calls has it cut: tunnel_offload.py."""
    cdef uint16_t be_type = load16(p.frame + ETH_TYPE)
    write_be16(p.frame + ETH_TYPE, ETHERTYPE_OFFLOAD)
    p.vnet.gso_size = <uint16_t>p.segment_size
    enqueue_as(queue, p, be_type)


# --- packets that leave in several frames ----------------------------------------------------------------------------

cdef inline uint32_t add_frame(MessageQueue *queue, Cutter *cutter) noexcept nogil:
    """Put the next frame into the next slot. Returns the length of its payload, 0 if there is no more."""
    cdef uint8_t *headers = queue.headers[queue.slots]
    cdef iovec *parts = queue.parts[queue.slots]
    cdef const uint8_t *payload = NULL
    cdef uint32_t length = next_frame(cutter, headers + VNET_HDR_LEN, &payload)
    if length == 0:
        return 0
    memset(headers, 0, VNET_HDR_LEN)
    parts[0].iov_base = headers
    parts[0].iov_len = VNET_HDR_LEN + cutter.headers
    parts[1].iov_base = <void *>payload
    parts[1].iov_len = length
    queue.slots += 1
    return length


cdef inline void enqueue_frames(MessageQueue *queue, const Packet *p) noexcept nogil:
    """Queue a packet that leaves as several frames. Bounded by the longest packet, 64 KiB."""
    cdef Cutter cutter
    start_cutting(&cutter, p)
    while add_frame(queue, &cutter):
        end_message(queue, queue.slots - 1, 2, p.out_ifindex, 0)


cdef inline void join_segments(
        MessageQueue *queue, int slot, const Packet *p, uint32_t size, uint32_t length) noexcept nogil:
    """Make one message of the frames from `slot` on: datagrams of `size` bytes, `length` in all, behind what they have
    in common, which is everything up to the UDP header. A single one is that already."""
    cdef uint32_t common = p.l3 - GUE_LEN
    cdef uint8_t *headers = queue.headers[slot]
    cdef VnetHdr vnet
    cdef int i
    if queue.slots > slot + 1:
        vnet.flags = VNET_NEEDS_CSUM
        vnet.gso_type = GSO_UDP
        vnet.hdr_len = <uint16_t>common
        vnet.gso_size = <uint16_t>size
        vnet.csum_start = <uint16_t>(common - UDP_LEN)
        vnet.csum_offset = UDP_CSUM
        memcpy(headers, &vnet, VNET_HDR_LEN)
        leave_checksum(headers + VNET_HDR_LEN + p.l3 - p.outer, p.outer, length - GUE_LEN)
    for i in range(slot + 1, queue.slots):
        queue.parts[i][0].iov_base = queue.headers[i] + VNET_HDR_LEN + common
        queue.parts[i][0].iov_len -= VNET_HDR_LEN + common
    end_message(queue, slot, 2 * (queue.slots - slot), p.out_ifindex, 0)


cdef inline void enqueue_joined(MessageQueue *queue, const Packet *p) noexcept nogil:
    """Queue a GSO packet in gue as the datagrams that it is cut into, one behind the other. That is what a GSO packet
    of UDP is (UDP_SEGMENT in udp(7)): the kernel or the device takes it apart, and sums up each datagram."""
    cdef uint32_t header = p.l4 + p.l4_header - (p.l3 - GUE_LEN)
    cdef uint32_t most = max((MAX_IP - p.outer) // (header + p.segment_size), <uint32_t>1)
    cdef uint32_t length = 1
    cdef uint32_t total
    cdef Cutter cutter
    cdef int slot
    must(p.outer > GUE_LEN)
    start_cutting(&cutter, p)
    while length:
        slot = queue.slots
        total = 0
        while queue.slots < min(slot + <int>most, <int>TX_BATCH):
            length = add_frame(queue, &cutter)
            if length == 0:
                break
            total += header + length
        if total:
            join_segments(queue, slot, p, header + p.segment_size, total)
