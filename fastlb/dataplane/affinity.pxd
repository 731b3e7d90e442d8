"""Client-IP affinity: the new flows of a client go where its last one went.

One bounded table for all workers: whoever places a new flow reads and writes it. A slot is one word, which is always
whole, and changes by compare-and-swap alone:

    bucket  ┌ eight slots: 64 bytes, one cache line ┐
            │ slot │ slot │ slot │ slot │ … │ slot  │
            └───────────────────────────────────────┘
    slot    | ends 22 (ticks of 256 ms) | sticky backend 18 | tag 24 |         0: free

Bucket and tag come from the client's address without the bits behind the prefix, and from the affinity group, under the
flow table's secret key. A sticky backend is a backend of one of the group's services, by its number in the group
(plan/affinity.py). To the other services it stands for its address: a service with one backend there sends the client
to that one. A service with several chooses among them by a hash of the client, weighted (Thaler and Ravishankar, 1998,
in the form of Schindelhauer and Schomaker, 2005), so that few clients move when they change. The slot then names the
chosen one, unless the number that it has is pinned: that one tells its own service which of several backends the client
has, and must not be forgotten.

A slot ends when its timeout has passed since the client's last new flow. Over TCP only a connection that was
established counts: its SYN alone has a client that nothing is known of remembered for TRIAL_TICKS, so that connections
that begin together stay together, and renews nothing. Else a client whose connections fail would be bound to the
backend that they fail at. A full bucket gives up what ends first.
Two workers that place a client in the same instant try for the same slot, and the slower one takes the word of the
faster. Only when another slot of the bucket changes in between may both write; then the first that is met counts, and
the other is never read again.

A slot counts as absent if its backend has left the service, takes no clients or has no room. Then the scheduler's
choice takes its place.
"""

from libc.math cimport log
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport FlowTable, events_of
from fastlb.dataplane.machine cimport compare_and_swap_u64, likely, load_acquire_u64, mul_fold, must
from fastlb.dataplane.schedule cimport Cursor, SchedulerState, active_flows, scheduled_backend
from fastlb.dataplane.types cimport Addr, Affinity, Service, ServiceEvents, ServiceTable, StickyBackend, Taker


cdef enum:
    WAYS_OF_AFFINITY = 8     # slots of a bucket
    TRIES = 4                # to write a slot that others write too
    TAG_BITS = 24
    STICKY_BITS = 18
    END_SHIFT = TAG_BITS + STICKY_BITS
    TICK_BITS = 8            # of the milliseconds: a tick is 256 ms
    TRIAL_TICKS = 12         # three seconds, until a connection is established
    CLEAR_BITS = 19          # of the milliseconds, nine minutes, in which all is cleared that has ended


cdef struct AffinityTable:
    # One worker's view of it. Down to `buckets`, all workers have the same.
    uint64_t *slots
    uint32_t buckets
    uint32_t cleared         # the bucket that is cleared next
    uint64_t placed          # flows of this worker that went where the client's last one had gone


cdef struct Client:
    # Whose slot is looked for.
    uint64_t hashed
    uint64_t *bucket
    uint64_t tag
    uint64_t tick            # now; as wide as a slot's


# --- slots ------------------------------------------------------------------------------------------------------------

cdef inline uint64_t tick_of(uint32_t now) noexcept nogil:
    """Convert milliseconds to ticks. Both come round together, without a step."""
    return now >> TICK_BITS & ((1 << (64 - END_SHIFT)) - 1)


cdef inline uint32_t sticky_in(uint64_t slot) noexcept nogil:
    return <uint32_t>(slot >> TAG_BITS) & ((1 << STICKY_BITS) - 1)


cdef inline int32_t ticks_left(uint64_t slot, uint64_t tick) noexcept nogil:
    """Return for how many ticks the slot holds; 0 or less once it has ended. A step of the clock lengthens or shortens
    that, never by days."""
    return <int32_t>(<uint32_t>((slot >> END_SHIFT) - tick) << (END_SHIFT - 32)) >> (END_SHIFT - 32)


cdef inline bint is_free(uint64_t slot, uint64_t tick) noexcept nogil:
    return slot == 0 or ticks_left(slot, tick) <= 0


cdef inline uint64_t new_slot(const Client *client, uint32_t ticks, uint32_t sticky) noexcept nogil:
    must(0 < sticky < 1 << STICKY_BITS)
    return (client.tick + ticks) << END_SHIFT | <uint64_t>sticky << TAG_BITS | client.tag


