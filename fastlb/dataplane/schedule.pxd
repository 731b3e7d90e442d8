"""Which backend a flow without an entry gets.

    hash        maglev, ketama, source-hash: of the flow, or its client. Whoever has the configuration finds the same,
                so that flows in mid-flow go on with another balancer, or after a restart without the flow table
    turns       rr, wrr: the next of a rotation, in which a backend stands as often as its weight says. Each worker has
                a place of its own in it; random: any of its turns
    least load  lc, wlc, lrt: of all backends; p2c: of two drawn from the rotation

A packet in mid-flow of a service whose scheduler is no hash goes by its Maglev table: that is the same for everybody.
"""

from libc.math cimport exp
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport FlowTable
from fastlb.dataplane.flowhash cimport flow_hash
from fastlb.dataplane.machine cimport likely, must, prefetch
from fastlb.dataplane.types cimport Addr, Candidate, Packet, Service, ServiceTable


cdef enum Scheduler:
    BY_MAGLEV = 0
    BY_KETAMA = 1
    BY_SOURCE = 2
    BY_TURNS = 3
    BY_LOT = 4
    BY_FLOWS = 5             # flows by weight
    BY_RESPONSE = 6          # response time times flows by weight
    BY_TWO = 7               # the same, of two


cdef enum:
    CURSORS = 1 << 16        # services of a higher index share places in rotations
    LEAST_RESPONSE = 64      # us: faster backends count as equally fast, and so does one that has not yet answered
    RESPONSE_MEMORY = 10000  # ms, after which an earlier response time has a weight of 1/e
    START_BITS = 15          # of FlowTuple.began
    START_TICK = 16          # us
    START_WRAPS = 400        # ms, before which `began` comes round


cdef struct Response:
    # Of one backend: peak-EWMA of what its handshakes took, in us; 0: none yet.
    float cost
    uint32_t at              # ms


cdef struct SchedulerState:
    # What one worker's schedulers remember.
    uint32_t *cursors        # by service: where in its rotation it is
    Response *responses      # by backend id
    uint64_t lottery


# --- hashes -----------------------------------------------------------------------------------------------------------

