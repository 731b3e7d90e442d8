"""The flow table.

Its memory is shared by all workers; a shard is read and written only by the worker that owns it, so nothing is locked.

Invariant: a flow has at most one entry, in one of the two buckets that the upper half of its fingerprint names within
its shard. An entry's fingerprint is written last and cleared first, so that a process may be killed at any point: what
is in the table has been written whole (takeover.pxd). A shard's count is of entries. A backend's is of flows that are
not over: a closed connection is remembered for a while, but is no load. Both change only where an entry is written,
ends, or is forgotten.

    hot    shard 0                              shard 1                        … 63
           ┌ bucket: 64 bytes, one cache line ┐
           │ entry │ entry │ entry │ entry    │ …
           └──────────────────────────────────┘
    entry  | fingerprint 64 | backend id 20, check 8, state 4 | last seen 32 (ms) |          16 bytes
    cold   one FlowTuple per entry, in the same order: written once a flow, read by commands

The check is of all that is written once a flow (`check_of`): whoever takes the table over sees by it what is damaged.

A full pair of buckets makes room in this order: an expired entry, moving one entry to its other bucket, the oldest
half-open entry. An established flow is never given up for a new one.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.flowhash cimport SHARDS
from fastlb.dataplane.flowhash cimport fingerprint as flow_fingerprint
from fastlb.dataplane.flowlog cimport FlowLog, log_flow
from fastlb.dataplane.machine cimport in_order, likely, lowest_bit, must, prefetch, unlikely
from fastlb.dataplane.sourceport cimport SourcePool, SourcePort, give_back, has_port
from fastlb.dataplane.types cimport (
    FAMILY_6, KEEP_NONE, LEG_CLIENT, LOGGED_BIT, PROTO_TCP, Backend, BackendStats, FlowTuple, Packet, Service,
    ServiceEvents, ServiceTable)
from fastlb.dataplane.wire cimport TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, same_addr


cdef enum:
    ENTRIES = 4              # a bucket
    BACKEND_BITS = 20
    CHECK_BITS = 8
    STATE_SHIFT = BACKEND_BITS + CHECK_BITS
    MAX_BACKENDS = 1 << BACKEND_BITS     # ids
    SWEEP_PERIOD_MS = 10000  # in which the sweep visits every bucket once


cdef enum FlowState:
    FLOW_NONE = 0
    FLOW_SYN = 1             # the client's SYN
    FLOW_SYN_ACK = 2         # and the backend's answer (two-way modes)
    FLOW_PICKED_UP = 3       # found in mid-flow; one packet proves nothing
    FLOW_UDP_NEW = 4         # one direction so far
    FLOW_ESTABLISHED = 5
    FLOW_FIN_CLIENT = 6
    FLOW_FIN_BACKEND = 7
    FLOW_UDP = 8
    FLOW_CLOSING = 9         # FIN from both sides, or from the only side that is seen
    FLOW_RESET = 10
    FLOW_STATES = 11


cdef struct FlowEntry:
    uint64_t fingerprint     # 0: empty
    uint32_t packed          # from the lowest bit: backend id 20, check 8, state 4
    uint32_t seen            # milliseconds


cdef struct Bucket:
    FlowEntry entries[ENTRIES]


cdef struct FlowTable:
    # One worker's view of it. Down to `per_shard`, all workers have the same.
    Bucket *buckets
    FlowTuple *tuples
    uint64_t *flows          # entries by shard
    uint64_t key[4]
    SourcePool pools[2]      # IPv4, IPv6
    uint32_t per_shard       # buckets
    uint32_t owned_shards    # how many bits of `owned` are set
    uint64_t owned           # the shards of this worker, a bit each
    BackendStats *stats      # by backend id
    BackendStats **rows      # the same of all workers
    uint32_t *row_count
    ServiceEvents *events    # by slot; NULL: not counted
    FlowLog log
    bint emptied             # an entry in use has become empty since this was set to False
    uint32_t sweep_shard
    uint32_t sweep_bucket
    uint32_t sweep_time
    uint64_t evicted         # half-open flows given up for newer ones
    uint64_t untracked       # flows forwarded without an entry: every candidate held an established flow
    uint64_t expired


# --- states ----------------------------------------------------------------------------------------------------------

cdef inline bint half_open(uint32_t state) noexcept nogil:
    return state <= FLOW_UDP_NEW or state >= FLOW_CLOSING


cdef inline bint is_over(uint32_t state) noexcept nogil:
    """True for a flow that has ended: a SYN starts a new one at once."""
    return state >= FLOW_CLOSING


cdef inline uint32_t first_state(const Packet *p) noexcept nogil:
    if p.protocol != PROTO_TCP:
        return FLOW_UDP_NEW
    return FLOW_SYN if p.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN else FLOW_PICKED_UP


cdef inline bint begins(uint32_t state, uint8_t flags) noexcept nogil:
    """True if this SYN from a backend answers a client's SYN.

    On a flow that one side has closed it does, because the old connection is over for the backend: else it would have
    answered with an ACK of that (RFC 9293 section 3.10.7.4). The client's SYN alone says nothing, anybody can forge it.
    """
    return state == FLOW_SYN or (
        flags & TCP_ACK != 0 and (state == FLOW_FIN_CLIENT or state == FLOW_FIN_BACKEND))


cdef inline uint32_t next_tcp_state(uint32_t state, uint8_t flags, bint from_client, bint two_way) noexcept nogil:
    """Return the next state of a TCP flow, from what this balancer can see of it."""
    if flags & TCP_RST:
        return FLOW_RESET
    if state == FLOW_RESET and from_client and not flags & (TCP_SYN | TCP_FIN):
        return FLOW_PICKED_UP          # a client that was really reset sends no such thing: the RST was not its own
    if is_over(state):
        return state
    if flags & TCP_FIN:
        if not two_way:
            return FLOW_CLOSING
        if from_client and (state == FLOW_SYN or state == FLOW_PICKED_UP):
            return FLOW_CLOSING        # no backend has answered: two forged packets must not look established
        if state == (FLOW_FIN_BACKEND if from_client else FLOW_FIN_CLIENT):
            return FLOW_CLOSING
        return FLOW_FIN_CLIENT if from_client else FLOW_FIN_BACKEND
    if flags & TCP_SYN:
        return FLOW_SYN_ACK if not from_client and begins(state, flags) else state
    if state >= FLOW_ESTABLISHED:
        return state
    if not two_way:
        return FLOW_ESTABLISHED
    # Two-way: the handshake is over when each side has answered the other.
    if state == FLOW_SYN:
        return FLOW_SYN if from_client else FLOW_ESTABLISHED
    if state == FLOW_SYN_ACK:
        return FLOW_ESTABLISHED if from_client else FLOW_SYN_ACK
    return FLOW_PICKED_UP if from_client else FLOW_ESTABLISHED


cdef inline uint32_t next_udp_state(uint32_t state, bint from_client, bint two_way) noexcept nogil:
    if state == FLOW_UDP_NEW and (not two_way or not from_client):
        return FLOW_UDP
    return state


# --- entries ---------------------------------------------------------------------------------------------------------

cdef inline uint32_t state_of(const FlowEntry *entry) noexcept nogil:
    return entry.packed >> STATE_SHIFT


cdef inline uint32_t backend_of(const FlowEntry *entry) noexcept nogil:
    return entry.packed & (MAX_BACKENDS - 1)


cdef inline uint32_t check_of(const FlowTuple *flow, uint64_t fingerprint, uint32_t backend) noexcept nogil:
    """Return a parity of what no packet changes after the flow was entered and the fingerprint does not cover.

    One flipped bit, or any number among eight in a row, always makes another check; other damage does in 255 of 256
    cases.
    """
    cdef uint32_t folded = (<uint32_t>fingerprint ^ <uint32_t>(fingerprint >> 32) ^ backend
                            ^ flow.since ^ flow.source ^ flow.began)
    folded ^= folded >> 16
    return (folded ^ folded >> 8) & ((1 << CHECK_BITS) - 1)


cdef inline uint32_t packed_of(
        const FlowTuple *flow, uint64_t fingerprint, uint32_t backend, uint32_t state) noexcept nogil:
    return backend | check_of(flow, fingerprint, backend) << BACKEND_BITS | state << STATE_SHIFT


cdef inline bint has_expired(const FlowEntry *entry, const ServiceTable *services, uint32_t now) noexcept nogil:
    """True if the entry has timed out, or its id is beyond all backends. A clock that steps back lets nothing
    expire."""
    cdef int32_t idle = <int32_t>(now - entry.seen)
    cdef uint32_t backend = backend_of(entry)
    if unlikely(backend >= services.backend_limit):
        return True
    return unlikely(idle > <int32_t>services.timeouts[services.backends[backend].timeouts].of_state[state_of(entry)])


cdef inline bint is_stale(const FlowEntry *entry, const ServiceTable *services, uint32_t now) noexcept nogil:
    """True if the entry decides no more: it has expired, its flow is to leave its backend, or its id is no
    backend's."""
    return has_expired(entry, services, now) or unlikely(services.backends[backend_of(entry)].flow_policy == KEEP_NONE)


