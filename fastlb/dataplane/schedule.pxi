# The tables of schedule.pxd.

cdef class KetamaRing:
    """Points on a ring, each of one backend; immutable, so snapshots share it."""

    def __cinit__(self, points):
        """``points``: (hash, position of its backend), ascending, at least one."""
        cdef uint32_t count = len(points)
        cdef uint32_t bits = max(1, (<object>count).bit_length() - 1)
        cdef uint32_t at = 0
        cdef uint64_t part
        if count == 0 or any(first > second for (first, _), (second, _) in zip(points, points[1:])):
            raise ValueError("a ring has at least one point, and they ascend")
        self.size, self.shift = count, 64 - bits
        self.points = <uint64_t *>zeroed(count, sizeof(uint64_t))
        self.positions = <uint16_t *>zeroed(count, sizeof(uint16_t))
        self.index = <uint32_t *>zeroed(<size_t>1 << bits, sizeof(uint32_t))
        for number, (hashed, position) in enumerate(points):
            self.points[<uint32_t>number] = hashed
            self.positions[<uint32_t>number] = position
        for part in range(<uint64_t>1 << bits):
            while at < count and self.points[at] >> self.shift < part:
                at += 1
            self.index[part] = at

    def __dealloc__(self):
        free(self.points)
        free(self.positions)
        free(self.index)

    def find(self, uint64_t hashed):
        """The position of the backend that has the first point from ``hashed`` on."""
        cdef uint32_t at = self.index[hashed >> self.shift]
        while at < self.size and self.points[at] < hashed:
            at += 1
        return self.positions[at % self.size]


cdef class Rotation:
    """The order in which backends take turns; immutable, so snapshots share it."""

    def __cinit__(self, turns):
        """``turns``: positions of backends, at least one."""
        self.size = len(turns)
        if self.size == 0:
            raise ValueError("a rotation has at least one turn")
        self.positions = <uint16_t *>zeroed(self.size, sizeof(uint16_t))
        for number, position in enumerate(turns):
            self.positions[<uint32_t>number] = position

    def __dealloc__(self):
        free(self.positions)
