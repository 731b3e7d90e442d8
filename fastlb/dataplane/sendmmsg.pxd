"""The way out that always works: sendmmsg on one packet socket, with iovecs into the receive ring.

Each message is a virtio_net_hdr and the frame behind it, so frames with an open checksum and super-frames leave as they
came; or the headers of a piece (pieces.pxd), which lie in the queue, and its payload, which lies in the ring. The
kernel has copied a message when sendmmsg returns; the ring's block may then go back.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastlb.dataplane.abi cimport (
    AF_PACKET, EAGAIN, EINTR, EMSGSIZE, ENETDOWN, ENOBUFS, ENODEV, ENXIO, MSG_DONTWAIT, errno, iovec, mmsghdr,
    sendmmsg, sockaddr_ll)
from fastlb.dataplane.machine cimport must, unlikely
from fastlb.dataplane.pieces cimport MAX_HEADERS, Pieces, cut, next_piece
from fastlb.dataplane.reasons cimport DROP_TX_ERROR, DROP_TX_FULL, DROP_TX_LINK_DOWN, DROP_TX_TOO_BIG
from fastlb.dataplane.types cimport VNET_HDR_LEN, Packet


cdef enum:
    TX_BATCH = 64            # messages a call: beyond that the system call itself no longer shows


cdef struct MessageQueue:
    mmsghdr messages[TX_BATCH]
    iovec parts[TX_BATCH][2]  # the whole frame; or headers and payload
    sockaddr_ll links[TX_BATCH]
    uint8_t headers[TX_BATCH][VNET_HDR_LEN + MAX_HEADERS]
    uint64_t *reasons        # the pipeline's counters: a frame that cannot leave is a drop
    uint64_t sent
    uint64_t sent_bytes
    int count
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
        queue.messages[i].msg_hdr.msg_iov = queue.parts[i]


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
    queue.count = 0


cdef inline void end_message(MessageQueue *queue, int parts, uint32_t ifindex) noexcept nogil:
    """The message at `count` is complete."""
    must(0 <= queue.count < TX_BATCH)
    queue.messages[queue.count].msg_hdr.msg_iovlen = parts
    queue.links[queue.count].sll_ifindex = ifindex
    queue.count += 1
    if queue.count == TX_BATCH:
        send_messages(queue)


cdef inline void enqueue(MessageQueue *queue, Packet *p) noexcept nogil:
    """Queue one frame; its memory stays in use until the next `send_messages`."""
    cdef iovec *part = &queue.parts[queue.count][0]
    if p.vnet.gso_type != 0:
        p.vnet.hdr_len = p.l4 + p.l4_header              # exact, so that the kernel copies no payload as header
    memcpy(p.frame - VNET_HDR_LEN, &p.vnet, VNET_HDR_LEN)
    part.iov_base = p.frame - VNET_HDR_LEN
    part.iov_len = p.length + VNET_HDR_LEN
    end_message(queue, 1, p.out_ifindex)


cdef inline void enqueue_pieces(MessageQueue *queue, const Packet *p) noexcept nogil:
    """Queue a packet that leaves as several frames. Bounded by the longest packet, 64 KiB."""
    cdef Pieces pieces
    cdef const uint8_t *payload
    cdef uint8_t *headers
    cdef iovec *parts
    cdef uint32_t length
    cut(&pieces, p)
    while True:
        headers = queue.headers[queue.count]
        length = next_piece(&pieces, headers + VNET_HDR_LEN, &payload)
        if length == 0:
            break
        memset(headers, 0, VNET_HDR_LEN)
        parts = queue.parts[queue.count]
        parts[0].iov_base = headers
        parts[0].iov_len = VNET_HDR_LEN + pieces.headers
        parts[1].iov_base = <void *>payload
        parts[1].iov_len = length
        end_message(queue, 2, p.out_ifindex)