cdef inline uint64_t entry_number(const FlowTable *table, const FlowEntry *entry) noexcept nogil:
    return entry - &table.buckets[0].entries[0]


cdef inline FlowTuple *tuple_of(FlowTable *table, FlowEntry *entry) noexcept nogil:
    return &table.tuples[entry_number(table, entry)]


cdef inline FlowEntry *entry_at(FlowTable *table, uint32_t number) noexcept nogil:
    """Return the entry with this number (see `entry_number`); NULL beyond the table's end."""
    if unlikely(number >= <uint64_t>table.per_shard * (SHARDS * ENTRIES)):
        return NULL
    return &table.buckets[0].entries[0] + number


cdef inline SourcePool *pool_of(FlowTable *table, uint8_t family) noexcept nogil:
    return &table.pools[family == FAMILY_6]


cdef inline ServiceEvents *events_of(const FlowTable *table, const Service *service) noexcept nogil:
    """Return the service's counters of events; NULL where nothing is to be counted."""
    return &table.events[service.slot] if table.events != NULL else NULL


cdef inline void close_flow(FlowTable *table, uint32_t shard, FlowEntry *entry) noexcept nogil:
    """Give back the flow's source port, if it is really its own, and log its end."""
    cdef FlowTuple *flow = tuple_of(table, entry)
    cdef SourcePool *pool = pool_of(table, flow.family)
    if flow.source != 0 and likely(has_port(pool, flow.source, shard, entry.fingerprint)):
        give_back(pool, flow.protocol, shard, flow.source)
    log_end(&table.log, entry, flow)


