"""Which backend a flow without an entry gets.

    hash        maglev, ketama, source-hash: by the hash of the flow, or of its client. Whoever has the configuration
                finds the same, so that flows in mid-flow go on with another balancer, or after a restart without the
                flow table
    turns       rr, wrr: the next one in the order of smooth weighted round robin, in which a backend stands as often as
                its weight says. Each worker has a cursor of its own in it. random: any position of that order
    least load  lc, wlc, lrt: of all backends; p2c: of two that are drawn from that order

A packet in mid-flow of a service whose scheduler is no hash goes by its Maglev table: that is the same for everybody.

A backend may have a cap of flows, and with a hash a service may bound what one backend has of the flows of all. A
backend without room is passed over for the next slot, point, turn or draw, and after MAX_ATTEMPTS of these for the
least loaded one.

A new scheduler is a number and its predicates here, its name in snapshot.pxi and its row in model/modes.py.
"""

from libc.math cimport exp
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport FlowTable, events_of
from fastlb.dataplane.flowhash cimport flow_hash
from fastlb.dataplane.machine cimport likely, mul_high, must, prefetch, unlikely
from fastlb.dataplane.types cimport Addr, Candidate, Packet, Service, ServiceEvents, ServiceTable


cdef enum Scheduler:
    BY_MAGLEV = 0
    BY_KETAMA = 1
    BY_SOURCE_HASH = 2
    BY_WRR = 3
    BY_RANDOM = 4
    BY_LEAST_FLOWS = 5       # flows by weight
    BY_LEAST_RESPONSE = 6    # response time times flows by weight
    BY_P2C = 7               # the same, of two


cdef enum:
    CURSORS = 1 << 16        # services of a higher index share them
    MAX_ATTEMPTS = 16        # at backends without room, before all of them are looked at
    NO_CAP = 0xFFFFFFFFU
    BOUND_UNIT = 100         # bounded loads are in hundredths
    MIN_RESPONSE = 64        # us: faster backends count as equally fast, and so does one that was never asked
    RESPONSE_MEMORY = 10000  # ms, after which an earlier response time has a weight of 1/e
    RESPONSE_REST = 1000     # ms without an answer, or a SYN, after which it begins to be forgotten
    REFUSAL = 1000000        # us: what a RST in answer to a SYN counts as; each further one in a row twice as much
    MAX_REFUSALS = 11        # in a row
    MAX_SILENCE = 1024000    # ms: longer silence counts as this, which is what so many refusals come to
    START_BITS = 15          # of FlowTuple.began
    START_TICK = 16          # us
    START_WRAPS = 400        # ms, before which `began` comes round


cdef struct Response:
    # How one backend has answered this worker's SYNs.
    float cost               # peak-EWMA of what its handshakes took, in us; 0: none yet
    uint32_t at              # of the last of these, ms
    uint32_t asked           # when the first SYN came that it has not answered since, ms
    uint32_t tried           # when the last SYN came, ms
    uint16_t silent          # it has answered none since `asked`
    uint16_t refused         # how many it has answered by RST since it last took one


cdef struct Cursor:
    # Where one worker is with one service. All but the position is of one batch.
    uint32_t position        # in the order of turns, or among the candidates
    bint full                # no candidate has room
    int64_t flows            # of all candidates
    uint64_t batch
    const Service *service


cdef struct SchedulerState:
    # What one worker's schedulers remember.
    Cursor *cursors          # by service
    Response *responses      # by backend id
    uint64_t random_state
    uint64_t batch           # the number of this one
    uint32_t now             # ms


# --- what tells schedulers apart, for the other stages --------------------------------------------------------------

cdef inline bint goes_by_hash(const Service *service) noexcept nogil:
    """True if the hash of a flow, or of its client, names the backend."""
    return service.scheduler <= BY_SOURCE_HASH


cdef inline bint goes_in_turn(const Service *service) noexcept nogil:
    """True if backends take turns, in the order of smooth weighted round robin."""
    return service.scheduler == BY_WRR


cdef inline bint goes_by_load(const Service *service) noexcept nogil:
    """True if backends are compared by `load_of`, all of them or two."""
    return service.scheduler >= BY_LEAST_FLOWS


cdef inline bint goes_by_response(const Service *service) noexcept nogil:
    """True if response times are part of a backend's load."""
    return service.scheduler == BY_LEAST_RESPONSE or service.scheduler == BY_P2C


cdef inline bint compares_all(const Service *service) noexcept nogil:
    """True if the loads of all candidates are compared for every new flow."""
    return service.scheduler == BY_LEAST_FLOWS or service.scheduler == BY_LEAST_RESPONSE


