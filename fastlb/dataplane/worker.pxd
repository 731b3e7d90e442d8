"""The worker: read blocks, run batches, transmit, give blocks back; until told to stop.

It alone owns its rings, its ways out and its pipeline's state. Between batches it looks at the clock, picks up
the current snapshot and sweeps a bounded part of the flow table.
"""

from libc.stdint cimport uint32_t, uint64_t

from fastlb.dataplane.abi cimport (
    CLOCK_MONOTONIC_COARSE, POLLERR, SO_ERROR, SOL_SOCKET, clock_gettime, getsockopt, poll, pollfd, timespec,
    tpacket3_hdr, tpacket_block_desc)
from fastlb.dataplane.conntrack cimport sweep
from fastlb.dataplane.machine cimport load_acquire_u32
from fastlb.dataplane.pipeline cimport PipelineState, run_batch
from fastlb.dataplane.publish cimport Publication, pick_up
from fastlb.dataplane.reasons cimport VIA_REJECT
from fastlb.dataplane.ring cimport (
    RxRing, current_block, first_frame, frame_after, hold_block, kernel_may_refill, take_frame, user_may_read)
from fastlb.dataplane.transmit cimport Transmit, block_is_free, collect, flush, transmit
from fastlb.dataplane.types cimport BATCH, Packet, Snapshot


cdef enum:
    MAX_RINGS = 16
    IDLE_MS = 100            # the longest sleep: the sweep and new snapshots wait no longer
    IN_FLIGHT_MS = 1         # while frames are on their way out, and blocks wait for them


cdef struct WorkerState:
    RxRing rings[MAX_RINGS]
    pollfd fds[MAX_RINGS + 1]
    Transmit out
    Packet packets[BATCH]
    PipelineState *pipe
    Publication *publication
    uint64_t blocks_read
    uint32_t ring_count
    uint32_t stopping        # set by another thread, which then rings fds[ring_count]


cdef inline uint32_t clock_ms() noexcept nogil:
    """Milliseconds of the monotonic clock, modulo 2**32; good to a timer tick."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <uint32_t>(now.tv_sec * 1000 + now.tv_nsec // 1000000)


cdef inline void process(WorkerState *worker, const Snapshot *snap, int count, uint32_t now) noexcept nogil:
    """One batch: verdicts, then the forwarded frames to the transmit queue in the order in which they came."""
    cdef int i
    run_batch(worker.pipe, snap, worker.packets, count, now)
    for i in range(count):
        if worker.packets[i].reason <= VIA_REJECT:
            transmit(&worker.out, &worker.packets[i])


cdef inline void give_back(WorkerState *worker, RxRing *ring) noexcept nogil:
    """The held blocks whose frames have all left, oldest first."""
    while ring.held and block_is_free(&worker.out, ring.first + ring.oldest):
        kernel_may_refill(ring)


cdef inline void read_block(WorkerState *worker, RxRing *ring, uint32_t now) noexcept nogil:
    """All frames of the ring's current block, a batch at a time; the block goes back when all have left."""
    cdef tpacket_block_desc *block = current_block(ring)
    cdef tpacket3_hdr *slot = first_frame(block)
    cdef uint32_t left = block.hdr.bh1.num_pkts
    cdef int count = 0
    cdef int reason
    while left:
        left -= 1
        reason = take_frame(ring, slot, &worker.packets[count])
        if reason:
            worker.pipe.reasons[reason] += 1
        else:
            count += 1
        if count == BATCH:
            process(worker, pick_up(worker.publication), count, now)
            count = 0
        slot = frame_after(slot)
    if count:
        process(worker, pick_up(worker.publication), count, now)
    flush(&worker.out)
    hold_block(ring)
    give_back(worker, ring)
    worker.blocks_read += 1


cdef inline bint read_rings(WorkerState *worker, uint32_t now) noexcept nogil:
    """One block of each ring that has one, so that no interface starves another; False when all were empty."""
    cdef bint found = False
    cdef uint32_t i
    for i in range(worker.ring_count):
        if user_may_read(&worker.rings[i]):
            read_block(worker, &worker.rings[i], now)
            found = True
    return found


cdef inline void wait_for_frames(WorkerState *worker, int timeout_ms) noexcept nogil:
    """Sleep until a ring has a block. A link that went down leaves an error on its socket, and poll returns at once
    until somebody has asked for it."""
    cdef int error
    cdef unsigned int length
    cdef uint32_t i
    poll(worker.fds, worker.ring_count + 1, timeout_ms)
    for i in range(worker.ring_count):
        if worker.fds[i].revents & POLLERR:
            length = sizeof(error)
            getsockopt(worker.fds[i].fd, SOL_SOCKET, SO_ERROR, &error, &length)


cdef inline bint take_back(WorkerState *worker, uint32_t now) noexcept nogil:
    """Completions, and the blocks that they free; True while frames are on their way out."""
    cdef bint in_flight = collect(&worker.out, now)
    cdef uint32_t i
    for i in range(worker.ring_count):
        give_back(worker, &worker.rings[i])
    return in_flight


cdef inline void run_worker(WorkerState *worker) noexcept nogil:
    cdef bint in_flight
    cdef uint32_t now
    while not load_acquire_u32(&worker.stopping):
        now = clock_ms()
        in_flight = take_back(worker, now)
        if not read_rings(worker, now):
            wait_for_frames(worker, IN_FLIGHT_MS if in_flight else IDLE_MS)
        sweep(&worker.pipe.flows, pick_up(worker.publication).services, now)