cdef inline uint32_t first_ticks(const Affinity *by, bint proven) noexcept nogil:
    """Return for how long a client's first flow has it remembered, before anything shows that the flow works."""
    return by.ticks if proven or by.ticks < TRIAL_TICKS else TRIAL_TICKS


cdef inline Client client_of(
        AffinityTable *table, const Affinity *by, const uint64_t *key, Addr addr, uint32_t now) noexcept nogil:
    """Return where the client with this address has its slot."""
    cdef Client client
    cdef uint64_t hashed = mul_fold(
        mul_fold((addr.hi & by.mask.hi) ^ key[2], by.group ^ key[1]) ^ (addr.lo & by.mask.lo) ^ key[0], key[3])
    client.hashed = hashed
    client.bucket = &table.slots[((hashed >> 32) * table.buckets >> 32) * WAYS_OF_AFFINITY]
    client.tag = hashed & ((1 << TAG_BITS) - 1)
    client.tick = tick_of(now)
    return client


cdef inline uint64_t *slot_for(const Client *client, uint64_t *seen) noexcept nogil:
    """Return the client's slot; without one a free slot, or else the one that ends first. `seen` is set to what was in
    it.

    Each client begins to look elsewhere, so that of slots that end together, as in a flood, not always the same gives
    way.
    """
    cdef uint64_t *best = NULL
    cdef uint64_t *at
    cdef uint64_t slot
    cdef int32_t left
    cdef int32_t least = 0
    cdef int i
    for i in range(WAYS_OF_AFFINITY):
        at = &client.bucket[(client.tag + i) % WAYS_OF_AFFINITY]
        slot = load_acquire_u64(at)
        if slot != 0 and slot & ((1 << TAG_BITS) - 1) == client.tag:
            seen[0] = slot
            return at
        left = 0 if is_free(slot, client.tick) else ticks_left(slot, client.tick)
        if best == NULL or left < least:
            least, best, seen[0] = left, at, slot
    return best


cdef inline bint is_of(uint64_t slot, const Client *client) noexcept nogil:
    return slot & ((1 << TAG_BITS) - 1) == client.tag and not is_free(slot, client.tick)


# --- placing ----------------------------------------------------------------------------------------------------------

cdef inline double cost_for(const Client *client, const Taker *taker) noexcept nogil:
    """Return what a taker bids for a client. The lowest bid wins, which each taker has as often as its weight says."""
    cdef uint64_t drawn = mul_fold(
        client.hashed ^ taker.backend * <uint64_t>0x9E3779B97F4A7C15ULL, <uint64_t>0xD6E8FEB86659FD93ULL)
    drawn = mul_fold(drawn ^ client.hashed, <uint64_t>0xA0761D6478BD642FULL)
    return -log(<double>((drawn >> 11) + 1) * 2.0 ** -53) / taker.weight


cdef inline const Taker *taker_of(const Affinity *by, const Client *client, uint64_t slot) noexcept nogil:
    """Return the backend that takes a client with this slot, whatever its load; NULL if there is none. `slot` may be 0.

    Looks once at each backend that the service has at the address.
    """
    cdef const StickyBackend *sticky = &by.sticky_backends[sticky_in(slot) if sticky_in(slot) < by.sticky_limit else 0]
    cdef const Taker *best = NULL
    cdef double cost
    cdef double least = 0
    cdef uint32_t i
    if likely(sticky.count <= 1):
        return sticky.takers if sticky.count == 1 else NULL
    for i in range(sticky.count):
        cost = cost_for(client, &sticky.takers[i])
        if best == NULL or cost < least:
            least, best = cost, &sticky.takers[i]
    return best


cdef inline bint takes_one_more(const FlowTable *flows, const Taker *taker) noexcept nogil:
    return active_flows(flows, taker.backend) < taker.max_flows


cdef inline uint32_t sticky_to_keep(
        const Affinity *by, const ServiceTable *services, uint64_t slot, const Taker *taker) noexcept nogil:
    """Return the number that the slot names from now on: that of the backend which took the client, unless the present
    one is pinned."""
    return sticky_in(slot) if by.sticky_backends[sticky_in(slot)].pinned else services.sticky_numbers[taker.backend]


cdef inline uint64_t live_slot(AffinityTable *table, const Client *client) noexcept nogil:
    """Return the client's slot while it holds, else 0. Changes nothing."""
    cdef uint64_t seen
    slot_for(client, &seen)
    return seen if is_of(seen, client) else 0


