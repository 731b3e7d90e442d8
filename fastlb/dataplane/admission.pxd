"""Who may open a flow, and how many flows are remembered.

    is_denied         every packet of a client    the service's lists, by the longest prefix that matches
    source_may_begin  the first of a flow         how many flows its source has begun lately, with any worker
    may_make_entry    before an entry is made     how many entries this worker has made lately

Sources have token buckets in a table of slots of eight bytes, one for each source of a service. By the virtual
scheduling algorithm of ITU-T I.371 a slot does not say how many flows are left, but when its bucket is full again.

    slot  | tag of the source : 24 | when it is full again, in ticks of 1/16 us : 40 |

The table's size is fixed. A new source takes the slot of its set whose bucket is full first; mostly it is full already,
so nothing is forgotten, and sources at their limit are the last to be. Bounded: one cache line, LIMIT_TRIES exchanges.
The time wraps in 19 hours. A bucket is never further from full than MAX_BURST seconds: one that seems to be has been
full for long.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport FLOW_SYN, FLOW_UDP_NEW, FlowTable
from fastlb.dataplane.flowhash cimport SHARDS, client_mix
from fastlb.dataplane.lookup cimport MISSING, find
from fastlb.dataplane.machine cimport compare_and_swap_u64, load_acquire_u64, unlikely
from fastlb.dataplane.reserve cimport is_low_priority
from fastlb.dataplane.route cimport mask_addr
from fastlb.dataplane.types cimport GATE_LIMIT, PROTO_TCP, Addr, Admission, Packet, Service, ServiceTable


cdef enum:
    LIMIT_SETS = 1 << 15
    LIMIT_WAYS = 8           # a cache line
    LIMIT_TRIES = 4
    TICKS = 16               # a microsecond
    TIME_BITS = 40
    TAG_MASK = 0xFFFFFF
    MAX_BURST = 3600         # seconds
    SET_SHIFT = 49           # the upper 15 bits of a key name its set
    TOKENS_PER_ENTRY = SHARDS * 1000000  # a microsecond refills rate × owned shards
    MAX_REFILL_US = 1000000000  # longest time that refills at once, so that products stay within 64 bits


cdef struct FlowBudget:
    # A token bucket for the entries that one worker makes.
    uint64_t tokens_spent    # and not yet refilled
    uint64_t refilled_at     # us
    uint32_t ran_out_at[2]   # ms: when a flow last got no entry; [1]: one of low priority (reserve.pxd)
    uint32_t ran_out_once    # bits: whether that has happened at all


# --- lists -----------------------------------------------------------------------------------------------------------

cdef inline uint64_t source_meta(uint8_t family, uint32_t length, uint32_t service) noexcept nogil:
    return <uint64_t>family << 24 | <uint64_t>length << 32 | <uint64_t>service << 40


cdef inline uint32_t listed(const ServiceTable *services, uint32_t index, Addr addr) noexcept nogil:
    """Return 1 if the service's lists allow the address, 0 if they deny it, MISSING if it is in neither. Bounded by the
    number of different prefix lengths in them."""
    cdef const Service *service = &services.services[index]
    cdef const Admission *admission = service.admission
    cdef uint32_t found
    cdef int i
    for i in range(admission.length_count):
        found = find(
            &services.sources, mask_addr(addr, service.family, admission.lengths[i]),
            source_meta(service.family, admission.lengths[i], index))
        if found != MISSING:
            return found
    return MISSING


cdef inline bint is_denied(const ServiceTable *services, const Packet *p) noexcept nogil:
    """True if the lists of a client-leg packet's service keep it out.

    An ICMP error counts as its flow's client, because the router that complains may have any address; and as its
    sender, if a list denies that.
    """
    cdef uint32_t found = listed(services, p.service, p.src)
    if found == 0 or (found == MISSING and services.services[p.service].admission.only_allowed):
        return True
    return p.quoted != 0 and listed(services, p.service, p.sender) == 0


# --- new flows by source ----------------------------------------------------------------------------------------------

cdef inline uint64_t ticks_mask() noexcept nogil:
    return ((<uint64_t>1) << TIME_BITS) - 1


cdef inline uint64_t source_key(const uint64_t *key, const Service *service, Addr client) noexcept nogil:
    """Return the hash of a source of a service. It is taken under the flow table's secret key, so that nobody outside
    can aim at a slot."""
    return client_mix(
        key, mask_addr(client, service.family, service.admission.limit_prefix), service.slot, 0, service.family)


cdef inline uint64_t until_full(uint64_t slot, uint64_t now, uint64_t most) noexcept nogil:
    """Return the ticks until a bucket is full again; 0 if it is."""
    cdef uint64_t left = (slot - now) & ticks_mask()
    return left if left <= most else 0


cdef inline uint64_t *slot_of_source(uint64_t *slots, uint64_t key, uint64_t now, uint64_t *seen) noexcept nogil:
    """Return the source's slot, or the one that it may take. `seen` is set to what is in it."""
    cdef uint64_t *ways = &slots[(key >> SET_SHIFT) * LIMIT_WAYS]
    cdef uint64_t *first = ways
    cdef uint64_t least = ~<uint64_t>0
    cdef uint64_t value, left
    cdef int way
    for way in range(LIMIT_WAYS):
        value = load_acquire_u64(&ways[way])
        if value >> TIME_BITS == key & TAG_MASK:
            seen[0] = value
            return &ways[way]
        left = until_full(value, now, <uint64_t>MAX_BURST * 1000000 * TICKS)
        if left < least:
            seen[0], first, least = value, &ways[way], left
    return first