cdef inline void log_end(FlowLog *log, const FlowEntry *entry, const FlowTuple *flow) noexcept nogil:
    """Log the end of a flow whose beginning is in the log."""
    if flow.began & LOGGED_BIT:
        log_flow(log, flow, backend_of(entry), state_of(entry), False, entry.seen)


cdef inline bint must_close_flows(const FlowTable *table) noexcept nogil:
    """True if flows may have anything to give back or to log. Else the tuple, which is not in cache, is left alone."""
    return table.log.events != NULL or table.pools[0].count != 0 or table.pools[1].count != 0


cdef inline void forget(FlowTable *table, uint32_t shard, FlowEntry *entry) noexcept nogil:
    must(entry.fingerprint != 0 and owns(table, shard) and table.flows[shard] > 0)
    if unlikely(must_close_flows(table)):
        close_flow(table, shard, entry)
    table.stats[backend_of(entry)].active_flows -= not is_over(state_of(entry))
    table.flows[shard] -= 1
    table.emptied = True
    entry.fingerprint = 0


cdef inline bint owns(const FlowTable *table, uint32_t shard) noexcept nogil:
    return table.owned >> shard & 1


cdef inline Bucket *bucket_at(FlowTable *table, uint32_t shard, uint32_t hashed) noexcept nogil:
    """Return the bucket that the hash names. The hash scales by multiplication, so any number of buckets will do."""
    must(shard < SHARDS)
    return &table.buckets[<uint64_t>shard * table.per_shard + (<uint64_t>hashed * table.per_shard >> 32)]


