"""The worker: read frames, run batches, transmit, give blocks back; until told to stop.

It alone owns its rings, its ways out and its pipeline's state. Between batches it looks at the clock, picks up
the current snapshot and sweeps a bounded part of the flow table.

A worker that finds nothing spins for a while, so that the next frame of a busy link meets it awake. Then it sleeps on
its doorbells: packet sockets behind an eBPF program (kernel/ebpf) that lets a frame's first byte in once, while the
word `asleep` says so. Without open blocks a frame cannot be read before its block is closed, which wakes a sleeper by
itself; then there are no doorbells.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastlb.dataplane.abi cimport (
    CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE, MSG_DONTWAIT, POLLERR, POLLIN, SOL_SOCKET, SO_ERROR, clock_gettime,
    getsockopt, poll, pollfd, recv, timespec, tpacket3_hdr)
from fastlb.dataplane.fragment cimport free_slot
from fastlb.dataplane.machine cimport (
    load_acquire_u32, must, spin_pause, store_fence, store_release_u32, store_release_u64)
from fastlb.dataplane.pipeline cimport must_check_held, next_settled, run_batch, sweep_tables
from fastlb.dataplane.publish cimport Publication, pick_up
from fastlb.dataplane.reasons cimport VIA_REJECT
from fastlb.dataplane.ring cimport (
    RxRing, advance, has_frames, hold_block, is_closed, kernel_may_refill, next_slot, take_frame)
from fastlb.dataplane.state cimport PipelineState
from fastlb.dataplane.transmit cimport Transmit, block_is_free, collect, flush, push_all, send_outside_rings, transmit
from fastlb.dataplane.types cimport BATCH, Packet, Snapshot


cdef enum:
    MAX_RINGS = 16
    MAX_FDS = 2 * MAX_RINGS + 1  # a ring and a doorbell for each interface, and what wakes a sleeper to stop it
    GATHER_NS = 5000
    IDLE_MS = 100            # the longest sleep: the sweep and new snapshots wait no longer
    IN_FLIGHT_MS = 1         # while frames are on their way out and blocks wait for them, or fragments for their first
    MAX_RINGS_OF_A_BELL = 64  # taken out of a doorbell at once; what is left wakes again


cdef struct WorkerState:
    RxRing rings[MAX_RINGS]
    pollfd fds[MAX_FDS]      # the rings', the one that ends a sleep, the doorbells'
    Transmit out
    Packet packets[BATCH]
    PipelineState *pipe
    Publication *publication
    uint32_t *asleep         # shared with the doorbells' program; NULL without doorbells
    uint64_t spin_ns
    uint64_t blocks_read
    uint64_t early           # frames taken from blocks that were still open
    uint64_t sleeps
    uint64_t rounds          # of the loop, so that others see it alive
    uint32_t ring_count
    uint32_t fd_count
    uint32_t stopping        # set by another thread, which then writes to fds[ring_count]


cdef inline uint32_t clock_ms() noexcept nogil:
    """Return the milliseconds of the monotonic clock, modulo 2**32; good to a timer tick."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <uint32_t>(now.tv_sec * 1000 + now.tv_nsec // 1000000)


cdef inline uint64_t clock_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


# --- frames ----------------------------------------------------------------------------------------------------------

cdef inline void process(WorkerState *worker, int count, uint32_t now) noexcept nogil:
    """Process one batch: reasons first, then the forwarded frames are transmitted in the order in which they came."""
    cdef int i
    worker.pipe.now_us = clock_ns() // 1000
    run_batch(worker.pipe, pick_up(worker.publication), worker.packets, count, now)
    for i in range(count):
        if worker.packets[i].reason <= VIA_REJECT:
            transmit(&worker.out, &worker.packets[i])
    push_all(&worker.out)


cdef inline void send_settled_fragments(WorkerState *worker, uint32_t now) noexcept nogil:
    """Send fragments that waited for their first one and need no longer. They lie outside of the rings, so they leave
    by sendmmsg, one by one."""
    cdef const Snapshot *snap
    cdef Packet *p
    cdef uint32_t at = 0
    if not must_check_held(worker.pipe, now):
        return
    snap = pick_up(worker.publication)
    p = next_settled(worker.pipe, snap, &at, now)
    while p != NULL:
        if p.reason <= VIA_REJECT:
            send_outside_rings(&worker.out, p)
        free_slot(&worker.pipe.fragments, at)
        p = next_settled(worker.pipe, snap, &at, now)


cdef inline void give_back(WorkerState *worker, RxRing *ring) noexcept nogil:
    """Give back the held blocks whose frames have all left, oldest first."""
    while ring.held and block_is_free(&worker.out, ring.first + ring.oldest):
        kernel_may_refill(ring)


