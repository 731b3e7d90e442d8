"""Population of a Maglev table (Eisenbud et al., NSDI 2016, section 3.4) with weighted turns as Envoy takes them.

Backends come sorted by key. In pass t = 1, 2, … a backend is passed over while t · weight is below its target, and
each turn that it takes raises its target by the largest weight.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from fastlb.dataplane.machine cimport must


cdef enum:
    EMPTY_SLOT = 0xFFFF
    MAX_MEMBERS = 0xFFFF     # backends of one table: positions are 16 bits, the last one marks an empty slot


cdef struct Permutation:
    uint64_t target
    uint32_t weight
    uint32_t next            # the slot that this backend would like next
    uint32_t skip


cdef inline void permute(
        Permutation *state, const uint64_t *hashes, const uint32_t *weights, uint32_t count, uint32_t size,
        ) noexcept nogil:
    """Set where each backend's permutation of the slots begins, and its step: (hash mod M, hash mod (M - 1) + 1)."""
    cdef uint32_t i
    for i in range(count):
        state[i].target = 0
        state[i].weight = weights[i]
        state[i].next = <uint32_t>(hashes[2 * i] % size)
        state[i].skip = <uint32_t>(hashes[2 * i + 1] % (size - 1)) + 1


cdef inline void populate(uint16_t *slots, uint32_t size, Permutation *permutations, uint32_t count) noexcept nogil:
    """Fill `size` slots (prime, above every skip) with positions in `permutations`; one weight at least is positive.

    `permutations` come with target 0 and next = offset. Expected work: size · ln(size) looks at a slot.
    """
    cdef uint64_t largest = 0
    cdef uint64_t step = 0
    cdef uint32_t filled = 0
    cdef uint32_t i, slot
    for i in range(size):
        slots[i] = EMPTY_SLOT
    for i in range(count):
        must(permutations[i].target == 0 and permutations[i].next < size and 0 < permutations[i].skip < size)
        largest = max(largest, <uint64_t>permutations[i].weight)
    must(largest > 0)                                    # else nothing below would ever fill a slot
    while True:
        step += 1
        for i in range(count):
            if step * permutations[i].weight < permutations[i].target or permutations[i].weight == 0:
                continue
            permutations[i].target += largest
            slot = permutations[i].next
            while slots[slot] != EMPTY_SLOT:
                slot += permutations[i].skip
                if slot >= size:
                    slot -= size
            slots[slot] = <uint16_t>i
            permutations[i].next = slot + permutations[i].skip
            if permutations[i].next >= size:
                permutations[i].next -= size
            filled += 1
            if filled == size:
                return