cdef inline Bucket *first_bucket(FlowTable *table, uint32_t shard, uint64_t fingerprint) noexcept nogil:
    return bucket_at(table, shard, <uint32_t>(fingerprint >> 32))


cdef inline Bucket *second_bucket(FlowTable *table, uint32_t shard, uint64_t fingerprint) noexcept nogil:
    """Return the second bucket, which follows from the same 32 bits, so that an entry can be moved without its
    tuple."""
    return bucket_at(table, shard, <uint32_t>(fingerprint >> 32) * <uint32_t>0x85EBCA6BU ^ <uint32_t>0x5BD1E995U)


cdef inline void prefetch_flow(FlowTable *table, uint32_t shard, uint64_t fingerprint) noexcept nogil:
    """Fetch both buckets: at the intended load some flows live in their second, and would wait for memory."""
    prefetch(first_bucket(table, shard, fingerprint))
    prefetch(second_bucket(table, shard, fingerprint))


cdef inline FlowEntry *find_in(Bucket *bucket, uint64_t fingerprint) noexcept nogil:
    """Return the bucket's entry with this fingerprint, which at most one has; NULL if there is none.

    Which of the four it is, is computed without a branch: it cannot be predicted, and in a table at its intended load a
    wrong guess costs more than the comparisons.
    """
    cdef uint32_t at = ((bucket.entries[1].fingerprint == fingerprint)
                        + 2 * (bucket.entries[2].fingerprint == fingerprint)
                        + 3 * (bucket.entries[3].fingerprint == fingerprint))
    cdef FlowEntry *entry = &bucket.entries[at & (ENTRIES - 1)]
    return entry if likely(entry.fingerprint == fingerprint) else NULL


cdef inline FlowEntry *find_flow(FlowTable *table, uint32_t shard, uint64_t fingerprint) noexcept nogil:
    """Return the entry of a client-leg packet, stale or not; NULL if there is none."""
    cdef FlowEntry *entry = find_in(first_bucket(table, shard, fingerprint), fingerprint)
    if likely(entry != NULL):
        return entry
    return find_in(second_bucket(table, shard, fingerprint), fingerprint)


cdef inline FlowEntry *find_by_port(FlowTable *table, uint32_t shard, SourcePort *port) noexcept nogil:
    """Return the entry of the flow that has a source port of fullnat; NULL if none has it.

    The port remembers where the entry was: that is one cache line to fetch instead of two buckets, 20 ns with a million
    flows. If it has been moved since, it is looked for once.
    """
    cdef FlowEntry *entry
    if unlikely(port.fingerprint == 0):
        return NULL
    entry = entry_at(table, port.next)
    if likely(entry != NULL and entry.fingerprint == port.fingerprint):
        return entry
    entry = find_flow(table, shard, port.fingerprint)
    if likely(entry != NULL):
        port.next = <uint32_t>entry_number(table, entry)
    return entry


cdef inline bint serves(const Backend *backend, const Packet *p) noexcept nogil:
    """True if a reply-leg packet comes from this backend."""
    return (backend.present and same_addr(backend.addr, p.src) and backend.protocol == p.protocol
            and (backend.be_port == p.be_sport or backend.be_port == 0))


cdef inline uint16_t be_vport_of(const Service *service, const Packet *p) noexcept nogil:
    """Return the port of the VIP that a reply-leg packet leaves from. A service with several ports keeps the
    backend's."""
    return service.be_port if service.be_port != 0 else p.be_sport


