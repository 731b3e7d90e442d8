"""Looking at the flow table from outside, for commands: without a lock, and without leaving a trace.

The table belongs to the workers, and one of them may be writing the very entry that is read here. Invariant: a copy is
shown only when its tuple has, under the table's key, the fingerprint of the entry, and the entry was of the same flow
and backend before and after. So no tuple is shown that never was; state and time are those of some moment meanwhile.
What a worker moves from one bucket to another during a walk may be met twice, or not at all.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport (
    ENTRIES, FLOW_STATES, STATE_SHIFT, FlowEntry, FlowTable, backend_of, is_stale, state_of)
from fastlb.dataplane.flowhash cimport client_mix
from fastlb.dataplane.flowhash cimport fingerprint as flow_fingerprint
from fastlb.dataplane.machine cimport load_acquire_u32, load_acquire_u64, load_fence
from fastlb.dataplane.route cimport mask_addr
from fastlb.dataplane.types cimport Addr, FlowTuple, ServiceTable
from fastlb.dataplane.wire cimport same_addr


cdef struct FlowCopy:
    FlowEntry entry
    FlowTuple flow


cdef struct FlowFilter:
    const uint8_t *backends  # by id: not 0, when it is wanted; NULL: all are
    uint32_t backend_limit
    uint32_t states          # those wanted, a bit each
    Addr client              # the wanted prefix
    uint32_t length
    uint8_t family           # 0: every client is wanted


cdef inline FlowEntry *entry_at(const FlowTable *table, uint64_t at) noexcept nogil:
    return &table.buckets[at // ENTRIES].entries[at % ENTRIES]


cdef inline void copy_entry(const FlowEntry *entry, FlowEntry *copy) noexcept nogil:
    copy.fingerprint = load_acquire_u64(&entry.fingerprint)
    copy.packed = load_acquire_u32(&entry.packed)
    copy.seen = load_acquire_u32(&entry.seen)


cdef inline bint is_whole(const FlowTable *table, const FlowEntry *entry, const FlowCopy *copy) noexcept nogil:
    """True if the tuple belongs to the entry, and the entry has not changed meanwhile.

    Either of the two fingerprints will do: a reload may have changed whether the service forwards by nat.
    """
    cdef const FlowTuple *flow = &copy.flow
    cdef uint64_t client = client_mix(table.key, flow.client, flow.be_cport, flow.protocol, flow.family)
    if (flow_fingerprint(table.key, client, flow.vip, flow.be_vport, True) != copy.entry.fingerprint
            and flow_fingerprint(table.key, client, flow.vip, flow.be_vport, False) != copy.entry.fingerprint):
        return False
    load_fence()
    return (load_acquire_u64(&entry.fingerprint) == copy.entry.fingerprint
            and (load_acquire_u32(&entry.packed) ^ copy.entry.packed) & ((1 << STATE_SHIFT) - 1) == 0)


cdef inline bint is_wanted(const FlowFilter *filter, const FlowEntry *entry) noexcept nogil:
    """True if the filter wants the flow, as far as the hot part tells; that spares a look at the tuple."""
    cdef uint32_t backend = backend_of(entry)
    if state_of(entry) >= FLOW_STATES or not filter.states >> state_of(entry) & 1:
        return False
    return filter.backends == NULL or (backend < filter.backend_limit and filter.backends[backend] != 0)


cdef inline bint is_from(const FlowFilter *filter, const FlowTuple *flow) noexcept nogil:
    if filter.family == 0:
        return True
    return filter.family == flow.family and same_addr(mask_addr(flow.client, flow.family, filter.length), filter.client)


cdef inline bint copy_flow(
        const FlowTable *table, const ServiceTable *services, const FlowFilter *filter, uint64_t at, uint32_t now,
        FlowCopy *copy) noexcept nogil:
    """Copy the entry with this number. Returns True if there is one that has not expired and is wanted."""
    cdef const FlowEntry *entry = entry_at(table, at)
    copy_entry(entry, &copy.entry)
    if copy.entry.fingerprint == 0 or not is_wanted(filter, &copy.entry) or is_stale(&copy.entry, services, now):
        return False
    copy.flow = table.tuples[at]
    return is_from(filter, &copy.flow) and is_whole(table, entry, copy)


cdef inline bint next_flow(
        const FlowTable *table, const ServiceTable *services, const FlowFilter *filter, uint64_t *at, uint64_t end,
        uint32_t now, FlowCopy *copy) noexcept nogil:
    """Copy the next wanted flow from entry `at` on and before `end`, and move `at` behind it; False if there is
    none."""
    while at[0] < end:
        at[0] += 1
        if copy_flow(table, services, filter, at[0] - 1, now, copy):
            return True
    return False


cdef inline void count_flows(
        const FlowTable *table, const ServiceTable *services, const FlowFilter *filter, uint64_t at, uint64_t end,
        uint32_t now, uint64_t *counts) noexcept nogil:
    """Count the wanted flows from entry `at` to `end` by backend id and state: FLOW_STATES counts for each id."""
    cdef FlowCopy copy
    while next_flow(table, services, filter, &at, end, now, &copy):
        counts[<uint64_t>backend_of(&copy.entry) * FLOW_STATES + state_of(&copy.entry)] += 1
