# The Python face of affinity.pxd.

cdef class AffinityMemory:
    """What the pipelines of all workers share of the affinity table; they share a flow table's key, too.

    ``entries``: how many clients it has room for, rounded up to whole buckets. Raises ValueError, and MemoryError when
    there is no room.
    """

    def __cinit__(self, uint64_t entries):
        if not 0 < entries <= 1 << 24:
            raise ValueError(f"an affinity table takes 1..{1 << 24} entries, not {entries}")
        self.table.buckets = <uint32_t>((entries + WAYS_OF_AFFINITY - 1) // WAYS_OF_AFFINITY)
        self.table.slots = <uint64_t *>map_zeroed(self.table.buckets * WAYS_OF_AFFINITY * sizeof(uint64_t))

    def __dealloc__(self):
        unmap(self.table.slots, self.table.buckets * WAYS_OF_AFFINITY * sizeof(uint64_t))

    @property
    def size(self):
        """How many slots there are."""
        return self.table.buckets * WAYS_OF_AFFINITY

    def in_use(self, uint32_t now_ms):
        """Count the slots that hold at this time."""
        cdef uint64_t count = 0
        cdef uint64_t at
        with nogil:
            for at in range(<uint64_t>self.table.buckets * WAYS_OF_AFFINITY):
                count += not is_free(load_acquire_u64(&self.table.slots[at]), tick_of(now_ms))
        return count
