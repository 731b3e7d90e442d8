# The tables of schedule.pxd.

cdef void count_points(uint32_t *ends, const uint64_t *hashes, uint32_t count, uint32_t shift) noexcept nogil:
    cdef uint32_t i
    for i in range(count):
        ends[(hashes[i] >> shift) + 1] += 1


cdef class KetamaRing:
    """Points on a ring, each of one backend; immutable, so snapshots share it."""

    def __cinit__(self, parts):
        """``parts``: of each backend the hashes of its points, as bytes, native 64-bit integers.

        They are sorted by counting: by their upper bits, of which there are about as many values as points, and the
        few with the same by insertion. ``index`` has where those of each value begin, which lookups use.
        """
        cdef uint32_t count = sum(len(part) for part in parts) // sizeof(uint64_t)
        cdef uint32_t bits = max(1, (<object>count).bit_length() - 1)
        cdef uint32_t i
        if count == 0:
            raise ValueError("a ring has at least one point")
        self.size, self.shift = count, 64 - bits
        self.points = <uint64_t *>zeroed(count, sizeof(uint64_t))
        self.positions = <uint16_t *>zeroed(count, sizeof(uint16_t))
        self.index = <uint32_t *>zeroed((<size_t>1 << bits) + 1, sizeof(uint32_t))
        for part in parts:
            count_points(self.index, <const uint64_t *><const char *>part, len(part) // sizeof(uint64_t), self.shift)
        for i in range(1 << bits):
            self.index[i + 1] += self.index[i]
        for position, part in enumerate(parts):
            self.put(<const uint64_t *><const char *>part, len(part) // sizeof(uint64_t), position)
        for i in range(1 << bits, 0, -1):                # each has moved on to where the next begins
            self.index[i] = self.index[i - 1]
        self.index[0] = 0
        self.sort()

    cdef void put(self, const uint64_t *hashes, uint32_t count, uint16_t position) noexcept nogil:
        cdef uint32_t i, at
        for i in range(count):
            at = self.index[hashes[i] >> self.shift]
            self.index[hashes[i] >> self.shift] = at + 1
            self.points[at], self.positions[at] = hashes[i], position

    cdef void sort(self) noexcept nogil:
        """Sort by insertion: a point is at most as far from where it belongs as others have its upper bits."""
        cdef uint32_t i, at
        cdef uint64_t point
        cdef uint16_t position
        for i in range(1, self.size):
            point, position = self.points[i], self.positions[i]
            at = i
            while at > 0 and self.points[at - 1] > point:
                self.points[at], self.positions[at] = self.points[at - 1], self.positions[at - 1]
                at -= 1
            self.points[at], self.positions[at] = point, position

    def __dealloc__(self):
        free(self.points)
        free(self.positions)
        free(self.index)


cdef class SmoothWrr:
    """The order in which backends take turns (smooth weighted round robin); immutable, so snapshots share it."""

    def __cinit__(self, turns):
        """``turns``: the positions of backends in the order of their turns, at least one."""
        self.size = len(turns)
        if self.size == 0:
            raise ValueError("a rotation has at least one turn")
        self.positions = <uint16_t *>zeroed(self.size, sizeof(uint16_t))
        for number, position in enumerate(turns):
            self.positions[<uint32_t>number] = position

    def __dealloc__(self):
        free(self.positions)
