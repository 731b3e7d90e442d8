"""A read-only hash table from (address, port, protocol) to a number, for everything that is found by address."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from fastlb.dataplane.machine cimport mul_fold, must
from fastlb.dataplane.types cimport Addr, Slot, Table


cdef enum:
    MISSING = 0xFFFFFFFFU


cdef inline uint64_t key_meta(uint8_t family, uint8_t protocol, uint16_t be_port) noexcept nogil:
    return <uint64_t>be_port | <uint64_t>protocol << 16 | <uint64_t>family << 24


cdef inline uint64_t key_hash(Addr addr, uint64_t meta) noexcept nogil:
    return mul_fold(addr.lo ^ meta * <uint64_t>0x9E3779B97F4A7C15ULL, addr.hi ^ <uint64_t>0xD6E8FEB86659FD93ULL)


cdef inline uint32_t find(const Table *table, Addr addr, uint64_t meta) noexcept nogil:
    """Return the value under a key, or MISSING. Bounded: at most a quarter of the table is full, so an empty slot ends
    the probe."""
    cdef uint64_t at = key_hash(addr, meta) & table.mask
    cdef const Slot *slot = &table.slots[at]
    while slot.used:
        if slot.key.meta == meta and slot.key.addr.lo == addr.lo and slot.key.addr.hi == addr.hi:
            return slot.value
        at = (at + 1) & table.mask
        slot = &table.slots[at]
    return MISSING


cdef inline bint table_init(Table *table, uint64_t entries) noexcept nogil:
    """Make room for `entries` keys at a quarter load; False if memory is short.

    The table is so sparse, and never small, because most look-ups of a reply are misses, which should end at their
    first slot.
    """
    cdef uint64_t size = 64
    while size < entries * 4:
        size *= 2
    table.slots = <Slot *>calloc(size, sizeof(Slot))
    table.mask = size - 1
    return table.slots != NULL


cdef inline void table_free(Table *table) noexcept nogil:
    free(table.slots)
    table.slots = NULL


cdef inline void table_put(Table *table, Addr addr, uint64_t meta, uint32_t value) noexcept nogil:
    """Insert or overwrite a key. The caller has sized the table for all its keys."""
    cdef uint64_t home = key_hash(addr, meta) & table.mask
    cdef uint64_t at = home
    while table.slots[at].used and not (
            table.slots[at].key.meta == meta and table.slots[at].key.addr.lo == addr.lo
            and table.slots[at].key.addr.hi == addr.hi):
        at = (at + 1) & table.mask
        must(at != home)
    table.slots[at].key.addr = addr
    table.slots[at].key.meta = meta
    table.slots[at].value = value
    table.slots[at].used = 1
