# The Python face of admission.pxd: lists and limits of a snapshot's services.

assert_equal(LIMIT_WAYS * sizeof(uint64_t), 64)          # a cache line
assert_equal(<uint64_t>1 << (64 - SET_SHIFT), LIMIT_SETS)


cdef int put_admission(ServiceTable *table, Service *service, uint32_t index, spec) except -1:
    """Set up the lists and limits of ``spec``. `free_admission` frees their memory."""
    cdef Admission *admission
    limit = spec.source_limit
    if not spec.allow and not spec.deny and limit is None:
        return 0
    admission = <Admission *>zeroed(1, sizeof(Admission))
    service.admission = admission
    if spec.allow or spec.deny:
        service.gates |= GATE_LISTS
        admission.only_allowed = len(spec.allow) > 0
        for length in sorted({network.prefixlen for network in (*spec.allow, *spec.deny)}, reverse=True):
            admission.lengths[admission.length_count] = length
            admission.length_count += 1
        for networks, allowed in ((spec.deny, 0), (spec.allow, 1)):
            for network in networks:
                table_put(
                    &table.sources, addr_from(network.network_address),
                    source_meta(network.version, network.prefixlen, index), allowed)
    if limit is not None:
        if not 0 < limit.burst <= limit.rate * MAX_BURST:
            raise ValueError(f"a burst of {limit.burst} at {limit.rate} a second; at most {MAX_BURST} s' worth")
        service.gates |= GATE_LIMIT
        admission.limit_prefix = limit.prefix
        admission.limit_interval = max(1, round(1000000 * TICKS / limit.rate))
        admission.limit_burst = admission.limit_interval * <uint64_t>limit.burst
    return 0


cdef uint64_t sources_of(list specs) except? 0:
    """Return how many prefixes the lists of all these services have."""
    return sum(len(spec.allow) + len(spec.deny) for spec in specs)


cdef void free_admission(ServiceTable *table) noexcept:
    cdef uint32_t index
    for index in range(table.service_count if table.services != NULL else 0):
        free(<void *>table.services[index].admission)
    table_free(&table.sources)
