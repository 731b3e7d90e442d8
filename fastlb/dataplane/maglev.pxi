# The Python face of maglev.pxd.

cdef class MaglevTable:
    """A populated Maglev table; immutable, so snapshots share it."""

    def __cinit__(self, turns, uint32_t size):
        """``turns``: (offset hash, skip hash, weight) for each backend, sorted by key; ``size``: a prime."""
        cdef uint32_t count = len(turns)
        cdef Permutation *state
        cdef uint32_t i
        if not 0 < count < MAX_MEMBERS:
            raise ValueError(f"a Maglev table takes 1 to {MAX_MEMBERS - 1} backends, not {count}")
        if not any(weight for _, _, weight in turns):
            raise ValueError("a Maglev table needs a backend with a weight above 0")
        self.size = size
        self.slots = <uint16_t *>malloc(size * sizeof(uint16_t))
        state = <Permutation *>malloc(count * sizeof(Permutation))
        if self.slots == NULL or state == NULL:
            free(state)
            raise MemoryError
        try:
            for i, (offset_hash, skip_hash, weight) in enumerate(turns):
                state[i].target = 0
                state[i].weight = weight
                state[i].next = offset_hash % size
                state[i].skip = skip_hash % (size - 1) + 1
            with nogil:
                populate(self.slots, size, state, count)
        finally:
            free(state)

    def __dealloc__(self):
        free(self.slots)

    def to_bytes(self):
        """The positions, ``size`` native 16-bit integers."""
        return PyBytes_FromStringAndSize(<char *>self.slots, self.size * sizeof(uint16_t))
