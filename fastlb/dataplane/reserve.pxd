"""The reserve of the flow table that is kept for flows that can prove themselves.

In nat and fullnat a TCP flow is half-open, and gives way, until its client and its backend have answered each other. In
the one-way modes a client's second packet is all that can be seen of an established flow, and over UDP a backend
answers whoever asks. So a forger who sends two packets from each source looks like any client, and fills the table with
entries that nothing removes before their time.

Where both kinds of services share the table, flows of the second kind have low priority. They take new entries only
while their shard is filled less than RESERVE_AT sixteenths, which is `flows` and a twelfth more. Beyond that such a
flow replaces another one of low priority that is half-open, or any that is stale, or gets no entry. The last quarter of
the tokens for new flows (admission.pxd) is not theirs, either.
"""

from libc.stdint cimport uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport (
    ENTRIES, Bucket, FlowEntry, FlowTable, backend_of, evict, first_bucket, forget, half_open, is_stale, second_bucket,
    state_of)
from fastlb.dataplane.machine cimport in_order
from fastlb.dataplane.mode cimport translates
from fastlb.dataplane.types cimport PROTO_TCP, Service, ServiceTable


cdef enum:
    RESERVE_AT = 13          # sixteenths of a shard's entries


cdef inline bint proves_itself(const Service *service) noexcept nogil:
    """True if the service's flows are TCP's, and both of their sides are seen."""
    return service.protocol == PROTO_TCP and translates(service)


cdef inline bint is_low_priority(const ServiceTable *services, const Service *service) noexcept nogil:
    """True if the service's flows stand back behind those of others."""
    return services.mixed and not proves_itself(service)


cdef inline bint only_reserve_left(
        const ServiceTable *services, const FlowTable *table, const Service *service, uint32_t shard) noexcept nogil:
    """True if all entries that the shard has left are kept for flows that can prove themselves, and this service's
    cannot."""
    return is_low_priority(services, service) and (
        table.flows[shard] * 16 >= <uint64_t>table.per_shard * (ENTRIES * RESERVE_AT))


cdef inline bint may_be_replaced(
        const ServiceTable *services, const FlowEntry *entry, uint32_t now) noexcept nogil:
    """True if a flow of low priority may take this entry: it is stale, or half-open and of low priority, too."""
    if entry.fingerprint == 0:
        return False
    if is_stale(entry, services, now):
        return True
    return half_open(state_of(entry)) and is_low_priority(
        services, &services.services[services.backends[backend_of(entry)].service])


cdef inline FlowEntry *entry_to_replace(
        FlowTable *table, const ServiceTable *services, uint32_t shard, uint64_t fingerprint, uint32_t now,
        ) noexcept nogil:
    """Return the replaceable entry that has been idle longest; NULL if there is none. Bounded: two buckets."""
    cdef Bucket *first = first_bucket(table, shard, fingerprint)
    cdef Bucket *second = second_bucket(table, shard, fingerprint)
    cdef FlowEntry *oldest = NULL
    cdef FlowEntry *entry
    cdef int i
    for i in range(2 * ENTRIES):
        entry = &first.entries[i] if i < ENTRIES else &second.entries[i - ENTRIES]
        if may_be_replaced(services, entry, now) and (oldest == NULL or now - entry.seen > now - oldest.seen):
            oldest = entry
    return oldest


cdef inline FlowEntry *find_room_by_replacing(
        FlowTable *table, const ServiceTable *services, uint32_t shard, uint64_t fingerprint, uint32_t now,
        ) noexcept nogil:
    """Return an entry for a flow that must not make its shard any fuller, as `find_room` does; NULL, which is counted,
    if none can be replaced."""
    cdef FlowEntry *entry = entry_to_replace(table, services, shard, fingerprint, now)
    if entry == NULL:
        table.untracked += 1
        return NULL
    if is_stale(entry, services, now):
        table.expired += 1
        forget(table, shard, entry)
    else:
        evict(table, shard, entry, services)
    in_order()
    return entry