cdef inline bint has_ring(const Service *service) noexcept nogil:
    """True if the hash names a point on a ring, and not a slot of the Maglev table."""
    return service.scheduler == BY_KETAMA


# --- hashes -----------------------------------------------------------------------------------------------------------

cdef inline uint32_t slot_of(const Service *service, uint64_t hashed) noexcept nogil:
    """Return hashed mod M, by multiplication instead of a division of 64 bits.

    The quotient's estimate is too small by one at most, because 2 ** 64 / M and its integer differ by less than one.
    """
    cdef uint64_t rest = hashed - mul_high(hashed, service.maglev_inverse) * service.maglev_size
    return <uint32_t>(rest - service.maglev_size if rest >= service.maglev_size else rest)


cdef inline uint32_t maglev_position(const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    """Return who among the members is in slot hash mod M, or `offset` slots further."""
    return service.maglev[slot_of(service, hashed + offset)]


cdef inline uint32_t ring_point(const Service *service, uint64_t hashed) noexcept nogil:
    """Return the position of the first point from the hash on (Karger et al., 1997); `ring_size` behind the last
    one."""
    cdef uint32_t at = service.ring_index[hashed >> service.ring_shift]
    while at < service.ring_size and service.ring_points[at] < hashed:
        at += 1
    return at


cdef inline uint32_t ring_position(const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    """Return who has the first point from the hash on, or the point `offset` further."""
    return service.ring[(ring_point(service, hashed) + offset) % service.ring_size]


cdef inline uint64_t placement_hash(
        const ServiceTable *services, const Service *service, Addr client, uint16_t be_cport, Addr vip,
        uint16_t be_vport) noexcept nogil:
    """Return the hash of a flow that a whole fleet agrees on."""
    if service.scheduler == BY_SOURCE_HASH:
        return flow_hash(client, 0, client, 0, 0, service.family, services.hash_seed)
    return flow_hash(client, be_cport, vip, be_vport, service.protocol, service.family, services.hash_seed)


cdef inline uint64_t hash_of_flow(
        const ServiceTable *services, const Service *service, const Packet *p) noexcept nogil:
    """Return the `placement_hash` of a client-leg packet."""
    if p.placement != 0:
        return p.placement
    return placement_hash(services, service, p.src, p.be_sport, p.dst, p.be_dport)


cdef inline uint32_t hashed_position(const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    """Return who among the members the hash names, or who comes `offset` alternatives later. The service must have a
    candidate."""
    if has_ring(service):
        return ring_position(service, hashed, offset)
    return maglev_position(service, hashed, offset)


cdef inline uint32_t hashed_backend(const Service *service, uint64_t hashed) noexcept nogil:
    """Return the backend id that the hash alone names; 0 if the service has no candidate."""
    if service.candidate_count == 0:
        return 0
    return service.members[hashed_position(service, hashed, 0)]


cdef inline const Candidate *hashed_candidate(
        const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    return &service.candidates[service.candidate_of[hashed_position(service, hashed, offset)]]


cdef inline void prefetch_placement(const Service *service, uint64_t hashed) noexcept nogil:
    """Fetch what `hashed_backend` will read first."""
    if likely(service.maglev != NULL and not has_ring(service)):
        prefetch(&service.maglev[slot_of(service, hashed)])


# --- turns and draws --------------------------------------------------------------------------------------------------

cdef inline Cursor *cursor_of(SchedulerState *state, uint32_t index) noexcept nogil:
    """Return this worker's cursor of the service with this index."""
    return &state.cursors[index & (CURSORS - 1)]


cdef inline uint32_t next_in_wrr(Cursor *cursor, const Service *service) noexcept nogil:
    """Return the position in the service's members whose turn it is."""
    must(service.wrr_size > 0)
    if cursor.position >= service.wrr_size:            # round, or the order has become shorter
        cursor.position = 0
    cursor.position += 1
    return service.wrr[cursor.position - 1]


cdef inline uint32_t random_below(SchedulerState *state, uint32_t below) noexcept nogil:
    """Return a random number below `below`: xorshift64* (Vigna, 2016), scaled by multiplication."""
    state.random_state ^= state.random_state >> 12
    state.random_state ^= state.random_state << 25
    state.random_state ^= state.random_state >> 27
    return <uint32_t>((state.random_state * <uint64_t>0x2545F4914F6CDD1DU >> 32) * below >> 32)


cdef inline uint32_t random_position(SchedulerState *state, const Service *service) noexcept nogil:
    return service.wrr[random_below(state, service.wrr_size)]


# --- load -------------------------------------------------------------------------------------------------------------

cdef inline int64_t active_flows(const FlowTable *flows, uint32_t backend) noexcept nogil:
    """Return the backend's active flows with all workers."""
    cdef int64_t active = 0
    cdef uint32_t i
    for i in range(flows.row_count[0]):
        active += flows.rows[i][backend].active_flows
    return active


cdef inline double decayed(double response, uint32_t since, uint32_t now) noexcept nogil:
    """Return what counts of a response time when nothing has been seen of the backend since then.

    One that gets no flows because it was slow once is forgiven in time, else it could never show that it is not.
    """
    cdef int32_t rest = <int32_t>(now - since) - RESPONSE_REST
    return response * exp(-<double>rest / RESPONSE_MEMORY) if unlikely(rest > 0) else response


cdef inline double silence_of(const Response *response, uint32_t now) noexcept nogil:
    """Return what silence and refusals count as, in us; 0 for a backend that has answered all SYNs, or may yet.

    `now` is a batch's, so a SYN's age may be a millisecond less than it seems. A backend that is tried again and does
    not answer has been silent for as long as before and longer.
    """
    cdef int32_t age = <int32_t>(now - response.asked) - 1
    cdef double silence = 0
    if likely(response.silent == 0 and response.refused == 0):
        return 0
    if response.silent and age > 0:
        silence = 1000.0 * min(age, <int32_t>MAX_SILENCE)
    if response.refused:
        silence = max(silence, <double>REFUSAL * (1 << (response.refused - 1)))
    return decayed(silence, response.tried, now)


cdef inline double response_of(const SchedulerState *state, const Candidate *candidate) noexcept nogil:
    """Return the response time in microseconds: as this worker saw it, else as health checks did; or for how long the
    backend has not answered."""
    cdef const Response *response = &state.responses[candidate.backend]
    cdef double seen = candidate.response
    if response.cost != 0:
        seen = decayed(response.cost, response.at, state.now)
    return max(max(seen, silence_of(response, state.now)), <double>MIN_RESPONSE)


cdef inline double load_of(
        const SchedulerState *state, const FlowTable *flows, const Service *service, const Candidate *candidate,
        ) noexcept nogil:
    """Return the load that the backend would have with one more flow."""
    cdef double load = <double>(active_flows(flows, candidate.backend) + 1) / candidate.weight
    if goes_by_response(service):
        return load * response_of(state, candidate)
    return load


cdef inline int64_t bound_of(const Service *service, const Candidate *candidate, int64_t flows) noexcept nogil:
    """Return how many flows the backend may have once there is one more than `flows`: ceil(c * (flows + 1) * weight /
    all weights) (Mirrokni, Thorup, Zadimoghaddam, SODA 2018). In 64 bits: c is below 2^10, flows below 2^31, a weight
    below 2^23."""
    cdef uint64_t share = <uint64_t>service.bounded_load * <uint64_t>(flows + 1) * candidate.weight
    cdef uint64_t whole = BOUND_UNIT * service.weight
    return <int64_t>((share + whole - 1) // whole)


cdef inline void begin_batch(
        const SchedulerState *state, const FlowTable *flows, const Service *service, Cursor *cursor) noexcept nogil:
    """Add up what the candidates have: one look at each of them and at each worker, once a batch."""
    cdef uint32_t i
    if likely(cursor.batch == state.batch and cursor.service == service):
        return
    cursor.batch, cursor.service, cursor.full, cursor.flows = state.batch, service, False, 0
    for i in range(service.candidate_count if service.bounded_load != 0 else 0):
        cursor.flows += active_flows(flows, service.candidates[i].backend)


cdef inline bint has_room(
        const SchedulerState *state, const FlowTable *flows, const Service *service, Cursor *cursor,
        const Candidate *candidate) noexcept nogil:
    cdef int64_t active
    if likely(not service.restrained):
        return True
    begin_batch(state, flows, service, cursor)
    active = active_flows(flows, candidate.backend)
    if active >= candidate.max_flows:
        return False
    return service.bounded_load == 0 or active < bound_of(service, candidate, cursor.flows)


cdef inline const Candidate *least_loaded(
        SchedulerState *state, const FlowTable *flows, const Service *service, Cursor *cursor) noexcept nogil:
    """Return the candidate with the least load among those that have room; of equals, the next in turn. NULL if none
    has room.

    One look at each candidate and worker.
    """
    cdef const Candidate *candidate
    cdef const Candidate *best = NULL
    cdef uint32_t first = cursor.position
    cdef uint32_t i
    cdef double least = 0
    cdef double load
    for i in range(service.candidate_count):
        candidate = &service.candidates[(first + i) % service.candidate_count]
        if unlikely(not has_room(state, flows, service, cursor, candidate)):
            continue
        load = load_of(state, flows, service, candidate)
        if best == NULL or load < least:
            least, best = load, candidate
            cursor.position = (first + i) % service.candidate_count + 1
    return best


cdef inline const Candidate *better_of_two(
        SchedulerState *state, const FlowTable *flows, const Service *service) noexcept nogil:
    """Return the less loaded one of two that differ, drawn by weight (Mitzenmacher, 2001). Bounded: a few draws for the
    second."""
    cdef uint32_t first = service.candidate_of[random_position(state, service)]
    cdef uint32_t second = first
    cdef int _try
    for _try in range(4):
        second = service.candidate_of[random_position(state, service)]
        if second != first:
            break
    if (load_of(state, flows, service, &service.candidates[second])
            < load_of(state, flows, service, &service.candidates[first])):
        first = second
    return &service.candidates[first]


# --- the choice -------------------------------------------------------------------------------------------------------

cdef inline const Candidate *proposed(
        SchedulerState *state, const FlowTable *flows, const Service *service, Cursor *cursor, uint64_t hashed,
        uint32_t attempt) noexcept nogil:
    """Return the scheduler's choice after `attempt` others had no room; not for schedulers that compare all."""
    if goes_by_hash(service):
        return hashed_candidate(service, hashed, attempt)
    if service.scheduler == BY_P2C:
        return better_of_two(state, flows, service)
    return &service.candidates[service.candidate_of[
        next_in_wrr(cursor, service) if goes_in_turn(service) else random_position(state, service)]]


cdef inline void note_moved(const FlowTable *flows, const Service *service) noexcept nogil:
    """Count a new flow that does not go to the scheduler's first choice, which has no room."""
    cdef ServiceEvents *events = events_of(flows, service)
    if events != NULL:
        events.load_moved += 1


cdef inline uint32_t restrained_backend(
        SchedulerState *state, const FlowTable *flows, const Service *service, Cursor *cursor, uint64_t hashed,
        ) noexcept nogil:
    """Return the id of a backend that has room; 0 if none has. Bounded: MAX_ATTEMPTS, then one look at each candidate.

    Once none has had room, none is looked at any more in this batch.
    """
    cdef const Candidate *candidate
    cdef uint32_t attempt
    begin_batch(state, flows, service, cursor)
    if cursor.full:
        return 0
    for attempt in range(0 if compares_all(service) else MAX_ATTEMPTS):
        candidate = proposed(state, flows, service, cursor, hashed, attempt)
        if has_room(state, flows, service, cursor, candidate):
            if attempt != 0:
                note_moved(flows, service)
            return candidate.backend
    candidate = least_loaded(state, flows, service, cursor)
    cursor.full = candidate == NULL
    if cursor.full:
        return 0
    if not compares_all(service):
        note_moved(flows, service)
    return candidate.backend


cdef inline uint32_t scheduled_backend(
        SchedulerState *state, const FlowTable *flows, const Service *service, Cursor *cursor, uint64_t hashed,
        ) noexcept nogil:
    """Return the backend id of a new flow; 0 if there is no candidate, or none with room. `hashed`: the flow's hash."""
    if unlikely(service.candidate_count == 0):
        return 0
    if unlikely(service.restrained):
        return restrained_backend(state, flows, service, cursor, hashed)
    if likely(goes_by_hash(service)):
        return hashed_backend(service, hashed)
    if compares_all(service):
        return least_loaded(state, flows, service, cursor).backend
    return proposed(state, flows, service, cursor, hashed, 0).backend


# --- response times ---------------------------------------------------------------------------------------------------

cdef inline uint16_t start_tick(uint64_t now_us) noexcept nogil:
    return <uint16_t>(now_us // START_TICK & ((1 << START_BITS) - 1))


cdef inline void note_syn(SchedulerState *state, uint32_t backend, uint32_t now) noexcept nogil:
    """Note that a backend gets the SYN of a new flow, whose answer will be seen."""
    cdef Response *response = &state.responses[backend]
    if not response.silent:
        response.silent, response.asked = 1, now
    elif unlikely(<int32_t>(now - response.asked) > MAX_SILENCE):
        response.asked = now - MAX_SILENCE  # so that the age of it never wraps
    response.tried = now


cdef inline void note_refusal(SchedulerState *state, uint32_t backend) noexcept nogil:
    """Note that a backend has answered a SYN with RST. That was quick, and is no reason to send it more."""
    cdef Response *response = &state.responses[backend]
    response.silent = 0
    if response.refused < MAX_REFUSALS:
        response.refused += 1


cdef inline void note_response(
        SchedulerState *state, uint32_t backend, uint16_t began, uint32_t since, uint64_t now_us, uint32_t now,
        ) noexcept nogil:
    """Note that the backend has answered a SYN: peak-EWMA, which takes a slower answer at once and forgets it slowly.

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
    response.silent = response.refused = 0
