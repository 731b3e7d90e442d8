"""The measuring loop: frames from a pool in memory, a batch at a time, through the pipeline itself.

The pool stands for the receive ring: frames lie one behind the other in the order in which they arrive. A batch is
copied out of it, because the pipeline rewrites in place and the pool must stay as it is. Then it goes through
`run_batch`, or only through the pipeline's beginning, up to one of STAGES; how much longer a beginning takes than the
one before it is what its last stage costs.

    walk       the copy, and a look at the addresses        the pool, not the pipeline
    parse      + parse                                      first pass
    classify   + classify, with shard and fingerprint       first pass
    prefetch   + owns, prefetch_flow: `receive`, whole      first pass
    track      + track_client                               second pass
    forward    + forward_to_backend: `dispatch`, whole      second pass
    counters   + the totals: `run_batch`, whole             both
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fastlb._core cimport Pipeline
from fastlb.dataplane.abi cimport (
    MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap, timespec)
from fastlb.dataplane.checksum cimport difference, sum_bytes, update_checksum
from fastlb.dataplane.conntrack cimport FlowTable
from fastlb.dataplane.machine cimport likely, load16, load64
from fastlb.dataplane.parse cimport parse
from fastlb.dataplane.pipeline cimport dispatch, receive, run_batch
from fastlb.dataplane.publish cimport pick_up
from fastlb.dataplane.reasons cimport PASS_NO_SERVICE, VIA_CONNTRACK, VIA_REJECT
from fastlb.dataplane.service cimport classify
from fastlb.dataplane.state cimport PipelineState
from fastlb.dataplane.track cimport track_client
from fastlb.dataplane.types cimport BATCH, LEG_NONE, Packet, Snapshot
from fastlb.dataplane.wire cimport (
    ETH_LEN, IP4_CSUM, IP4_LEN, IP4_SRC, IP6_LEN, IP6_SRC, TCP_CSUM, TCP_FLAGS, write_be16, write_be32)

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_THREAD_CPUTIME_ID
    int clock_gettime(int clock, timespec *now) noexcept

cdef extern from *:
    """
    #define APART __attribute__((noinline, flatten)) void
    """
    # A function with a copy of all that it calls. Otherwise `parse` and `track_client` would have more callers here
    # than in the worker, and the compiler would no longer inline them into `receive` and `dispatch`.
    ctypedef void apart "APART"


cdef enum:
    LINE = 64
    BUFFER = 256             # from one frame of a batch to the next: about what a 64-byte frame takes in a ring
    HEADROOM = 66            # keeps IP headers aligned to four, as in the ring
    FIRST_PORT = 1024
    CLIENT_NET = 100 << 24   # 100.0.0.0, or the last 32 bits of an IPv6 address


cdef enum:
    WALK
    PARSE
    CLASSIFY
    PREFETCH
    TRACK
    FORWARD
    COUNTERS

STAGES = ("walk", "parse", "classify", "prefetch", "track", "forward", "counters")


cdef struct Batch:
    # All of a batch that the pipeline touches besides its own tables.
    Packet packets[BATCH]
    uint8_t buffers[BATCH * BUFFER]


cdef inline double seconds() noexcept nogil:
    """Of this thread on its core: what others get of it meanwhile does not count."""
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef inline uint32_t scramble(uint32_t x) noexcept nogil:
    """A bijection on 32 bits (MurmurHash3's finalizer): distinct flows keep distinct tuples, in no order."""
    x = (x ^ (x >> 16)) * <uint32_t>0x85EBCA6BU
    x = (x ^ (x >> 13)) * <uint32_t>0xC2B2AE35U
    return x ^ (x >> 16)


cdef class Frames:
    """A pool of ``count`` frames, all of them copies of ``template`` until `assign` tells their clients apart.

    ``template``: an Ethernet frame with an IPv4 or IPv6 header without options, TCP, correct checksums, and at
    most 128 bytes.
    """

    cdef uint8_t *memory
    cdef size_t stride
    cdef readonly uint32_t count
    cdef uint32_t length
    cdef uint32_t addresses  # offset of the source address; the destination's follows
    cdef uint32_t l4

    def __cinit__(self, bytes template not None, uint32_t count):
        cdef bint four = template[ETH_LEN] >> 4 == 4
        cdef uint32_t at
        self.length = len(template)
        self.stride = (self.length + LINE - 1) // LINE * LINE
        if self.length > 2 * LINE:
            raise ValueError(f"a frame has at most {2 * LINE} bytes, not {self.length}")
        self.count = count
        self.l4 = ETH_LEN + (IP4_LEN if four else IP6_LEN)
        self.addresses = ETH_LEN + (IP4_SRC if four else IP6_SRC)
        self.memory = <uint8_t *>mmap(
            NULL, self.stride * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if self.memory == MAP_FAILED:
            self.memory = NULL
            raise MemoryError(f"a pool of {count} frames needs {self.stride * count} bytes")
        madvise(self.memory, self.stride * count, MADV_HUGEPAGE)
        for at in range(count):
            memcpy(self.frame(at), <const char *>template, self.length)

    cdef inline uint8_t *frame(self, uint32_t at) noexcept nogil:
        return self.memory + at * self.stride

    def assign(self, uint32_t first, uint32_t flows):
        """Give the frames to flows ``first`` .. ``first + flows - 1`` in random order, equally many to each."""
        cdef uint32_t *order = <uint32_t *>calloc(self.count, sizeof(uint32_t))
        cdef uint64_t seed = 1
        cdef uint32_t at, other
        if order == NULL:
            raise MemoryError
        for at in range(self.count):
            order[at] = first + at % flows
        for at in range(self.count - 1, 0, -1):
            seed = seed * <uint64_t>6364136223846793005ULL + <uint64_t>1442695040888963407ULL
            other = <uint32_t>((seed >> 32) * (at + 1) >> 32)
            order[at], order[other] = order[other], order[at]
        for at in range(self.count):
            self.set_client(self.frame(at), scramble(order[at]))
        free(order)

    cdef void set_client(self, uint8_t *frame, uint32_t client) noexcept nogil:
        """One of 2**18 addresses with 2**14 ports each. The last word of an address is the client's own."""
        cdef uint8_t *word = frame + (self.addresses + self.l4) // 2 - 4
        cdef uint8_t *port = frame + self.l4
        cdef uint64_t old_address = sum_bytes(word, 4)
        cdef uint64_t old_port = load16(port)
        cdef uint64_t change
        write_be32(word, CLIENT_NET | client >> 14)
        write_be16(port, FIRST_PORT + (client & 0x3FFF))
        change = difference(old_address, sum_bytes(word, 4))
        if self.l4 == ETH_LEN + IP4_LEN:
            update_checksum(frame + ETH_LEN + IP4_CSUM, change)
        update_checksum(frame + self.l4 + TCP_CSUM, change + difference(old_port, load16(port)))

    def set_flags(self, uint8_t flags):
        """Give every frame these TCP flags."""
        cdef uint8_t *tcp
        cdef uint16_t old
        cdef uint32_t at
        for at in range(self.count):
            tcp = self.frame(at) + self.l4
            old = load16(tcp + TCP_FLAGS - 1)
            tcp[TCP_FLAGS] = flags
            update_checksum(tcp + TCP_CSUM, difference(old, load16(tcp + TCP_FLAGS - 1)))

    cdef inline void answer(self, uint32_t at, const uint8_t *sent) noexcept nogil:
        """Frame ``at`` becomes the receiver's answer to ``sent``: both sides exchanged, which no checksum notices."""
        cdef uint8_t *reply = self.frame(at)
        cdef uint32_t size = (self.l4 - self.addresses) // 2
        memcpy(reply, sent, self.length)
        memcpy(reply + self.addresses, sent + self.addresses + size, size)
        memcpy(reply + self.addresses + size, sent + self.addresses, size)
        memcpy(reply + self.l4, sent + self.l4 + 2, 2)
        memcpy(reply + self.l4 + 2, sent + self.l4, 2)

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.stride * self.count)


cdef inline int take(Batch *batch, Frames frames, uint32_t at, uint32_t most, uint32_t ifindex) noexcept nogil:
    """Copy the next frames out of the pool and describe them as the ring does; how many."""
    cdef int count = min(min(<uint32_t>BATCH, most), frames.count - at)
    cdef Packet *p
    cdef int i
    for i in range(count):
        p = &batch.packets[i]
        p.frame = &batch.buffers[i * BUFFER + HEADROOM]
        p.length = frames.length
        p.ifindex = ifindex
        memset(&p.vnet, 0, sizeof(p.vnet))
        p.vlan_tpid = 0
        memcpy(p.frame, frames.frame(at + i), LINE)
        if frames.stride != LINE:
            memcpy(p.frame + LINE, frames.frame(at + i) + LINE, LINE)
    return count


# --- the beginnings of the pipeline: its own functions, in its own two passes ----------------------------------------

cdef apart parse_alone(Packet *p) noexcept nogil:
    p.reason = <uint8_t>-parse(p)


cdef apart parse_and_classify(const Snapshot *snap, const FlowTable *flows, Packet *p) noexcept nogil:
    cdef int failed = parse(p)
    p.leg = LEG_NONE
    p.backend = 0
    p.reason = <uint8_t>-failed
    if likely(not failed):
        classify(snap.services, flows, p)
        p.reason = PASS_NO_SERVICE if p.leg == LEG_NONE else p.fault


cdef apart track_alone(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    p.reason = <uint8_t>track_client(pipe, snap, p, now)


cdef inline uint32_t first_pass(
        int stage, PipelineState *pipe, const Snapshot *snap, Packet *packets, int count) noexcept nogil:
    """Up to PARSE, CLASSIFY or PREFETCH; 0 when all are ours and sound."""
    cdef uint32_t astray = 0
    cdef int i
    for i in range(count):
        if stage == PARSE:
            parse_alone(&packets[i])
        elif stage == CLASSIFY:
            parse_and_classify(snap, &pipe.flows, &packets[i])
        else:
            packets[i].reason = <uint8_t>receive(pipe, snap, &packets[i])
        astray |= packets[i].reason
    return astray


cdef inline uint32_t second_pass(
        int stage, PipelineState *pipe, const Snapshot *snap, Packet *packets, int count, uint32_t now,
        ) noexcept nogil:
    """Up to TRACK or FORWARD; 0 when the flow table knew them all."""
    cdef uint32_t astray = 0
    cdef int i
    for i in range(count):
        if stage == TRACK:
            track_alone(pipe, snap, &packets[i], now)
        else:
            packets[i].reason = <uint8_t>dispatch(pipe, snap, &packets[i], now)
        astray |= packets[i].reason ^ <uint32_t>VIA_CONNTRACK
    return astray


cdef class Drive:
    """Runs pools of frames through one pipeline."""

    cdef Pipeline pipeline
    cdef Batch *batch
    cdef readonly uint64_t seen

    def __cinit__(self, Pipeline pipeline not None):
        self.pipeline = pipeline
        self.batch = <Batch *>calloc(1, sizeof(Batch))
        if self.batch == NULL:
            raise MemoryError

    def run(self, Frames frames not None, uint32_t at, uint32_t packets, uint32_t ifindex, uint32_t now_ms,
            str last="counters"):
        """Take ``packets`` frames from position ``at`` on, over and over the pool; the seconds it took.

        ``last``: the stage of STAGES after which they stop. Raises RuntimeError when they stop before the pipeline's
        end and one of them went another way than a packet from the client of an established flow.
        """
        cdef int stage = STAGES.index(last)
        cdef uint32_t astray = 0
        cdef double start = seconds()
        cdef double took
        cdef int count
        with nogil:
            while packets != 0:
                count = take(self.batch, frames, at, packets, ifindex)
                astray |= self.go(frames.addresses, stage, count, now_ms)
                packets -= count
                at += count
                if at == frames.count:
                    at = 0
        took = seconds() - start
        if astray != 0:
            raise RuntimeError(f"not every packet took the fast path up to {last}")
        return took

    cdef uint32_t go(self, uint32_t addresses, int stage, int count, uint32_t now_ms) noexcept nogil:
        """One batch, as a worker does it, up to a stage; 0 when no packet went astray."""
        cdef PipelineState *pipe = &self.pipeline.state
        cdef Packet *packets = self.batch.packets
        cdef const Snapshot *snap
        cdef uint32_t astray
        cdef int i
        if stage == WALK:
            for i in range(count):
                self.seen += load64(packets[i].frame + addresses)
            return 0
        snap = pick_up(&self.pipeline.publication)
        if stage == COUNTERS:
            run_batch(pipe, snap, packets, count, now_ms)
            return 0
        astray = first_pass(stage, pipe, snap, packets, count)
        if stage >= TRACK:
            astray |= second_pass(stage, pipe, snap, packets, count, now_ms)
        return astray

    def answers(self, Frames frames not None, bytes template not None, uint32_t ifindex, uint32_t now_ms):
        """Run every frame through the pipeline; a pool of what the backends would answer, in the same order."""
        cdef Frames replies = Frames(template, frames.count)
        cdef uint32_t at = 0
        cdef int i, count
        while at < frames.count:
            count = take(self.batch, frames, at, BATCH, ifindex)
            self.go(frames.addresses, COUNTERS, count, now_ms)
            for i in range(count):
                if self.batch.packets[i].reason > VIA_REJECT:
                    raise RuntimeError(f"frame {at + i} was not forwarded")
                replies.answer(at + i, self.batch.packets[i].frame)
            at += count
        return replies

    def __dealloc__(self):
        free(self.batch)