cdef inline FlowEntry *reply_in(
        FlowTable *table, Bucket *bucket, const ServiceTable *services, const Packet *p) noexcept nogil:
    cdef const Service *service
    cdef FlowEntry *entry
    cdef uint32_t backend
    cdef int i
    for i in range(ENTRIES):
        entry = &bucket.entries[i]
        backend = backend_of(entry)
        if likely(entry.fingerprint >> 32 != p.fingerprint >> 32) or entry.fingerprint == 0:
            continue
        if backend >= services.backend_limit or not serves(&services.backends[backend], p):
            continue
        service = &services.services[services.backends[backend].service]
        if unlikely(service.has_prefix):
            if is_answered_by(tuple_of(table, entry), p):
                return entry
        elif entry.fingerprint == flow_fingerprint(
                table.key, p.fingerprint, service.vip, be_vport_of(service, p), True):
            return entry
    return NULL


cdef inline bint is_answered_by(const FlowTuple *flow, const Packet *p) noexcept nogil:
    """True if the packet answers this flow. Where the VIP is one of many, only the flow's tuple tells."""
    return (same_addr(flow.client, p.dst) and flow.be_cport == p.be_dport and flow.protocol == p.protocol
            and flow.family == p.family)


cdef inline FlowEntry *find_reply(FlowTable *table, const ServiceTable *services, const Packet *p) noexcept nogil:
    """Return the entry of a reply-leg packet; NULL if there is none. Together with the backend's service the client's
    side makes the whole fingerprint.

    The cold tuple, a cache miss of its own, is not needed. Two flows of one client port to one backend through
    different VIPs cannot both exist (see `conflicts`), so the answer is unique.
    """
    cdef FlowEntry *entry = reply_in(table, first_bucket(table, p.shard, p.fingerprint), services, p)
    if likely(entry != NULL):
        return entry
    return reply_in(table, second_bucket(table, p.shard, p.fingerprint), services, p)


# --- making room -----------------------------------------------------------------------------------------------------

cdef inline uint32_t empty_in(const Bucket *bucket) noexcept nogil:
    """Return which of the four entries are empty, a bit each."""
    return ((bucket.entries[0].fingerprint == 0)
            | (bucket.entries[1].fingerprint == 0) << 1
            | (bucket.entries[2].fingerprint == 0) << 2
            | (bucket.entries[3].fingerprint == 0) << 3)


cdef inline FlowEntry *empty_entry(Bucket *first, Bucket *second) noexcept nogil:
    """Return the first empty entry of the first bucket, or else of the second; NULL if all are in use.

    It is computed without a branch for the reason of `find_in`: how full a bucket is cannot be predicted.
    """
    cdef uint32_t empty = empty_in(first) | empty_in(second) << ENTRIES
    cdef uint32_t at = lowest_bit(empty | 1 << 2 * ENTRIES)
    cdef Bucket *bucket = first if at < ENTRIES else second
    return &bucket.entries[at & (ENTRIES - 1)] if likely(empty != 0) else NULL


cdef inline FlowEntry *free_entry(
        FlowTable *table, Bucket *bucket, uint32_t shard, const ServiceTable *services, uint32_t now) noexcept nogil:
    cdef int i
    for i in range(ENTRIES):
        if bucket.entries[i].fingerprint == 0:
            return &bucket.entries[i]
    for i in range(ENTRIES):
        if is_stale(&bucket.entries[i], services, now):
            forget(table, shard, &bucket.entries[i])
            table.expired += 1
            return &bucket.entries[i]
    return NULL


cdef inline Bucket *other_bucket(
        FlowTable *table, Bucket *bucket, uint32_t shard, const FlowEntry *entry) noexcept nogil:
    cdef Bucket *first = first_bucket(table, shard, entry.fingerprint)
    return second_bucket(table, shard, entry.fingerprint) if first == bucket else first


cdef inline FlowEntry *moved(FlowTable *table, FlowEntry *entry, FlowEntry *room) noexcept nogil:
    """Move an entry; where it was is empty then. A process that is killed in between leaves it in both."""
    in_order()
    room.packed = entry.packed
    room.seen = entry.seen
    tuple_of(table, room)[0] = tuple_of(table, entry)[0]
    in_order()
    room.fingerprint = entry.fingerprint
    in_order()
    table.emptied = True
    entry.fingerprint = 0
    return entry