cdef inline bint take_from_bucket(
        uint64_t *slots, const Admission *admission, uint64_t key, uint64_t now_us) noexcept nogil:
    """True if this source may begin another flow now, which is then counted.

    Where other workers change the slot LIMIT_TRIES times meanwhile the flow may begin, uncounted.
    """
    cdef uint64_t now = now_us * TICKS & ticks_mask()
    cdef uint64_t seen = 0
    cdef uint64_t full = 0
    cdef uint64_t *slot
    cdef int _try
    for _try in range(LIMIT_TRIES):
        slot = slot_of_source(slots, key, now, &seen)
        full = until_full(seen, now, admission.limit_burst) if seen >> TIME_BITS == key & TAG_MASK else 0
        full += admission.limit_interval
        if full > admission.limit_burst:
            return False
        if compare_and_swap_u64(slot, seen, (key & TAG_MASK) << TIME_BITS | ((now + full) & ticks_mask())):
            return True
    return True


cdef inline bint source_may_begin(
        uint64_t *slots, const FlowTable *flows, const Service *service, const Packet *p, uint64_t now_us,
        ) noexcept nogil:
    if not service.gates & GATE_LIMIT:
        return True
    return take_from_bucket(slots, service.admission, source_key(flows.key, service, p.src), now_us)


# --- entries by time --------------------------------------------------------------------------------------------------

cdef inline void refill(FlowBudget *budget, uint64_t each_us, uint64_t now_us) noexcept nogil:
    """Take back the tokens that time has given since the last call. A clock that steps back gives none."""
    cdef int64_t elapsed = <int64_t>(now_us - budget.refilled_at)
    cdef uint64_t refilled = each_us * min(max(elapsed, <int64_t>0), <int64_t>MAX_REFILL_US)
    budget.tokens_spent -= min(budget.tokens_spent, refilled)
    budget.refilled_at = now_us


cdef inline bint may_make_entry(
        FlowBudget *budget, const ServiceTable *services, const FlowTable *flows, const Service *service,
        uint64_t now_us) noexcept nogil:
    """True if this worker has tokens for one more entry. Its share of the rate is that of its shards, and one entry at
    least.

    Services of low priority leave the last quarter of the bucket alone, so that the others come first when tokens are
    short.
    """
    cdef uint64_t room
    if services.new_flow_rate == 0:
        return True
    if budget.refilled_at != now_us:
        refill(budget, services.new_flow_rate * flows.owned_shards, now_us)
    room = services.new_flow_burst * 1000000 * flows.owned_shards
    if unlikely(services.mixed) and is_low_priority(services, service):
        room -= room >> 2
    return budget.tokens_spent + TOKENS_PER_ENTRY <= max(room, <uint64_t>TOKENS_PER_ENTRY)


cdef inline void spend_entry(FlowBudget *budget) noexcept nogil:
    """Note that an entry was made."""
    budget.tokens_spent += TOKENS_PER_ENTRY


cdef inline void note_no_tokens(
        FlowBudget *budget, const ServiceTable *services, const Service *service, uint32_t now) noexcept nogil:
    """Note that a flow of this service gets no entry."""
    cdef bint low = is_low_priority(services, service)
    budget.ran_out_at[low] = now
    budget.ran_out_once |= 1 << low


cdef inline bint may_go_by_hash(
        const FlowBudget *budget, const ServiceTable *services, const Service *service, uint32_t now) noexcept nogil:
    """True if a packet that may begin a flow can as well be of a flow that was forwarded without an entry, and so must
    go by the hash, too.

    A datagram, or a SYN that is sent again, does not tell. It is ruled out once no flow of such a service went without
    an entry for as long as a flow of one packet is remembered. (The clock comes round in 49 days; then this may be true
    once more without reason.)
    """
    cdef int state = FLOW_SYN if service.protocol == PROTO_TCP else FLOW_UDP_NEW
    cdef bint low = is_low_priority(services, service)
    if not budget.ran_out_once >> low & 1:
        return False
    return now - budget.ran_out_at[low] <= services.timeouts[service.timeouts].of_state[state]
