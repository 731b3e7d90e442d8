"""fastlb's packet path in a loop of your own. Here the frames come from a capture; `Loop.replay` is what to copy.

The memory is yours. Every packet of a batch has a slot in it:

    | HEADROOM | frame, `Packet.length` bytes | …
               ^ `Packet.frame`

The pipeline rewrites a frame where it lies. It may also write to the HEADROOM bytes in front of it, where a VLAN tag or
the headers of an ICMP error go, and then moves `frame` and changes `length`. It touches nothing else of a slot. What
lies in `vnet` is the frame's virtio_net_hdr, all zero when nothing is offloaded; a source that has one (a TUN device,
virtio) puts it there, and after the batch writes it to the VNET_HDR_LEN bytes in front of `frame`, which are free.

A pipeline belongs to one thread at a time. Several threads take a pipeline each over one `FlowMemory`, with other
shards; what is not a thread's own ends as ``wrong_worker``.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastlb._core cimport Pipeline
from fastlb.dataplane.conntrack cimport sweep
from fastlb.dataplane.pipeline cimport run_batch
from fastlb.dataplane.publish cimport pick_up
from fastlb.dataplane.reasons cimport VIA_REJECT
from fastlb.dataplane.ring cimport HEADROOM
from fastlb.dataplane.segments cimport MAX_HEADERS, Cutter, next_frame, start_cutting
from fastlb.dataplane.types cimport BATCH, Packet, Snapshot


cdef enum:
    MAX_FRAME = 65535 + 18   # the longest IP packet behind a tagged Ethernet header
    SLOT = HEADROOM + MAX_FRAME
    INTERFACE = 1            # where frames come in: the number that `Routes` calls it by


cdef packed struct Record:
    # In front of every frame of a capture (pcap).
    uint32_t seconds
    uint32_t microseconds
    uint32_t captured        # bytes that follow
    uint32_t length


cdef struct Capture:
    # Where the loop reads and where it writes.
    const uint8_t *at
    const uint8_t *end
    uint8_t *reasons         # one for each frame that was read
    uint8_t *sent            # records of the frames that would be sent
    Record stamp             # the time of the batch that is under way


cdef class Loop:
    """A pipeline and the memory for one batch of frames. Publish services and routes to the pipeline first."""

    cdef Pipeline pipeline
    cdef Packet packets[BATCH]
    cdef uint8_t *slots

    def __cinit__(self, Pipeline pipeline not None):
        self.pipeline = pipeline
        self.slots = <uint8_t *>malloc(BATCH * SLOT)
        if self.slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.slots)

    def run(self, bytes records not None):
        """Replay the records of a capture: (each frame's reason, as a byte; the records of what would be sent).

        Raises ValueError when a record is cut off or longer than any frame. Another thread may publish meanwhile.
        """
        cdef uint32_t count = count_records(records)
        cdef Capture capture
        # Pieces are of 500 bytes at least, and each has a record and headers of its own.
        reasons, sent = bytearray(count), bytearray(2 * len(records) + count * (HEADROOM + MAX_HEADERS))
        capture.at = records
        capture.end = capture.at + len(records)
        capture.reasons, capture.sent = reasons, sent
        pick_up(&self.pipeline.publication)
        self.pipeline.running = True     # from here on `publish` frees only what a batch has passed
        try:
            with nogil:
                self.replay(&capture)
        finally:
            self.pipeline.running = False
        del sent[capture.sent - <uint8_t *>sent:]
        return bytes(reasons), bytes(sent)

    cdef void replay(self, Capture *capture) noexcept nogil:
        """Batch by batch, each with one snapshot and one time in milliseconds."""
        cdef const Snapshot *snap
        cdef uint32_t now
        cdef int count, i
        while capture.at < capture.end:
            capture.stamp = (<const Record *>capture.at)[0]
            now = time_of(&capture.stamp)
            count = self.receive(capture, now)
            snap = pick_up(&self.pipeline.publication)
            run_batch(&self.pipeline.state, snap, self.packets, count, now)
            for i in range(count):
                finish(&self.packets[i], capture)
            sweep(&self.pipeline.state.flows, snap.services, now)  # a part of the table: flows that have timed out go

    cdef int receive(self, Capture *capture, uint32_t now) noexcept nogil:
        """Put the frames of this millisecond into the slots, at most a batch; how many."""
        cdef const Record *record
        cdef Packet *packet
        cdef int count = 0
        while count < BATCH and capture.at < capture.end:
            record = <const Record *>capture.at
            if time_of(record) != now:
                break
            packet = &self.packets[count]
            memset(packet, 0, sizeof(Packet))
            packet.frame = self.slots + count * SLOT + HEADROOM
            packet.length = record.captured
            packet.ifindex = INTERFACE
            memcpy(packet.frame, capture.at + sizeof(Record), record.captured)
            capture.at += sizeof(Record) + record.captured
            count += 1
        return count


cdef void finish(const Packet *packet, Capture *capture) noexcept nogil:
    """What you would send, pass on to the host or free. `out_ifindex` says where it leaves; here it is written down.

    A packet may leave as several frames: each is headers that `next_frame` writes, and a stretch of the packet.
    """
    cdef Cutter cutter
    cdef uint8_t headers[MAX_HEADERS]
    cdef const uint8_t *payload
    cdef uint32_t length
    capture.reasons[0] = packet.reason
    capture.reasons += 1
    if packet.reason > VIA_REJECT:       # not forwarded: fastlb.dataplane.reasons.verdict_of tells PASS from DROP
        return
    if packet.segment_size == 0:
        write_down(capture, packet.frame, packet.length, NULL, 0)
        return
    start_cutting(&cutter, packet)
    length = next_frame(&cutter, headers, &payload)
    while length:
        write_down(capture, headers, cutter.headers, payload, length)
        length = next_frame(&cutter, headers, &payload)


cdef void write_down(
        Capture *capture, const uint8_t *start, uint32_t start_length, const uint8_t *rest, uint32_t rest_length,
        ) noexcept nogil:
    """A record of a frame that lies in one or two places."""
    cdef Record record = capture.stamp
    record.captured = record.length = start_length + rest_length
    memcpy(capture.sent, &record, sizeof(Record))
    memcpy(capture.sent + sizeof(Record), start, start_length)
    if rest_length:
        memcpy(capture.sent + sizeof(Record) + start_length, rest, rest_length)
    capture.sent += sizeof(Record) + record.length


cdef uint32_t time_of(const Record *record) noexcept nogil:
    """Milliseconds, modulo 2**32, which is all that the flow table needs."""
    return <uint32_t>(<uint64_t>record.seconds * 1000 + record.microseconds // 1000)


cdef uint32_t count_records(bytes records) except? 0xFFFFFFFF:
    cdef const uint8_t *start = records
    cdef uint64_t at = 0
    cdef uint64_t end = len(records)
    cdef uint32_t count = 0
    cdef uint32_t length
    while at < end:
        length = (<const Record *>(start + at)).captured if end - at >= sizeof(Record) else 0xFFFFFFFFU
        if length > MAX_FRAME or end - at - sizeof(Record) < length:
            raise ValueError(f"record {count} is cut off, or longer than {MAX_FRAME} bytes")
        at += sizeof(Record) + length
        count += 1
    return count
