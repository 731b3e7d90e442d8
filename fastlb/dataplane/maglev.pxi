# The Python face of maglev.pxd.

cdef class MaglevTable:
    """A populated Maglev table; immutable, so snapshots share it."""

    def __cinit__(self, bytes hashes, bytes weights, uint32_t size):
        """``hashes``: of each backend, sorted by key, two native 64-bit integers: offset hash and skip hash;
        ``weights``: of each a native 32-bit integer; ``size``: a prime.
        """
        cdef uint32_t count = len(weights) // sizeof(uint32_t)
        cdef const uint64_t *hashed = <const uint64_t *><const char *>hashes
        cdef const uint32_t *weight = <const uint32_t *><const char *>weights
        cdef Permutation *state
        if not 0 < count < MAX_MEMBERS:
            raise ValueError(f"a Maglev table takes 1 to {MAX_MEMBERS - 1} backends, not {count}")
        if <size_t>len(hashes) != 2 * sizeof(uint64_t) * count:
            raise ValueError(f"{len(hashes)} bytes of hashes for {count} backends")
        if not any(weights):
            raise ValueError("a Maglev table needs a backend with a weight above 0")
        self.size = size
        self.slots = <uint16_t *>malloc(size * sizeof(uint16_t))
        state = <Permutation *>malloc(count * sizeof(Permutation))
        if self.slots == NULL or state == NULL:
            free(state)
            raise MemoryError
        with nogil:
            permute(state, hashed, weight, count, size)
            populate(self.slots, size, state, count)
        free(state)

    def __dealloc__(self):
        free(self.slots)

    def to_bytes(self):
        """Return the positions, ``size`` native 16-bit integers."""
        return PyBytes_FromStringAndSize(<char *>self.slots, self.size * sizeof(uint16_t))