cdef inline bint read_ring(WorkerState *worker, RxRing *ring, uint32_t now) noexcept nogil:
    """Process what the current block has by now, a batch at a time; False if that is nothing.

    Bounded by the block. One that is closed is held until all of its frames have left.
    """
    cdef bint closed = is_closed(ring)
    cdef tpacket3_hdr *slot = next_slot(ring, closed)
    cdef uint32_t taken = ring.taken
    cdef int count = 0
    cdef int reason
    while slot != NULL:
        must(count < BATCH)
        reason = take_frame(ring, slot, &worker.packets[count])
        advance(ring, slot, closed)
        if reason:
            worker.pipe.reasons[reason] += 1
        else:
            count += 1
        if count == BATCH:
            process(worker, count, now)
            count = 0
        slot = next_slot(ring, closed)
    taken = ring.taken - taken
    if count:
        process(worker, count, now)
    if taken:
        flush(&worker.out)
    if not closed:
        worker.early += taken
        return taken != 0
    hold_block(ring)
    give_back(worker, ring)
    worker.blocks_read += 1
    return True


cdef inline bint read_rings(WorkerState *worker, uint32_t now) noexcept nogil:
    """Read one block of each ring that has one, so that no interface starves another; False if all were empty."""
    cdef bint found = False
    cdef uint32_t i
    for i in range(worker.ring_count):
        if has_frames(&worker.rings[i]):
            found = read_ring(worker, &worker.rings[i], now) or found
    return found


cdef inline bint take_back(WorkerState *worker, uint32_t now) noexcept nogil:
    """Collect completions, and give back the blocks that they free; True while frames are on their way out."""
    cdef bint in_flight = collect(&worker.out, now)
    cdef uint32_t i
    for i in range(worker.ring_count):
        give_back(worker, &worker.rings[i])
    return in_flight


cdef inline void let_frames_gather() noexcept nogil:
    """Pause for a moment after a few frames from an open block.

    A reader that keeps up with every single frame takes the block's cache lines away from the core that writes the next
    one there, and costs it 300 ns a frame.
    """
    cdef uint64_t end = clock_ns() + GATHER_NS
    while clock_ns() < end:
        spin_pause()


# --- idle ------------------------------------------------------------------------------------------------------------

cdef inline bint keeps_spinning(WorkerState *worker, uint64_t *idle_since) noexcept nogil:
    """Spin once; False if it is time to sleep. ``idle_since``: when spinning began, 0 before that."""
    cdef uint64_t now = clock_ns()
    if idle_since[0] == 0:
        idle_since[0] = now
    if now - idle_since[0] >= worker.spin_ns:
        return False
    spin_pause()
    return True


cdef inline void set_asleep(WorkerState *worker, uint32_t asleep) noexcept nogil:
    if worker.asleep != NULL:
        store_release_u32(worker.asleep, asleep)


cdef inline bint anything_came(WorkerState *worker) noexcept nogil:
    cdef uint32_t i
    for i in range(worker.ring_count):
        if has_frames(&worker.rings[i]):
            return True
    return False


cdef inline void attend_to_socket(pollfd *socket, bint is_bell) noexcept nogil:
    """Attend to a socket that woke the worker.

    A link that went down leaves an error on its sockets, and poll returns at once until somebody has asked for it; a
    doorbell rings until it is emptied.
    """
    cdef int error
    cdef unsigned int length = sizeof(error)
    cdef uint8_t rung
    cdef int left = MAX_RINGS_OF_A_BELL
    if socket.revents & POLLERR:
        getsockopt(socket.fd, SOL_SOCKET, SO_ERROR, &error, &length)
    if is_bell and socket.revents & POLLIN:
        while left and recv(socket.fd, &rung, 1, MSG_DONTWAIT) >= 0:
            left -= 1


cdef inline void sleep_until_called(WorkerState *worker, int timeout_ms) noexcept nogil:
    """Sleep until a doorbell rings, a block is closed, or somebody wants this worker to stop.

    A frame that comes after the last look at the rings finds `asleep` set, because that is stored before the look.
    """
    cdef uint32_t i
    set_asleep(worker, 1)
    store_fence()
    if not anything_came(worker):
        worker.sleeps += 1
        poll(worker.fds, worker.fd_count, timeout_ms)
        for i in range(worker.fd_count):
            if i != worker.ring_count and worker.fds[i].revents:
                attend_to_socket(&worker.fds[i], i > worker.ring_count)
    set_asleep(worker, 0)


cdef inline void run_worker(WorkerState *worker) noexcept nogil:
    cdef uint64_t idle_since = 0
    cdef uint64_t early
    cdef bint in_flight
    cdef uint32_t now
    while not load_acquire_u32(&worker.stopping):
        now = clock_ms()
        in_flight = take_back(worker, now)
        early = worker.early
        if read_rings(worker, now):
            idle_since = 0
            if 0 < worker.early - early < BATCH:
                let_frames_gather()
        elif not keeps_spinning(worker, &idle_since):
            sleep_until_called(worker, IN_FLIGHT_MS if in_flight or worker.pipe.fragments.count else IDLE_MS)
            idle_since = 0
        send_settled_fragments(worker, now)
        sweep_tables(worker.pipe, pick_up(worker.publication), now)
        store_release_u64(&worker.rounds, worker.rounds + 1)