cdef inline FlowEntry *entry_by_moving(
        FlowTable *table, Bucket *bucket, uint32_t shard, const ServiceTable *services, uint32_t now) noexcept nogil:
    """Empty one entry of a full bucket by moving it to its other bucket. Bounded: looks at four buckets, one move."""
    cdef FlowEntry *room
    cdef int i
    for i in range(ENTRIES):
        room = free_entry(table, other_bucket(table, bucket, shard, &bucket.entries[i]), shard, services, now)
        if room != NULL:
            return moved(table, &bucket.entries[i], room)
    return NULL


cdef inline FlowEntry *entry_by_two_moves(
        FlowTable *table, Bucket *bucket, uint32_t shard, const ServiceTable *services, uint32_t now) noexcept nogil:
    """Empty one entry of a full bucket after a move has made room in its other bucket. Bounded: looks at sixteen
    buckets, two moves.

    With one move a few flows in a full table find no room; with two, none of ten million did (bench/core.py).
    """
    cdef Bucket *other
    cdef FlowEntry *room
    cdef int i
    for i in range(ENTRIES):
        other = other_bucket(table, bucket, shard, &bucket.entries[i])
        if other == bucket:
            continue
        room = entry_by_moving(table, other, shard, services, now)
        if room != NULL:
            return moved(table, &bucket.entries[i], room)
    return NULL


cdef inline void evict(
        FlowTable *table, uint32_t shard, FlowEntry *entry, const ServiceTable *services) noexcept nogil:
    """Give up a half-open flow, which is not stale."""
    cdef ServiceEvents *events
    must(backend_of(entry) < services.backend_limit)
    events = events_of(table, &services.services[services.backends[backend_of(entry)].service])
    if events != NULL:
        events.evicted += 1
    table.evicted += 1
    forget(table, shard, entry)


cdef inline FlowEntry *entry_by_eviction(
        FlowTable *table, Bucket *first, Bucket *second, uint32_t shard, const ServiceTable *services, uint32_t now,
        ) noexcept nogil:
    """Return the half-open entry of either bucket that has been idle longest; NULL if all eight are established."""
    cdef FlowEntry *oldest = NULL
    cdef FlowEntry *entry
    cdef int i
    for i in range(2 * ENTRIES):
        entry = &first.entries[i] if i < ENTRIES else &second.entries[i - ENTRIES]
        if half_open(state_of(entry)) and (oldest == NULL or now - entry.seen > now - oldest.seen):
            oldest = entry
    if oldest != NULL:
        evict(table, shard, oldest, services)
    return oldest


cdef inline FlowEntry *make_room(
        FlowTable *table, uint32_t shard, uint64_t fingerprint, const ServiceTable *services, uint32_t now,
        ) noexcept nogil:
    cdef Bucket *first = first_bucket(table, shard, fingerprint)
    cdef Bucket *second = second_bucket(table, shard, fingerprint)
    cdef FlowEntry *entry = empty_entry(first, second)
    if likely(entry != NULL):
        return entry
    entry = free_entry(table, first, shard, services, now)
    if entry == NULL:
        entry = free_entry(table, second, shard, services, now)
    if entry == NULL:
        entry = entry_by_moving(table, first, shard, services, now)
    if entry == NULL:
        entry = entry_by_moving(table, second, shard, services, now)
    if entry == NULL:
        entry = entry_by_two_moves(table, first, shard, services, now)
    if entry == NULL:
        entry = entry_by_two_moves(table, second, shard, services, now)
    if entry == NULL:
        entry = entry_by_eviction(table, first, second, shard, services, now)
    return entry


