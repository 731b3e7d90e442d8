"""Client-IP affinity: the new flows of a client go where its last one went.

One bounded table for all workers; whoever has a new flow to place reads and writes it. A slot is one word, which is
always whole, and changes by compare-and-swap alone:

    bucket  ┌ eight slots: 64 bytes, one cache line ┐
            │ slot │ slot │ slot │ slot │ … │ slot  │
            └───────────────────────────────────────┘
    slot    | ends 22 (ticks of 256 ms) | place 18 | tag 24 |         0: free

Bucket and tag are of the client's address, less the bits behind the prefix, and of the group, under the flow table's
secret key. The place is a backend of one of the group's services (affinity.py gives it its number). To the others it
stands for its address: a service that has one backend there sends the client to that one, and one that has several
chooses among them by a hash of the client, weighted (Thaler and Ravishankar, 1998, in the form of Schindelhauer and
Schomaker, 2005), so that few clients move when they change. The slot then names the chosen one, unless what it names
tells its own service which of several backends the client has: that one is not forgotten.

A slot ends when its timeout has passed since the client's last new flow. A full bucket gives up what ends first.
Two workers that place a client in the same instant try for the same slot, and the slower one takes the word of the
faster. Only when another slot of the bucket changes between their looks may both write; then the first that is met
counts, and the other is never read again.

A slot whose place has no backend in the service that takes clients, or one without room, counts as absent, and the
scheduler's choice takes its place.
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
    """Of milliseconds. Ticks come round together with them, and with no step."""
    return now >> TICK_BITS & ((1 << (64 - END_SHIFT)) - 1)


cdef inline uint32_t sticky_in(uint64_t slot) noexcept nogil:
    return <uint32_t>(slot >> TAG_BITS) & ((1 << STICKY_BITS) - 1)


cdef inline int32_t ticks_left(uint64_t slot, uint64_t tick) noexcept nogil:
    """Above 0 while it holds. After a step of the clock it holds for longer, or shorter; never for days."""
    return <int32_t>(<uint32_t>((slot >> END_SHIFT) - tick) << (END_SHIFT - 32)) >> (END_SHIFT - 32)


cdef inline bint is_free(uint64_t slot, uint64_t tick) noexcept nogil:
    return slot == 0 or ticks_left(slot, tick) <= 0


cdef inline uint64_t new_slot(const Client *client, const Affinity *by, uint32_t sticky) noexcept nogil:
    must(0 < sticky < 1 << STICKY_BITS)
    return (client.tick + by.ticks) << END_SHIFT | <uint64_t>sticky << TAG_BITS | client.tag


cdef inline Client client_of(
        AffinityTable *table, const Affinity *by, const uint64_t *key, Addr addr, uint32_t now) noexcept nogil:
    """`addr`: its address."""
    cdef Client client
    cdef uint64_t hashed = mul_fold(
        mul_fold((addr.hi & by.mask.hi) ^ key[2], by.group ^ key[1]) ^ (addr.lo & by.mask.lo) ^ key[0], key[3])
    client.hashed = hashed
    client.bucket = &table.slots[((hashed >> 32) * table.buckets >> 32) * WAYS_OF_AFFINITY]
    client.tag = hashed & ((1 << TAG_BITS) - 1)
    client.tick = tick_of(now)
    return client


cdef inline uint64_t *slot_for(const Client *client, uint64_t *seen) noexcept nogil:
    """The client's slot; else one that is free, else the one that ends first. `seen`: what was in it.

    Each client begins elsewhere: of slots that end together, as in a flood, it is not always the same that gives way.
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
    """Of all takers the one with the least takes the client: each does so as often as its weight says."""
    cdef uint64_t drawn = mul_fold(
        client.hashed ^ taker.backend * <uint64_t>0x9E3779B97F4A7C15ULL, <uint64_t>0xD6E8FEB86659FD93ULL)
    drawn = mul_fold(drawn ^ client.hashed, <uint64_t>0xA0761D6478BD642FULL)
    return -log(<double>((drawn >> 11) + 1) * 2.0 ** -53) / taker.weight


cdef inline const Taker *taker_of(const Affinity *by, const Client *client, uint64_t slot) noexcept nogil:
    """The backend that takes a client with this slot, whatever its load; NULL: none. `slot` may be 0.

    One look at each backend that the service has at the address.
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
    """What the slot names from now on: whom it was now, if that takes nothing from another service."""
    return sticky_in(slot) if by.sticky_backends[sticky_in(slot)].pinned else services.sticky_numbers[taker.backend]


cdef inline uint64_t live_slot(AffinityTable *table, const Client *client) noexcept nogil:
    """A client's slot while it holds, else 0; nothing is changed."""
    cdef uint64_t seen
    slot_for(client, &seen)
    return seen if is_of(seen, client) else 0


cdef inline uint32_t affine_backend(
        AffinityTable *table, const FlowTable *flows, const Affinity *by, Addr addr, uint32_t now) noexcept nogil:
    """The backend id that a client sticks to, for packets in mid-flow; 0: none."""
    cdef Client client = client_of(table, by, flows.key, addr, now)
    cdef const Taker *taker = taker_of(by, &client, live_slot(table, &client))
    return taker.backend if taker != NULL else 0


cdef inline void note_affine(const FlowTable *flows, const Service *service, bint stays) noexcept nogil:
    """A client that was remembered begins a flow: where it sticks, or it is placed anew."""
    cdef ServiceEvents *events = events_of(flows, service)
    if events == NULL:
        return
    if stays:
        events.affine += 1
    else:
        events.affine_moved += 1


cdef inline uint32_t sticky_or_scheduled(
        AffinityTable *table, SchedulerState *state, const FlowTable *flows, const ServiceTable *services,
        const Service *service, Cursor *cursor, uint64_t hashed, Addr addr, uint32_t now) noexcept nogil:
    """The backend id of a client's new flow: where its last one went, else the scheduler's, and the next will follow.

    0 when the scheduler has none. Bounded: TRIES, each one look at a bucket.
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
            # if not, another has renewed it
            compare_and_swap_u64(slot, seen, new_slot(&client, by, sticky_to_keep(by, services, seen, taker)))
            table.placed += 1
            note_affine(flows, service, True)
            return taker.backend
        held = is_of(seen, &client)
        if chosen == 0:
            chosen = scheduled_backend(state, flows, service, cursor, hashed)
        if chosen == 0 or compare_and_swap_u64(slot, seen, new_slot(&client, by, services.sticky_numbers[chosen])):
            break
    if chosen != 0 and held:
        note_affine(flows, service, False)
    return chosen


# --- clearing ---------------------------------------------------------------------------------------------------------

cdef inline void clear_ended(AffinityTable *table, uint32_t now) noexcept nogil:
    """Of the buckets that are due since the last call: a slot would hold again when ticks come round, in twelve days.

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