cdef inline uint32_t affine_backend(
        AffinityTable *table, const FlowTable *flows, const Affinity *by, Addr addr, uint32_t now) noexcept nogil:
    """Return the backend id that a client sticks to, for packets in mid-flow; 0 if there is none."""
    cdef Client client = client_of(table, by, flows.key, addr, now)
    cdef const Taker *taker = taker_of(by, &client, live_slot(table, &client))
    return taker.backend if taker != NULL else 0


cdef inline void note_affine(const FlowTable *flows, const Service *service, bint stays) noexcept nogil:
    """Count a new flow of a client that was remembered: it stays where it was, or is placed anew."""
    cdef ServiceEvents *events = events_of(flows, service)
    if events == NULL:
        return
    if stays:
        events.affine += 1
    else:
        events.affine_moved += 1


cdef inline uint32_t sticky_or_scheduled(
        AffinityTable *table, SchedulerState *state, const FlowTable *flows, const ServiceTable *services,
        const Service *service, Cursor *cursor, uint64_t hashed, Addr addr, bint proven, uint32_t now) noexcept nogil:
    """Return the backend id of a client's new flow: where its last one went, else the scheduler's choice, which the
    client then sticks to; 0 when the scheduler has none.

    `proven`: nothing more will show that the flow works, so that it counts at once (UDP). Bounded: TRIES looks at the
    bucket.
    """
    cdef const Affinity *by = service.affinity
    cdef Client client = client_of(table, by, flows.key, addr, now)
    cdef uint32_t chosen = 0
    cdef const Taker *taker
    cdef uint64_t *slot
    cdef uint64_t seen
    cdef bint held = False
    cdef int _try
    for _try in range(TRIES):
        slot = slot_for(&client, &seen)
        taker = taker_of(by, &client, seen if is_of(seen, &client) else 0)
        if taker != NULL and takes_one_more(flows, taker):
            if proven:           # if the swap fails, another has renewed it
                compare_and_swap_u64(slot, seen, new_slot(&client, by.ticks, sticky_to_keep(by, services, seen, taker)))
            table.placed += 1
            note_affine(flows, service, True)
            return taker.backend
        held = is_of(seen, &client)
        if chosen == 0:
            chosen = scheduled_backend(state, flows, service, cursor, hashed)
        if chosen == 0 or compare_and_swap_u64(
                slot, seen, new_slot(&client, first_ticks(by, proven), services.sticky_numbers[chosen])):
            break
    if chosen != 0 and held:
        note_affine(flows, service, False)
    return chosen


cdef inline void learn_client(
        AffinityTable *table, const FlowTable *flows, const ServiceTable *services, const Service *service,
        uint32_t backend, Addr addr, uint32_t now) noexcept nogil:
    """Remember a client whose connection to `backend` was established now, unless it has another backend meanwhile."""
    cdef const Affinity *by = service.affinity
    cdef Client client = client_of(table, by, flows.key, addr, now)
    cdef uint64_t seen
    cdef uint64_t *slot = slot_for(&client, &seen)
    cdef const Taker *taker = taker_of(by, &client, seen if is_of(seen, &client) else 0)
    cdef uint32_t sticky = services.sticky_numbers[backend]
    if taker != NULL:
        if taker.backend != backend:
            return
        sticky = sticky_to_keep(by, services, seen, taker)
    if sticky != 0:              # 0: the backend was removed
        compare_and_swap_u64(slot, seen, new_slot(&client, by.ticks, sticky))


# --- clearing ---------------------------------------------------------------------------------------------------------

cdef inline void clear_ended(AffinityTable *table, uint32_t now) noexcept nogil:
    """Clear slots that have ended, in the buckets that are due since the last call. Left alone, a slot would hold again
    when ticks come round, in twelve days.

    Bounded by one round, and in a busy worker, which calls at least every millisecond, by four buckets.
    """
    cdef uint32_t due = <uint32_t>(<uint64_t>(now & ((1 << CLEAR_BITS) - 1)) * table.buckets >> CLEAR_BITS)
    cdef uint64_t tick = tick_of(now)
    cdef uint64_t *bucket
    cdef uint64_t slot
    cdef int i
    while table.cleared != due:
        bucket = &table.slots[<uint64_t>table.cleared * WAYS_OF_AFFINITY]
        for i in range(WAYS_OF_AFFINITY):
            slot = load_acquire_u64(&bucket[i])
            if slot != 0 and is_free(slot, tick):
                compare_and_swap_u64(&bucket[i], slot, 0)
        table.cleared = table.cleared + 1 if table.cleared + 1 < table.buckets else 0