cdef inline FlowEntry *find_room(
        FlowTable *table, uint32_t shard, uint64_t fingerprint, const ServiceTable *services, FlowEntry *expected,
        uint32_t now) noexcept nogil:
    """Return an empty entry for a new flow; NULL, which is counted, if only established flows stand in its way.

    `expected`: where `prefetch_room` has seen one, or NULL. The caller writes the tuple, and then calls `enter_flow`.
    The tuple is written where it will stay: a copy of one that was just put together from small fields would wait until
    the store buffer has written them, and everything older.
    """
    cdef FlowEntry *entry = expected
    if unlikely(entry == NULL or entry.fingerprint != 0):
        entry = make_room(table, shard, fingerprint, services, now)
        table.untracked += entry == NULL
    in_order()                                           # what made way is gone before its tuple changes
    return entry


cdef inline void enter_flow(
        FlowTable *table, FlowEntry *entry, uint32_t shard, uint64_t fingerprint, uint32_t backend, uint32_t state,
        uint32_t now) noexcept nogil:
    """Give an entry of `find_room` to a flow, whose tuple is there already."""
    cdef const FlowTuple *flow = tuple_of(table, entry)
    must(owns(table, shard) and 0 < backend < MAX_BACKENDS and FLOW_NONE < state < FLOW_CLOSING)
    must(entry.fingerprint == 0)
    entry.packed = packed_of(flow, fingerprint, backend, state)
    entry.seen = now
    in_order()
    entry.fingerprint = fingerprint
    if unlikely(flow.began & LOGGED_BIT):
        log_flow(&table.log, flow, backend, state, True, now)
    table.flows[shard] += 1
    table.stats[backend].active_flows += 1
    table.stats[backend].new_flows += 1


cdef inline FlowEntry *prefetch_room(FlowTable *table, uint32_t shard, uint64_t fingerprint) noexcept nogil:
    """Return where a new flow's entry will be, as far as can be said without making room. Its tuple is fetched."""
    cdef FlowEntry *entry = empty_entry(
        first_bucket(table, shard, fingerprint), second_bucket(table, shard, fingerprint))
    if likely(entry != NULL):
        prefetch(tuple_of(table, entry))
        prefetch(<uint8_t *>(tuple_of(table, entry) + 1) - 1)      # half of the tuples lie across two lines
    return entry


cdef inline bint resembles(const Bucket *bucket, uint64_t fingerprint) noexcept nogil:
    """True if an entry has the same upper half. This is one branch instead of four, and one that can be predicted."""
    return ((bucket.entries[0].fingerprint >> 32 == fingerprint >> 32)
            | (bucket.entries[1].fingerprint >> 32 == fingerprint >> 32)
            | (bucket.entries[2].fingerprint >> 32 == fingerprint >> 32)
            | (bucket.entries[3].fingerprint >> 32 == fingerprint >> 32))


cdef inline FlowEntry *conflict_in(
        FlowTable *table, Bucket *bucket, const ServiceTable *services, uint64_t fingerprint, const Backend *backend,
        uint16_t be_port) noexcept nogil:
    cdef FlowEntry *entry
    cdef const Backend *other
    cdef uint16_t be_other
    cdef int i
    if likely(not resembles(bucket, fingerprint)):
        return NULL
    for i in range(ENTRIES):
        entry = &bucket.entries[i]
        if entry.fingerprint == 0 or entry.fingerprint >> 32 != fingerprint >> 32 or entry.fingerprint == fingerprint:
            continue
        if backend_of(entry) >= services.backend_limit:
            continue
        other = &services.backends[backend_of(entry)]
        be_other = other.be_port if other.be_port != 0 else tuple_of(table, entry).be_vport
        if other.present and be_other == be_port and same_addr(other.addr, backend.addr):
            return entry
    return NULL


cdef inline FlowEntry *conflict_with(
        FlowTable *table, const ServiceTable *services, const Packet *p, const Backend *backend) noexcept nogil:
    """Return the flow that this backend would see under the same tuple as the packet's: one client port, two VIPs, and
    the same backend address and port. NULL if there is none."""
    cdef uint16_t be_port = backend.be_port if backend.be_port != 0 else p.be_dport
    cdef FlowEntry *entry = conflict_in(
        table, first_bucket(table, p.shard, p.fingerprint), services, p.fingerprint, backend, be_port)
    if likely(entry == NULL):
        entry = conflict_in(
            table, second_bucket(table, p.shard, p.fingerprint), services, p.fingerprint, backend, be_port)
    return entry


