"""Taking over a flow table that another process has left in memory.

What is found there is verified as far as it can be. An entry stays only if it is what the packets of its flow would
have written:

    the tuple       its fingerprint under the table's key, its shard, one of its two buckets
    written once    backend, source port, beginning: their check in the entry (conntrack.pxd, `check_of`)
    backend         an id that was given; the service that has the tuple's VIP is the backend's
    source port     of fullnat: of the pool, the protocol and the shard, and no other flow's
    state           one that the protocol and the mode have
    last seen       not before the flow began, and not after now

Left is what packets change, within these bounds: of a state that was damaged into another possible one, or a time into
another possible one, all that is wrong is how soon the flow is forgotten, or a SYN starts anew.

What can be computed is not in that memory, and is computed anew: counts, and the records and queues of source ports.

A process may be killed anywhere. Entries are written so that this leaves none half-written (conntrack.pxd); but one in
the middle of a move is in both places, and one of the two goes.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport (
    ENTRIES, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_NONE, FLOW_STATES, FLOW_SYN_ACK, FLOW_UDP, FLOW_UDP_NEW, Bucket,
    FlowEntry, FlowTable, backend_of, first_bucket, is_over, log_end, owns, packed_of, pool_of, second_bucket, state_of,
    tuple_of)
from fastlb.dataplane.flowhash cimport SHARDS, client_mix, fingerprint, shard_of
from fastlb.dataplane.flowlog cimport FlowLog
from fastlb.dataplane.lookup cimport MISSING
from fastlb.dataplane.machine cimport prefetch, unlikely
from fastlb.dataplane.mode cimport translates
from fastlb.dataplane.service cimport find_service
from fastlb.dataplane.sourceport cimport (
    PROTOCOL_ROWS, ROW_BITS, FreePorts, SourcePool, SourcePort, free_ports, nth_port, port_of, ports_per_address,
    put_in_queue)
from fastlb.dataplane.types cimport (
    FAMILY_4, FAMILY_6, FORWARD_FULLNAT, FORWARD_NAT, LOGGED_BIT, PROTO_TCP, PROTO_UDP, FlowTuple, Packet, Service,
    ServiceTable)


cdef enum:
    MAX_DAMAGED = 64         # entries; with more the memory as a whole is not what it was
    FUTURE_MS = 1000         # an entry may be ahead of the clock by a tick; by more, it is weeks old
    AHEAD = 16               # buckets whose tuples are fetched before they are looked at


cdef enum Finding:
    SOUND = 0
    UNWANTED = 1             # whole, but no packet would be sent by it any more
    TWIN = 2                 # the same flow is in its other place
    DAMAGED = 3


cdef struct TakenOver:
    uint64_t found[4]        # entries by finding


# --- an entry --------------------------------------------------------------------------------------------------------

cdef inline bint in_range(const FlowEntry *entry, const FlowTuple *flow, uint32_t highest) noexcept nogil:
    if flow.family == FAMILY_4 and (flow.client.hi != 0 or flow.vip.hi != 0):
        return False
    return (0 < backend_of(entry) <= highest and (flow.family == FAMILY_4 or flow.family == FAMILY_6)
            and is_state_of(flow.protocol, state_of(entry)))


cdef inline bint is_state_of(uint8_t protocol, uint32_t state) noexcept nogil:
    if protocol == PROTO_UDP:
        return state == FLOW_UDP_NEW or state == FLOW_UDP
    return protocol == PROTO_TCP and FLOW_NONE < state < FLOW_STATES and state != FLOW_UDP_NEW and state != FLOW_UDP


cdef inline bint takes_both_legs(uint32_t state) noexcept nogil:
    """True for a state to which a flow comes only where answers pass, too."""
    return state == FLOW_SYN_ACK or state == FLOW_FIN_CLIENT or state == FLOW_FIN_BACKEND


cdef inline bint has_check(const FlowEntry *entry, const FlowTuple *flow) noexcept nogil:
    return entry.packed == packed_of(flow, entry.fingerprint, backend_of(entry), state_of(entry))


cdef inline bint seen_since_it_began(const FlowEntry *entry, const FlowTuple *flow, uint32_t now) noexcept nogil:
    """True if the entry was not last seen before its flow began. Their distances from now are compared.

    For a flow that is older than the 49 days in which the clock comes round, the beginning seems to be later; if it has
    been idle for longer than that seems, it is lost by this.
    """
    return now + FUTURE_MS - entry.seen <= now + FUTURE_MS - flow.since


cdef inline bint has_fingerprint(
        const FlowTable *table, const FlowEntry *entry, const FlowTuple *flow, bint two_way) noexcept nogil:
    return entry.fingerprint == fingerprint(
        table.key, client_mix(table.key, flow.client, flow.be_cport, flow.protocol, flow.family), flow.vip,
        flow.be_vport, two_way)


cdef inline bint has_possible_source(const SourcePool *pool, const FlowTuple *flow, uint32_t shard) noexcept nogil:
    """True if the flow has no source port, or one that `take_port` could have given it and has not given to another."""
    cdef uint32_t row = (flow.source - 1) >> ROW_BITS
    cdef uint32_t port = port_of(flow.source - 1)
    if flow.source == 0:
        return True
    return (row < PROTOCOL_ROWS * pool.count and (row >= pool.count) == (flow.protocol == PROTO_UDP)
            and port % SHARDS == shard and pool.lowest <= port <= pool.highest
            and pool.ports[flow.source - 1].fingerprint == 0)


cdef inline bint has_twin(FlowTable *table, uint32_t shard, const FlowEntry *entry) noexcept nogil:
    """True if an earlier entry has the same fingerprint: the later one of two goes."""
    cdef const FlowEntry *other
    cdef int i
    for i in range(2 * ENTRIES):
        if i < ENTRIES:
            other = &first_bucket(table, shard, entry.fingerprint).entries[i]
        else:
            other = &second_bucket(table, shard, entry.fingerprint).entries[i - ENTRIES]
        if other < entry and other.fingerprint == entry.fingerprint:
            return True
    return False


cdef inline bint is_wanted(
        const FlowTable *table, const FlowEntry *entry, const FlowTuple *flow, const ServiceTable *services,
        uint32_t now) noexcept nogil:
    """True if a packet of the flow would be sent by this entry, with its service and its backend as they are now."""
    cdef const Service *service
    cdef Packet p
    p.dst, p.be_dport, p.family, p.asked = flow.vip, flow.be_vport, flow.family, flow.protocol
    p.service = find_service(services, &p)
    if p.service == MISSING or backend_of(entry) >= services.backend_limit:
        return False
    if not services.backends[backend_of(entry)].present or services.backends[backend_of(entry)].service != p.service:
        return False
    service = &services.services[p.service]
    if (service.forward == FORWARD_FULLNAT) != (flow.source != 0):
        return False
    if not translates(service) and takes_both_legs(state_of(entry)):
        return False
    return (has_fingerprint(table, entry, flow, service.forward == FORWARD_NAT)
            and <int32_t>(now - entry.seen) >= -FUTURE_MS)


cdef inline Finding judge(
        FlowTable *table, const ServiceTable *services, uint32_t shard, const Bucket *bucket, FlowEntry *entry,
        uint32_t highest, uint32_t now) noexcept nogil:
    cdef const FlowTuple *flow = tuple_of(table, entry)
    if not in_range(entry, flow, highest) or shard_of(flow.client, flow.be_cport) != shard:
        return DAMAGED
    if not has_fingerprint(table, entry, flow, True) and not has_fingerprint(table, entry, flow, False):
        return DAMAGED
    if not has_check(entry, flow) or not seen_since_it_began(entry, flow, now):
        return DAMAGED
    if (bucket != first_bucket(table, shard, entry.fingerprint)
            and bucket != second_bucket(table, shard, entry.fingerprint)):
        return DAMAGED
    if has_twin(table, shard, entry):
        return TWIN
    if not has_possible_source(pool_of(table, flow.family), flow, shard):
        return DAMAGED
    return SOUND if is_wanted(table, entry, flow, services, now) else UNWANTED


# --- the table -------------------------------------------------------------------------------------------------------

cdef inline void keep(FlowTable *table, uint32_t shard, FlowEntry *entry, bint logged) noexcept nogil:
    cdef FlowTuple *flow = tuple_of(table, entry)
    cdef SourcePort *port
    table.flows[shard] += 1
    if not logged and flow.began & LOGGED_BIT:
        flow.began &= LOGGED_BIT - 1
        entry.packed = packed_of(flow, entry.fingerprint, backend_of(entry), state_of(entry))
    if flow.source != 0:
        port = &pool_of(table, flow.family).ports[flow.source - 1]
        port.fingerprint = entry.fingerprint
        port.client = flow.client
        port.be_cport = flow.be_cport
        port.be_vport = flow.be_vport
        port.next = flow.since                           # for queue_ports; of a port that is taken no more than a hint


cdef inline void prefetch_tuples(FlowTable *table, uint64_t bucket) noexcept nogil:
    cdef int i
    if bucket >= <uint64_t>table.per_shard * SHARDS:
        return
    for i in range(ENTRIES):
        if table.buckets[bucket].entries[i].fingerprint != 0:
            prefetch(&table.tuples[bucket * ENTRIES + <uint64_t>i])


cdef inline void take_over(
        FlowTable *table, const ServiceTable *services, uint32_t highest, uint32_t now, FlowLog *log, TakenOver *result,
        ) noexcept nogil:
    """Keep entries that are sound and wanted, clear the rest; stop early if more is damaged than is worth anything.

    `highest`: the highest backend id that was ever given. `log`: gets the end of what nobody wants; NULL without a flow
    log. One walk over the table.
    """
    cdef uint64_t at
    cdef uint32_t shard
    cdef Bucket *bucket
    cdef Finding finding
    cdef int i
    for at in range(<uint64_t>table.per_shard * SHARDS):
        prefetch_tuples(table, at + AHEAD)
        bucket = &table.buckets[at]
        shard = <uint32_t>(at // table.per_shard)
        for i in range(ENTRIES):
            if bucket.entries[i].fingerprint == 0:
                continue
            finding = judge(table, services, shard, bucket, &bucket.entries[i], highest, now)
            result.found[<int>finding] += 1
            if finding == SOUND:
                keep(table, shard, &bucket.entries[i], log != NULL)
            else:
                if finding == UNWANTED and log != NULL:
                    log_end(log, &bucket.entries[i], tuple_of(table, &bucket.entries[i]))
                bucket.entries[i].fingerprint = 0
            if unlikely(result.found[<int>DAMAGED] > MAX_DAMAGED):
                return
    queue_ports(&table.pools[0], now)
    queue_ports(&table.pools[1], now)


cdef inline void count_owned(FlowTable *table) noexcept nogil:
    """Count the flows of each backend in this worker's shards. No id is beyond MAX_BACKENDS, because it has no more
    bits."""
    cdef uint64_t at
    cdef FlowEntry *entry
    cdef int i
    for at in range(<uint64_t>table.per_shard * SHARDS):
        if not owns(table, <uint32_t>(at // table.per_shard)):
            continue
        for i in range(ENTRIES):
            entry = &table.buckets[at].entries[i]
            if entry.fingerprint != 0:
                table.stats[backend_of(entry)].active_flows += not is_over(state_of(entry))


# --- source ports ----------------------------------------------------------------------------------------------------

cdef inline void queue_ports(SourcePool *pool, uint32_t now) noexcept nogil:
    cdef uint32_t shard
    for shard in range(SHARDS if pool.count != 0 else 0):
        queue_ports_of(pool, PROTO_TCP, shard, now)
        queue_ports_of(pool, PROTO_UDP, shard, now)


cdef inline uint32_t taken_last(
        const SourcePool *pool, uint8_t protocol, uint32_t shard, uint32_t total, uint32_t now) noexcept nogil:
    """Return which port, in the order of `nth_port`, has the flow that began last; `total` if none is taken."""
    cdef const SourcePort *port
    cdef uint32_t last = total
    cdef uint32_t youngest = 0xFFFFFFFF
    cdef uint32_t nth
    for nth in range(total):
        port = &pool.ports[nth_port(pool, protocol, shard, nth) - 1]
        if port.fingerprint != 0 and now - port.next <= youngest:
            youngest, last = now - port.next, nth
    return last


cdef inline void queue_ports_of(SourcePool *pool, uint8_t protocol, uint32_t shard, uint32_t now) noexcept nogil:
    """Go on behind the port that was taken last, as the process before would have done as long as ports were fresh.

         | taken, and free in between: these go into the queue | free: fresh |
         ^ start                          taken last, by time  ^
    """
    cdef FreePorts *free = free_ports(pool, protocol, shard)
    cdef uint32_t total = ports_per_address(pool, shard) * pool.count
    cdef uint32_t last = taken_last(pool, protocol, shard, total, now)
    cdef uint32_t fresh = 0
    cdef uint32_t i, number
    if last == total:
        return
    while pool.ports[nth_port(pool, protocol, shard, (last + 1 + fresh) % total) - 1].fingerprint == 0:
        fresh += 1                                       # ends at the port that was taken last
    free.start = (last + 1 + fresh) % total
    free.fresh = total - fresh
    for i in range(free.fresh):
        number = nth_port(pool, protocol, shard, (free.start + i) % total)
        if pool.ports[number - 1].fingerprint != 0:
            free.taken += 1
        else:
            put_in_queue(pool, free, number)
