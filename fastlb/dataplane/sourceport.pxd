"""The source ports of full NAT: every flow has one of its own, by which the backend's answers name the flow.

A port belongs to the shard that its last six bits name. A flow takes a port of its own shard, and the answers, steered
by that port, come back to the shard's worker: no port has two writers, and nothing is locked. The memory outlives a
worker, like that of the flow table.

    number of a port within its pool     | protocol, address | shard : 6 | upper 10 bits of the port |
                                           rows of 65,536

A port that is given back waits behind all others that are free, so the one that was unused longest is taken next: its
last flow has had time to end at the backend too (TIME-WAIT, RFC 9293 section 3.6.1). For the same reason the first port
is random: after a restart the backends remember the flows of before.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.flowhash cimport SHARDS, SHARD_BITS
from fastlb.dataplane.lookup cimport MISSING, find, key_meta
from fastlb.dataplane.machine cimport bswap16, must
from fastlb.dataplane.types cimport PROTO_UDP, Addr, Table


cdef enum:
    ROW_BITS = 16            # a row: the ports of one address and protocol
    PORT_BITS = 10           # of a port, those above its shard's
    PROTOCOL_ROWS = 2        # TCP and UDP
    MAX_SOURCES = 255        # addresses of one IP version


cdef struct SourcePort:
    # What an answer needs of the flow that has the port, in half a cache line.
    Addr client
    uint64_t fingerprint     # 0: the port is free
    uint16_t be_cport
    uint16_t be_vport
    uint32_t next            # free: the port behind it in the queue; 0: the last. Taken: where its flow's entry was


cdef struct FreePorts:
    # The free ports of one shard and protocol, on a cache line of its own. Ports are their number + 1; 0: none.
    uint32_t start           # which of them is taken first of all
    uint32_t fresh           # how many have been taken for the first time
    uint32_t first
    uint32_t last
    uint32_t taken
    uint8_t pad[44]


cdef struct SourcePool:
    # The addresses and ports of one IP version.
    Addr *addresses
    Table positions          # address -> its position
    uint32_t count           # of addresses; 0: there are none
    uint16_t lowest
    uint16_t highest
    SourcePort *ports
    FreePorts *free          # by protocol and shard


cdef inline uint32_t row_of(const SourcePool *pool, uint8_t protocol, uint32_t address) noexcept nogil:
    return (pool.count if protocol == PROTO_UDP else 0) + address


cdef inline uint32_t number_of(uint32_t row, uint32_t port) noexcept nogil:
    return row << ROW_BITS | (port & (SHARDS - 1)) << PORT_BITS | port >> SHARD_BITS


cdef inline uint32_t port_of(uint32_t number) noexcept nogil:
    return (number & ((1 << PORT_BITS) - 1)) << SHARD_BITS | number >> PORT_BITS & (SHARDS - 1)


cdef inline uint16_t be_port_of(uint32_t number) noexcept nogil:
    return bswap16(<uint16_t>port_of(number))


cdef inline Addr address_of(const SourcePool *pool, uint32_t number) noexcept nogil:
    cdef uint32_t row = number >> ROW_BITS
    must(row < PROTOCOL_ROWS * pool.count)
    return pool.addresses[row if row < pool.count else row - pool.count]


cdef inline FreePorts *free_ports(const SourcePool *pool, uint8_t protocol, uint32_t shard) noexcept nogil:
    must(shard < SHARDS)
    return &pool.free[(SHARDS if protocol == PROTO_UDP else 0) + shard]


cdef inline uint32_t first_port(const SourcePool *pool, uint32_t shard) noexcept nogil:
    """Return the lowest port of the range that is the shard's."""
    return pool.lowest + ((shard - pool.lowest) & (SHARDS - 1))


cdef inline uint32_t ports_per_address(const SourcePool *pool, uint32_t shard) noexcept nogil:
    cdef uint32_t first = first_port(pool, shard)
    return 0 if first > pool.highest else (pool.highest - first) // SHARDS + 1


cdef inline uint32_t nth_port(const SourcePool *pool, uint8_t protocol, uint32_t shard, uint32_t nth) noexcept nogil:
    """Return a port as `take_port` does, counted in the order in which the shard's are taken for the first time."""
    return 1 + number_of(
        row_of(pool, protocol, nth % pool.count), first_port(pool, shard) + nth // pool.count * SHARDS)


cdef inline uint32_t take_port(SourcePool *pool, uint8_t protocol, uint32_t shard) noexcept nogil:
    """Take a port. Returns its number + 1, or 0 if all of the shard's are taken. Those never used come first, address
    by address."""
    cdef FreePorts *free
    cdef uint32_t taken, total
    if pool.count == 0:
        return 0
    free = free_ports(pool, protocol, shard)
    total = ports_per_address(pool, shard) * pool.count
    if free.fresh < total:
        taken = nth_port(pool, protocol, shard, <uint32_t>((<uint64_t>free.start + free.fresh) % total))
        free.fresh += 1
    else:
        taken = free.first
        if taken == 0:
            return 0
        free.first = pool.ports[taken - 1].next
        if free.first == 0:
            free.last = 0
    must(pool.ports[taken - 1].fingerprint == 0)
    free.taken += 1
    return taken


cdef inline void put_in_queue(SourcePool *pool, FreePorts *free, uint32_t taken) noexcept nogil:
    """Put a port at the end of the free ones. `taken`: as `take_port` returns it."""
    pool.ports[taken - 1].fingerprint = 0
    pool.ports[taken - 1].next = 0
    if free.last != 0:
        pool.ports[free.last - 1].next = taken
    else:
        free.first = taken
    free.last = taken


cdef inline bint has_port(
        const SourcePool *pool, uint32_t taken, uint32_t shard, uint64_t fingerprint) noexcept nogil:
    """True if this port, as `take_port` returns it, is that of the shard's flow with this fingerprint."""
    cdef uint32_t number = taken - 1
    return (number >> ROW_BITS < PROTOCOL_ROWS * pool.count and port_of(number) & (SHARDS - 1) == shard
            and pool.ports[number].fingerprint == fingerprint)


cdef inline void give_back(SourcePool *pool, uint8_t protocol, uint32_t shard, uint32_t taken) noexcept nogil:
    """Give a port back. `taken`: as `take_port` returns it."""
    cdef FreePorts *free = free_ports(pool, protocol, shard)
    must(free.taken > 0 and port_of(taken - 1) & (SHARDS - 1) == shard)
    put_in_queue(pool, free, taken)
    free.taken -= 1


cdef inline uint32_t position_of(const SourcePool *pool, Addr address, uint8_t family) noexcept nogil:
    """Return the position of one of the pool's addresses, else MISSING."""
    return MISSING if pool.count == 0 else find(&pool.positions, address, key_meta(family, 0, 0))


cdef inline uint32_t find_port(
        const SourcePool *pool, Addr address, uint16_t be_port, uint8_t protocol, uint8_t family) noexcept nogil:
    """Return the port that a packet was sent to, as `take_port` does; 0 if it is none of the pool's."""
    cdef uint32_t port = bswap16(be_port)
    cdef uint32_t position
    if pool.count == 0 or not pool.lowest <= port <= pool.highest:
        return 0
    position = position_of(pool, address, family)
    return 0 if position == MISSING else 1 + number_of(row_of(pool, protocol, position), port)
