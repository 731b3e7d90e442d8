"""The host's routes as the data path looks them up: intervals of addresses, each with one way.

A routing table is a function of the address that is constant from one boundary to the next. Neighbouring intervals with
the same way are one, so a million prefixes through one gateway take as much room as one; at most there are two
intervals a prefix, however long prefixes are and however they nest.

    hi[], lo[]   where each interval begins, as 128 bits in host order, sorted; the first one begins at 0
    way[]        by interval, an index of the caller's; NO_WAY

An IPv4 address has the first 32 of the 128 bits. ``lo`` is NULL as long as it would only hold zeros, as with IPv4 and
with IPv6 prefixes of 64 bits at most.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastlb.dataplane.machine cimport bswap64
from fastlb.dataplane.types cimport FAMILY_4, Addr, Intervals


cdef enum:
    NO_WAY = 0xFFFFFFFFU
    INDEX_BITS = 16          # of an address, by which a search begins in a table of many
    INDEX_FROM = 64          # intervals
    KEY_ROOM = 1 << 16       # bytes of attributes: what one datagram may have


cdef struct ParsedRoute:
    uint64_t hi
    uint64_t lo
    uint32_t length
    uint8_t family
    uint8_t key[KEY_ROOM]    # the attributes, but for the prefix
    uint32_t key_length


cdef struct Enclosing:
    # A prefix that may hold the next ones: its last address, and its way.
    uint64_t hi
    uint64_t lo
    uint32_t way


cdef inline bint begins_behind(const Intervals *table, uint32_t at, uint64_t hi, uint64_t lo) noexcept nogil:
    """Return whether an interval begins behind an address."""
    if table.hi[at] != hi:
        return table.hi[at] > hi
    return table.lo != NULL and table.lo[at] > lo


cdef inline uint32_t find_way(const Intervals *table, uint64_t hi, uint64_t lo) noexcept nogil:
    """Return the way of the interval that holds an address. Bounded: the search halves what is left at each step."""
    cdef uint32_t first = 0, end = table.count, middle
    if table.index != NULL:
        first = table.index[hi >> (64 - INDEX_BITS)]
        end = table.index[(hi >> (64 - INDEX_BITS)) + 1] + 1
    while end - first > 1:
        middle = first + (end - first) // 2
        if begins_behind(table, middle, hi, lo):
            end = middle
        else:
            first = middle
    return table.way[first]


cdef inline uint32_t way_to_address(const Intervals *table4, const Intervals *table6, Addr addr, uint8_t family) \
        noexcept nogil:
    if family == FAMILY_4:
        return find_way(table4, bswap64(addr.lo) << 32, 0)
    return find_way(table6, bswap64(addr.hi), bswap64(addr.lo))