cdef inline uint32_t maglev_backend(const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    """The backend id in slot hash mod M, or `offset` slots further; 0 when the service has no backend."""
    if service.maglev == NULL:
        return 0
    return service.members[service.maglev[(hashed + offset) % service.maglev_size]]


cdef inline uint32_t ring_point(const Service *service, uint64_t hashed) noexcept nogil:
    """The position of the first point from the hash on (Karger et al., 1997); `ring_size` behind the last one."""
    cdef uint32_t at = service.ring_index[hashed >> service.ring_shift]
    while at < service.ring_size and service.ring_points[at] < hashed:
        at += 1
    return at


cdef inline uint32_t ring_backend(const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    """The backend id of the first point from the hash on, or of the point `offset` further."""
    if service.ring_size == 0:
        return 0
    return service.members[service.ring[(ring_point(service, hashed) + offset) % service.ring_size]]


cdef inline uint64_t placement_hash(
        const ServiceTable *services, const Service *service, Addr client, uint16_t be_cport, Addr vip,
        uint16_t be_vport) noexcept nogil:
    """Of a flow: what a fleet agrees on."""
    if service.scheduler == BY_SOURCE:
        return flow_hash(client, 0, client, 0, 0, service.family, services.hash_seed)
    return flow_hash(client, be_cport, vip, be_vport, service.protocol, service.family, services.hash_seed)


cdef inline uint64_t hash_of_flow(
        const ServiceTable *services, const Service *service, const Packet *p) noexcept nogil:
    """Of a client-leg packet."""
    if p.placement != 0:
        return p.placement
    return placement_hash(services, service, p.src, p.be_sport, p.dst, p.be_dport)


cdef inline uint32_t hashed_backend(const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    """Where a packet in mid-flow goes; `offset`: how many alternatives to pass over. 0: the service has no backend."""
    if service.scheduler == BY_KETAMA:
        return ring_backend(service, hashed, offset)
    return maglev_backend(service, hashed, offset)


cdef inline void prefetch_placement(const Service *service, uint64_t hashed) noexcept nogil:
    """What `hashed_backend` will read first."""
    if likely(service.maglev != NULL and service.scheduler != BY_KETAMA):
        prefetch(&service.maglev[hashed % service.maglev_size])


# --- turns and lots ---------------------------------------------------------------------------------------------------

cdef inline uint32_t next_turn(SchedulerState *state, const Service *service, uint32_t index) noexcept nogil:
    """A position in the service's members."""
    cdef uint32_t *cursor = &state.cursors[index & (CURSORS - 1)]
    must(service.rotation_size > 0)
    if cursor[0] >= service.rotation_size:               # round, or the rotation has become shorter
        cursor[0] = 0
    cursor[0] += 1
    return service.rotation[cursor[0] - 1]


cdef inline uint32_t draw(SchedulerState *state, uint32_t below) noexcept nogil:
    """xorshift64* (Vigna, 2016), scaled by multiplication."""
    state.lottery ^= state.lottery >> 12
    state.lottery ^= state.lottery << 25
    state.lottery ^= state.lottery >> 27
    return <uint32_t>((state.lottery * <uint64_t>0x2545F4914F6CDD1DU >> 32) * below >> 32)


cdef inline uint32_t lot(SchedulerState *state, const Service *service) noexcept nogil:
    return service.rotation[draw(state, service.rotation_size)]


# --- load -------------------------------------------------------------------------------------------------------------

cdef inline int64_t active_flows(const FlowTable *flows, uint32_t backend) noexcept nogil:
    """Of all workers."""
    cdef int64_t active = 0
    cdef uint32_t i
    for i in range(flows.row_count[0]):
        active += flows.rows[i][backend].active_flows
    return active


cdef inline double response_of(const SchedulerState *state, const Candidate *candidate) noexcept nogil:
    """Microseconds: as this worker saw it, else as health checks did."""
    cdef double seen = state.responses[candidate.backend].cost
    if seen == 0:
        seen = candidate.response
    return max(seen, <double>LEAST_RESPONSE)


cdef inline double load_of(
        const SchedulerState *state, const FlowTable *flows, const Service *service, const Candidate *candidate,
        ) noexcept nogil:
    """What one more flow would make of it."""
    cdef double load = <double>(active_flows(flows, candidate.backend) + 1) / candidate.weight
    return load if service.scheduler == BY_FLOWS else load * response_of(state, candidate)


cdef inline uint32_t least_loaded(
        SchedulerState *state, const FlowTable *flows, const Service *service, uint32_t index) noexcept nogil:
    """The candidate with the least load; of equals, the next in turn. One look at each candidate and worker."""
    cdef uint32_t *cursor = &state.cursors[index & (CURSORS - 1)]
    cdef uint32_t best = 0
    cdef uint32_t at = 0
    cdef uint32_t i
    cdef double least = 0
    cdef double load
    for i in range(service.candidate_count):
        at = (cursor[0] + i) % service.candidate_count
        load = load_of(state, flows, service, &service.candidates[at])
        if i == 0 or load < least:
            least, best = load, at
    cursor[0] = best + 1
    return service.candidates[best].backend


cdef inline uint32_t better_of_two(
        SchedulerState *state, const FlowTable *flows, const Service *service) noexcept nogil:
    """Of two that differ, drawn by weight (Mitzenmacher, 2001). Bounded: a few draws for the second."""
    cdef uint32_t first = service.candidate_of[lot(state, service)]
    cdef uint32_t second = first
    cdef int _try
    for _try in range(4):
        second = service.candidate_of[lot(state, service)]
        if second != first:
            break
    if (load_of(state, flows, service, &service.candidates[second])
            < load_of(state, flows, service, &service.candidates[first])):
        first = second
    return service.candidates[first].backend


cdef inline uint32_t scheduled_backend(
        SchedulerState *state, const FlowTable *flows, const Service *service, uint32_t index, uint64_t hashed,
        ) noexcept nogil:
    """The backend id of a new flow; 0 when the service has none. `index` is the service's, `hashed` the flow's."""
    if likely(service.scheduler <= BY_SOURCE) or service.candidate_count == 0:
        return hashed_backend(service, hashed, 0)
    if service.scheduler == BY_TURNS:
        return service.members[next_turn(state, service, index)]
    if service.scheduler == BY_LOT:
        return service.members[lot(state, service)]
    if service.scheduler == BY_TWO:
        return better_of_two(state, flows, service)
    return least_loaded(state, flows, service, index)


# --- response times ---------------------------------------------------------------------------------------------------

cdef inline uint16_t start_tick(uint64_t now_us) noexcept nogil:
    return <uint16_t>(now_us // START_TICK & ((1 << START_BITS) - 1))


cdef inline void note_response(
        SchedulerState *state, uint32_t backend, uint16_t began, uint32_t since, uint64_t now_us, uint32_t now,
        ) noexcept nogil:
    """The backend has answered a SYN: peak-EWMA, which takes a slower answer at once and forgets it slowly.

    `began` is the tick, `since` the millisecond of the SYN.
    """
    cdef Response *response = &state.responses[backend]
    cdef double took = ((start_tick(now_us) - began) & ((1 << START_BITS) - 1)) * START_TICK
    cdef double kept
    if <int32_t>(now - since) >= START_WRAPS:
        took = 1000.0 * (now - since)
    if took >= response.cost:
        response.cost = took if took > 1 else 1
    else:
        kept = exp(-<double>(now - response.at) / RESPONSE_MEMORY)
        response.cost = kept * response.cost + (1 - kept) * took
    response.at = now