cdef inline bint gives_way(const FlowEntry *entry, const ServiceTable *services, uint32_t now) noexcept nogil:
    return is_over(state_of(entry)) or is_stale(entry, services, now)


cdef inline bint conflicts(
        FlowTable *table, const ServiceTable *services, const Packet *p, const Backend *backend, uint32_t now,
        ) noexcept nogil:
    """True if this backend would see two flows with one tuple. A flow that is over, or stale, gives way."""
    cdef FlowEntry *entry = conflict_with(table, services, p, backend)
    if likely(entry == NULL):
        return False
    if gives_way(entry, services, now):
        forget(table, p.shard, entry)
        return False
    return True


# --- every packet of a known flow ------------------------------------------------------------------------------------

cdef inline void touch(FlowTable *table, FlowEntry *entry, const Packet *p, bint two_way, uint32_t now) noexcept nogil:
    """Step the flow's state and note the time."""
    cdef uint32_t before = state_of(entry)
    cdef uint32_t state
    if p.protocol == PROTO_TCP:
        state = next_tcp_state(before, p.tcp_flags, p.leg == LEG_CLIENT, two_way)
    else:
        state = next_udp_state(before, p.leg == LEG_CLIENT, two_way)
    if unlikely(state != before):
        table.stats[backend_of(entry)].active_flows += <int>is_over(before) - <int>is_over(state)
        table.stats[backend_of(entry)].answered_flows += before == FLOW_SYN and (p.leg != LEG_CLIENT or not two_way)
    entry.packed = entry.packed & ((1 << STATE_SHIFT) - 1) | state << STATE_SHIFT
    entry.seen = now


# --- sweep -----------------------------------------------------------------------------------------------------------

cdef inline uint32_t owned_after(const FlowTable *table, uint32_t shard) noexcept nogil:
    """Return the next shard of this worker, which has at least one."""
    shard = (shard + 1) % SHARDS
    while not owns(table, shard):
        shard = (shard + 1) % SHARDS
    return shard


cdef inline void sweep_one_bucket(FlowTable *table, const ServiceTable *services, uint32_t now) noexcept nogil:
    cdef Bucket *bucket = &table.buckets[<uint64_t>table.sweep_shard * table.per_shard + table.sweep_bucket]
    cdef int i
    for i in range(ENTRIES):
        if bucket.entries[i].fingerprint != 0 and is_stale(&bucket.entries[i], services, now):
            forget(table, table.sweep_shard, &bucket.entries[i])
            table.expired += 1
    table.sweep_bucket += 1
    if table.sweep_bucket == table.per_shard:
        table.sweep_bucket = 0
        table.sweep_shard = owned_after(table, table.sweep_shard)


cdef inline void sweep(FlowTable *table, const ServiceTable *services, uint32_t now) noexcept nogil:
    """Visit the buckets of this worker that are due since the last call: all of them in SWEEP_PERIOD_MS.

    Bounded per call by one full round, and in a busy worker, which calls at least every millisecond, by a ten
    thousandth of the table.
    """
    cdef uint64_t total = <uint64_t>table.per_shard * table.owned_shards
    cdef int32_t elapsed = <int32_t>(now - table.sweep_time)
    cdef uint64_t due
    if elapsed <= 0:
        if elapsed < -SWEEP_PERIOD_MS:
            table.sweep_time = now
        return
    due = total if elapsed >= SWEEP_PERIOD_MS else total * <uint32_t>elapsed // SWEEP_PERIOD_MS
    if due == 0:
        return                     # a small table: wait until a bucket is due
    # Time that was not enough for one more bucket counts for the next call.
    table.sweep_time = now if due == total else table.sweep_time + <uint32_t>(due * SWEEP_PERIOD_MS // total)
    while due:
        sweep_one_bucket(table, services, now)
        due -= 1
