# The Python face of takeover.pxd: how a flow table lies in a file.

cdef enum:
    LARGE_PAGE = 2 << 20     # what the parts of a file are whole multiples of


cdef size_t whole_pages(size_t size) noexcept:
    return (size + LARGE_PAGE - 1) & ~<size_t>(LARGE_PAGE - 1)


cdef uint8_t *map_file(int fd, int64_t offset, size_t size) except NULL:
    """A part of a file, aligned so that large pages can back it."""
    cdef size_t span = size + LARGE_PAGE
    cdef uint8_t *reserved = <uint8_t *>mmap(
        NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef uint8_t *start
    if reserved == MAP_FAILED:
        raise MemoryError(f"no address space for a flow table of {size} bytes")
    start = <uint8_t *>whole_pages(<size_t>reserved)
    if start != reserved:
        munmap(reserved, start - reserved)
    munmap(start + size, reserved + span - (start + size))
    if mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset) != start:
        munmap(start, size)
        raise OSError(errno, "cannot map the flow table's file")
    return start


cdef bint make_ready(void *memory, size_t size) noexcept:
    """So that no packet waits for a page; True when large ones back it all.

    Linux 6.1 gathers a file's small pages into large ones when it is asked to, whatever the policy for others is.
    """
    cdef bint large
    madvise(memory, size, MADV_HUGEPAGE)
    large = madvise(memory, size, MADV_COLLAPSE) == 0
    madvise(memory, size, MADV_POPULATE_WRITE)
    return large


def flow_layout(uint64_t flows):
    """How a table for so many flows lies in memory. Two processes that agree on it can use the same memory.

    ``buckets``, ``tuples``: bytes of the hot and the cold part, in whole large pages; the rest says what is in them.
    """
    cdef FlowEntry entry
    cdef FlowTuple flow
    cdef char *e = <char *>&entry
    cdef char *f = <char *>&flow
    per_shard = buckets_per_shard(flows)
    return {
        "shards": <int>SHARDS,
        "buckets_per_shard": per_shard,
        "buckets": whole_pages(<size_t>per_shard * SHARDS * sizeof(Bucket)),
        "tuples": whole_pages(<size_t>per_shard * SHARDS * ENTRIES * sizeof(FlowTuple)),
        "entry": {
            "fingerprint": <char *>&entry.fingerprint - e, "owner": <char *>&entry.packed - e,
            "seen": <char *>&entry.seen - e, "": sizeof(FlowEntry)},
        "owner": {"backend": <int>BACKEND_BITS, "check": <int>CHECK_BITS},
        "tuple": {
            "client": <char *>&flow.client - f, "vip": <char *>&flow.vip - f, "be_cport": <char *>&flow.be_cport - f,
            "be_vport": <char *>&flow.be_vport - f, "protocol": <char *>&flow.protocol - f,
            "family": <char *>&flow.family - f, "began": <char *>&flow.began - f, "source": <char *>&flow.source - f,
            "since": <char *>&flow.since - f, "": sizeof(FlowTuple)},
        "states": list(STATE_NAMES),
    }


cdef uint32_t buckets_per_shard(uint64_t flows) except 0:
    if not 0 < flows <= 1 << 30:
        raise ValueError(f"a flow table takes 1..{1 << 30} flows, not {flows}")
    return <uint32_t>((flows + SHARDS * 3 - 1) // (SHARDS * 3))
