"""The measuring loop: frames from a pool in memory, a batch at a time, through the pipeline itself.

The pool stands for the receive ring: frames lie one behind the other in the order of their arrival. A batch is copied
out of it, because the pipeline rewrites in place and the pool must stay as it is. `walk` does this and touches every
frame; `run` does this and calls `run_batch`; the difference is what the pipeline costs.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fastlb._core cimport Pipeline
from fastlb.dataplane.abi cimport (
    MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap, timespec)
from fastlb.dataplane.checksum cimport difference, fold, sum_bytes, update_checksum
from fastlb.dataplane.conntrack cimport Bucket
from fastlb.dataplane.flowhash cimport SHARDS
from fastlb.dataplane.machine cimport load16, load64, store16, store32
from fastlb.dataplane.pipeline cimport run_batch
from fastlb.dataplane.publish cimport pick_up
from fastlb.dataplane.reasons cimport VIA_REJECT
from fastlb.dataplane.types cimport BATCH, FAMILY_4, Packet, Snapshot
from fastlb.dataplane.wire cimport (
    ETH_LEN, IP4_CSUM, IP4_DST, IP4_LEN, IP4_SRC, IP6_DST, IP6_LEN, IP6_SRC, TCP_CSUM, TCP_FLAGS, write_be16, write_be32)

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC_RAW
    int clock_gettime(int clock, timespec *now) noexcept


cdef enum:
    LINE = 64
    BUFFER = 256             # from one frame of a batch to the next: about what a 64-byte frame takes in a ring
    BUFFER_START = 66        # IP headers aligned to four, as PACKET_RESERVE does in the ring
    FIRST_PORT = 1024


cdef inline uint32_t scramble(uint32_t x) noexcept nogil:
    """A bijection on 32 bits (the finalizer of MurmurHash3): distinct flows keep distinct tuples."""
    x = (x ^ (x >> 16)) * <uint32_t>0x85EBCA6BU
    x = (x ^ (x >> 13)) * <uint32_t>0xC2B2AE35U
    return x ^ (x >> 16)


cdef inline uint64_t nanoseconds() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_RAW, &now)
    return <uint64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class Frames:
    """``count`` TCP frames of ``flows`` clients in random order, made from ``template``.

    ``template``: an Ethernet frame with IPv4 or IPv6 and TCP, without options, whose client has port 0 and an address
    that ends in 32 zero bits, with correct checksums. Flow n gets an address and a port of its own.
    """

    cdef uint8_t *memory
    cdef size_t stride
    cdef readonly uint32_t count
    cdef readonly uint32_t length
    cdef uint32_t source     # offset of the 32 bits that tell clients apart
    cdef uint32_t l4

    def __cinit__(self, bytes template not None, uint32_t count):
        cdef bint four = template[ETH_LEN] >> 4 == 4
        self.length = len(template)
        self.stride = (self.length + LINE - 1) // LINE * LINE
        self.count = count
        self.l4 = ETH_LEN + (IP4_LEN if four else IP6_LEN)
        self.source = ETH_LEN + (IP4_SRC if four else IP6_SRC + 12)
        self.memory = <uint8_t *>mmap(
            NULL, self.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if self.memory == MAP_FAILED:
            self.memory = NULL
            raise MemoryError(f"the pool needs {self.size()} bytes")
        madvise(self.memory, self.size(), MADV_HUGEPAGE)
        self.fill(template)

    cdef size_t size(self):
        return self.stride * self.count

    cdef int fill(self, bytes template) except -1:
        cdef uint32_t at
        for at in range(self.count):
            memcpy(self.memory + at * self.stride, <const char *>template, self.length)

    def assign(self, uint32_t first, uint32_t flows, uint64_t seed=1):
        """Give the frames to the flows first..first+flows-1, in shuffled order, each flow as often as any other."""
        cdef uint32_t *order = <uint32_t *>calloc(self.count, sizeof(uint32_t))
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
            self.set_client(self.memory + at * self.stride, order[at])
        free(order)

    cdef void set_client(self, uint8_t *frame, uint32_t flow) noexcept nogil:
        """2**18 addresses with 2**14 ports each; checksums follow."""
        cdef uint32_t client = scramble(flow)
        cdef uint64_t before = sum_bytes(frame + self.source, 4) + load16(frame + self.l4)
        cdef uint64_t addresses = sum_bytes(frame + self.source, 4)
        write_be32(frame + self.source, <uint32_t>100 << 24 | client >> 14)
        write_be16(frame + self.l4, FIRST_PORT + (client & 0x3FFF))
        if self.l4 == ETH_LEN + IP4_LEN:
            update_checksum(frame + ETH_LEN + IP4_CSUM, difference(addresses, sum_bytes(frame + self.source, 4)))
        update_checksum(
            frame + self.l4 + TCP_CSUM,
            difference(before, sum_bytes(frame + self.source, 4) + load16(frame + self.l4)))

    def set_flags(self, uint8_t flags):
        """Set every frame's TCP flags."""
        cdef uint8_t *tcp
        cdef uint16_t old
        cdef uint32_t at
        for at in range(self.count):
            tcp = self.memory + at * self.stride + self.l4
            old = load16(tcp + TCP_FLAGS - 1)
            tcp[TCP_FLAGS] = flags
            update_checksum(tcp + TCP_CSUM, difference(old, load16(tcp + TCP_FLAGS - 1)))

    def turn_around(self, uint32_t at, const uint8_t *sent):
        pass

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.size())
