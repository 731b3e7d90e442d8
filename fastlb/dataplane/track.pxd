"""Which backend a packet's flow has: by its entry in the flow table, or chosen now.

The client's leg, the reply leg of the NAT modes, and ICMP errors, which change no flow.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from fastlb.dataplane.admission cimport may_go_by_hash, may_make_entry, note_no_tokens, source_may_begin, spend_entry
from fastlb.dataplane.affinity cimport affine_backend, learn_client, sticky_or_scheduled
from fastlb.dataplane.conntrack cimport (
    FLOW_ESTABLISHED, FLOW_PICKED_UP, FLOW_SYN, FLOW_SYN_ACK, FlowEntry, backend_of, be_vport_of, conflicts, enter_flow,
    entry_number, find_by_port, find_flow, find_reply, find_room, first_state, forget, has_expired, is_over, is_stale,
    pool_of, serves, state_of, touch, tuple_of)
from fastlb.dataplane.flowhash cimport fingerprint as flow_fingerprint
from fastlb.dataplane.machine cimport bswap16, likely, unlikely
from fastlb.dataplane.mode cimport translates
from fastlb.dataplane.reasons cimport (
    DROP_BACKENDS_FULL, DROP_BACKEND_LEFT, DROP_FLOW_TABLE_FULL, DROP_FLOW_UNKNOWN, DROP_ICMP_UNKNOWN,
    DROP_NAT_CONFLICT, DROP_NEW_FLOW_RATE, DROP_NO_BACKEND, DROP_NO_SOURCE_PORT, DROP_REPLY_UNKNOWN, DROP_SOURCE_LIMIT,
    VIA_CONNTRACK, VIA_ICMP, VIA_MAGLEV, VIA_OVERLOAD, VIA_SCHEDULER)
from fastlb.dataplane.reserve cimport find_room_by_replacing, only_reserve_left
from fastlb.dataplane.schedule cimport (
    Cursor, goes_by_hash, cursor_of, goes_by_response, has_room, hash_of_flow, hashed_backend, hashed_candidate,
    note_refusal, note_response, note_syn, placement_hash, scheduled_backend, start_tick)
from fastlb.dataplane.sourceport cimport SourcePool, SourcePort, give_back, take_port
from fastlb.dataplane.state cimport PipelineState
from fastlb.dataplane.types cimport (
    FORWARD_FULLNAT, FORWARD_NAT, KEEP_ALL, KEEP_EXCEPT_SYN, KEEP_TO_RESET, LOGGED_BIT, PROTO_TCP, Addr, Backend,
    Candidate, FlowTuple, Packet, Service, Snapshot)
from fastlb.dataplane.wire cimport TCP_ACK, TCP_RST, TCP_SYN


cdef enum:
    # Other Maglev slots that a NAT conflict may look at, and backends that may share a reply's address and port.
    MAX_ALTERNATIVES = 16


# --- the client's leg -------------------------------------------------------------------------------------------------

cdef inline bint is_syn(const Packet *p) noexcept nogil:
    return p.protocol == PROTO_TCP and p.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN


cdef inline bint may_begin(const Packet *p) noexcept nogil:
    """True if this may be the first packet of a flow."""
    return p.protocol != PROTO_TCP or is_syn(p)


cdef inline uint32_t backend_in_midflow(
        PipelineState *pipe, const Service *service, uint64_t hashed, Addr client, uint32_t now) noexcept nogil:
    """Return where a packet goes that has no entry and begins no flow: to where its client sticks, else by the hash; 0
    if the service has no backend.

    Nothing is remembered of it, because anybody can forge one.
    """
    cdef uint32_t backend = 0
    if unlikely(service.affinity != NULL):
        backend = affine_backend(&pipe.affinity, &pipe.flows, service.affinity, client, now)
    return backend if backend != 0 else hashed_backend(service, hashed)


cdef inline uint32_t backend_of_new_flow(
        PipelineState *pipe, const Snapshot *snap, const Service *service, Cursor *cursor, uint64_t hashed,
        const Packet *p, bint proven, uint32_t now) noexcept nogil:
    """Return the backend id of a new flow; 0 if the service has none, or none with room."""
    if unlikely(service.affinity != NULL):
        return sticky_or_scheduled(
            &pipe.affinity, &pipe.schedulers, &pipe.flows, snap.services, service, cursor, hashed, p.src, proven, now)
    return scheduled_backend(&pipe.schedulers, &pipe.flows, service, cursor, hashed)


cdef inline bint may_have(
        PipelineState *pipe, const Snapshot *snap, const Packet *p, uint32_t backend, uint32_t now) noexcept nogil:
    """True if the backend may have this flow. In nat it cannot tell two flows of one client port apart (see
    `conflicts`)."""
    if snap.services.services[p.service].forward != FORWARD_NAT:
        return True
    return not conflicts(&pipe.flows, snap.services, p, &snap.services.backends[backend], now)


cdef inline uint32_t alternative(
        PipelineState *pipe, const Snapshot *snap, const Service *service, Cursor *cursor, uint64_t hashed,
        const Packet *p, bint fresh, uint32_t now) noexcept nogil:
    """Return the next backend by the hash that may have the flow, with room for it if it is new; 0 if none of
    MAX_ALTERNATIVES may."""
    cdef const Candidate *candidate
    cdef int offset
    for offset in range(MAX_ALTERNATIVES if service.candidate_count != 0 else 0):
        candidate = hashed_candidate(service, hashed, offset)
        if fresh and not has_room(&pipe.schedulers, &pipe.flows, service, cursor, candidate):
            continue
        if likely(may_have(pipe, snap, p, candidate.backend, now)):
            return candidate.backend
    return 0


cdef inline int choose_backend(
        PipelineState *pipe, const Snapshot *snap, Packet *p, bint fresh, bint proven, uint32_t now) noexcept nogil:
    """Set the backend of a flow that is new, or without an entry. Returns 0, or why there is none.

    `proven`: nothing more will show that a new flow works (UDP, or no entry), so that affinity counts it at once.
    """
    cdef const Service *service = &snap.services.services[p.service]
    cdef Cursor *cursor = cursor_of(&pipe.schedulers, p.service)
    cdef uint64_t hashed = hash_of_flow(snap.services, service, p)
    if fresh:
        p.backend = backend_of_new_flow(pipe, snap, service, cursor, hashed, p, proven, now)
    else:
        p.backend = backend_in_midflow(pipe, service, hashed, p.src, now)
    if unlikely(p.backend == 0):
        return DROP_NO_BACKEND if service.candidate_count == 0 else DROP_BACKENDS_FULL
    if unlikely(not may_have(pipe, snap, p, p.backend, now)):
        p.backend = alternative(pipe, snap, service, cursor, hashed, p, fresh, now)
        pipe.flows.events[service.slot].conflict_moved += p.backend != 0
    if unlikely(p.backend == 0):
        return DROP_NAT_CONFLICT
    if unlikely(service.restrained):
        cursor.flows += fresh
    return 0


cdef inline FlowEntry *enter_client(
        PipelineState *pipe, const Snapshot *snap, const Packet *p, uint32_t now) noexcept nogil:
    """Make the entry of a packet's flow, which has none; NULL if there is no room."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef FlowEntry *entry
    cdef FlowTuple *flow
    if unlikely(snap.services.mixed) and only_reserve_left(snap.services, &pipe.flows, service, p.shard):
        entry = find_room_by_replacing(&pipe.flows, snap.services, p.shard, p.fingerprint, now)
    else:
        entry = find_room(&pipe.flows, p.shard, p.fingerprint, snap.services, <FlowEntry *>p.entry, now)
    if unlikely(entry == NULL):
        pipe.flows.events[service.slot].untracked += 1
        return NULL
    flow = tuple_of(&pipe.flows, entry)
    flow.client = p.src
    flow.vip = p.dst
    flow.be_cport = p.be_sport
    flow.be_vport = p.be_dport
    flow.protocol = p.protocol
    flow.family = p.family
    flow.began = start_tick(pipe.now_us)
    if unlikely(pipe.flows.log.events != NULL) and translates(service):
        flow.began |= LOGGED_BIT
    flow.source = p.source
    flow.since = now
    enter_flow(&pipe.flows, entry, p.shard, p.fingerprint, p.backend, first_state(p), now)
    spend_entry(&pipe.budget)
    if unlikely(goes_by_response(service)) and translates(service) and is_syn(p):
        note_syn(&pipe.schedulers, p.backend, now)
    return entry


cdef inline bint is_found_again(const Service *service) noexcept nogil:
    """True if packets in mid-flow go where a new flow of their client would: by the same hash, or by the affinity
    table."""
    if service.forward == FORWARD_FULLNAT or service.affinity != NULL:
        return True
    return goes_by_hash(service) and not service.restrained


cdef inline bint needs_entry(
        PipelineState *pipe, const Snapshot *snap, const Service *service, const Packet *p, uint32_t now,
        ) noexcept nogil:
    """True if without an entry nobody would know whose flow it is that the packet's backend answers (see
    `explains`)."""
    cdef uint64_t hashed
    if not translates(service):
        return False
    if service.forward == FORWARD_FULLNAT or service.has_prefix:
        return True
    hashed = hash_of_flow(snap.services, service, p)
    return backend_in_midflow(pipe, service, hashed, p.src, now) != p.backend


cdef inline int pass_without_entry(
        PipelineState *pipe, const Snapshot *snap, Packet *p, bint fresh, int reason, uint32_t now) noexcept nogil:
    """Forward a flow that gets no entry, from its first packet on as the next ones will go, with an entry or not: by
    its client's affinity, or else by the hash.

    `reason`: how it ends where nothing works without an entry.
    """
    cdef const Service *service = &snap.services.services[p.service]
    cdef int fault
    if not fresh and service.forward == FORWARD_FULLNAT:
        return DROP_FLOW_UNKNOWN
    note_no_tokens(&pipe.budget, snap.services, service, now)
    fault = choose_backend(pipe, snap, p, fresh and is_found_again(service), True, now)
    if unlikely(fault):
        return fault
    if needs_entry(pipe, snap, service, p, now):
        p.backend = 0
        return reason
    return VIA_OVERLOAD


cdef inline int start_fullnat_flow(
        PipelineState *pipe, const Snapshot *snap, Packet *p, bint fresh, uint32_t now) noexcept nogil:
    """Start a flow of fullnat: it is nothing without its source port, and a port is nothing without an entry that
    remembers it."""
    cdef SourcePool *pool = pool_of(&pipe.flows, p.family)
    cdef FlowEntry *entry
    cdef SourcePort *port
    if not fresh:
        return DROP_FLOW_UNKNOWN
    p.source = take_port(pool, p.protocol, p.shard)
    if unlikely(p.source == 0):
        return DROP_NO_SOURCE_PORT
    entry = enter_client(pipe, snap, p, now)
    if unlikely(entry == NULL):
        give_back(pool, p.protocol, p.shard, p.source)
        return DROP_FLOW_TABLE_FULL
    port = &pool.ports[p.source - 1]
    port.fingerprint = p.fingerprint
    port.client = p.src
    port.be_cport = p.be_sport
    port.be_vport = p.be_dport
    port.next = <uint32_t>entry_number(&pipe.flows, entry)
    return VIA_SCHEDULER


cdef inline int start_flow(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Schedule a new flow, or pick one up in mid-flow, for a packet without an entry."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef bint fresh = may_begin(p)
    cdef bint scheduled = fresh
    cdef int fault
    if unlikely(service.gates != 0) and fresh and not source_may_begin(
            pipe.limits, &pipe.flows, service, p, pipe.now_us):
        return DROP_SOURCE_LIMIT
    if unlikely(not may_make_entry(&pipe.budget, snap.services, &pipe.flows, service, pipe.now_us)):
        return pass_without_entry(pipe, snap, p, fresh, DROP_NEW_FLOW_RATE, now)
    if unlikely(pipe.budget.ran_out_once):
        scheduled = fresh and (
            is_found_again(service) or not may_go_by_hash(&pipe.budget, snap.services, service, now))
    fault = choose_backend(pipe, snap, p, scheduled, p.protocol != PROTO_TCP, now)
    if unlikely(fault):
        return fault
    if unlikely(service.forward == FORWARD_FULLNAT):
        return start_fullnat_flow(pipe, snap, p, fresh, now)
    if unlikely(p.tcp_flags & TCP_RST):                  # ends what is not even there
        return VIA_MAGLEV
    if unlikely(enter_client(pipe, snap, p, now) == NULL):
        return pass_without_entry(pipe, snap, p, fresh, DROP_FLOW_TABLE_FULL, now)
    return VIA_SCHEDULER if scheduled else VIA_MAGLEV


cdef inline bint still_holds(
        const Snapshot *snap, const FlowEntry *entry, const Packet *p, uint32_t now) noexcept nogil:
    """True if the entry decides: it has not expired, its VIP has not gone to another service, its backend keeps the
    flow, and no SYN starts anew."""
    cdef const Backend *backend = &snap.services.backends[backend_of(entry)]
    if unlikely(has_expired(entry, snap.services, now)):
        return False
    if unlikely(backend.service != p.service):
        return False
    if unlikely(backend.flow_policy != KEEP_ALL) and not keeps(backend, p):
        return False
    return not (is_syn(p) and (is_over(state_of(entry)) or state_of(entry) == FLOW_PICKED_UP))


cdef inline bint has_its_source(
        PipelineState *pipe, const Snapshot *snap, FlowEntry *entry, Packet *p) noexcept nogil:
    """Set the flow's source port in fullnat. Returns False for a flow from before a reload gave the service this mode:
    it has none, and is over."""
    if likely(snap.services.services[p.service].forward != FORWARD_FULLNAT):
        return True
    p.source = tuple_of(&pipe.flows, entry).source
    return p.source != 0


cdef inline bint keeps(const Backend *backend, const Packet *p) noexcept nogil:
    """True if a backend that is down or leaving still gets this packet of one of its flows. With KEEP_TO_RESET only a
    RST goes there, which ends the flow."""
    if backend.flow_policy == KEEP_TO_RESET:
        return p.tcp_flags & TCP_RST != 0
    return backend.flow_policy == KEEP_EXCEPT_SYN and not is_syn(p)


cdef inline bint is_to_reset(
        const Snapshot *snap, const FlowEntry *entry, const Packet *p, uint32_t now) noexcept nogil:
    """True if the client is told that an entry which does not decide has ended. A SYN gets no such answer: it begins a
    new flow."""
    cdef const Backend *backend = &snap.services.backends[backend_of(entry)]
    return (not has_expired(entry, snap.services, now) and backend.flow_policy == KEEP_TO_RESET
            and backend.service == p.service and not is_syn(p))


cdef inline FlowEntry *find_prefetched(PipelineState *pipe, const Packet *p) noexcept nogil:
    """Return the flow's entry, or NULL; no second search where `prefetch_rest` has seen it, or an empty entry for it.

    Whoever had entered the flow since would have taken that empty entry, which was the first one, unless one before it
    has become empty.
    """
    cdef FlowEntry *entry = <FlowEntry *>p.entry
    if entry != NULL:
        if entry.fingerprint == p.fingerprint:
            return entry
        if likely(entry.fingerprint == 0 and not pipe.flows.emptied):
            return NULL
    return find_flow(&pipe.flows, p.shard, p.fingerprint)


cdef inline void step_of_client(
        PipelineState *pipe, const Snapshot *snap, FlowEntry *entry, const Packet *p, uint32_t now) noexcept nogil:
    """Step a flow's state by a packet of the client's; a connection that it establishes has the client remembered."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef uint32_t before = state_of(entry)
    touch(&pipe.flows, entry, p, translates(service), now)
    if unlikely(before == FLOW_SYN or before == FLOW_SYN_ACK) and service.affinity != NULL:
        if state_of(entry) == FLOW_ESTABLISHED:
            learn_client(&pipe.affinity, &pipe.flows, snap.services, service, p.backend, p.src, now)


cdef inline int track_client(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Set the packet's backend. The reason tells how it was found, or why there is none."""
    cdef FlowEntry *entry = find_prefetched(pipe, p)
    if likely(entry != NULL):
        if likely(still_holds(snap, entry, p, now) and has_its_source(pipe, snap, entry, p)):
            p.backend = backend_of(entry)
            step_of_client(pipe, snap, entry, p, now)
            return VIA_CONNTRACK
        if unlikely(is_to_reset(snap, entry, p, now)):
            return DROP_BACKEND_LEFT
        forget(&pipe.flows, p.shard, entry)
    return start_flow(pipe, snap, p, now)


# --- the reply leg ----------------------------------------------------------------------------------------------------

cdef inline bint explains(
        PipelineState *pipe, const Snapshot *snap, uint32_t backend, const Packet *p, uint16_t be_vport, uint32_t now,
        ) noexcept nogil:
    """True if this backend's service would have sent the client's side of the flow to it.

    With a prefix as VIP there is no telling: the hash takes the whole address.
    """
    cdef const Service *service = &snap.services.services[snap.services.backends[backend].service]
    cdef uint64_t hashed
    if service.has_prefix or not service.first_port <= bswap16(be_vport) <= service.last_port:
        return False
    hashed = placement_hash(snap.services, service, p.dst, p.be_dport, service.vip, be_vport)
    return backend_in_midflow(pipe, service, hashed, p.dst, now) == backend


cdef inline bint lives_elsewhere(
        PipelineState *pipe, const Snapshot *snap, const Packet *p, uint64_t fingerprint, uint32_t now) noexcept nogil:
    """True if the flow has an entry with another backend of the same service. One that no longer decides is
    forgotten."""
    cdef FlowEntry *entry = find_flow(&pipe.flows, p.shard, fingerprint)
    if likely(entry == NULL):
        return False
    if (not is_stale(entry, snap.services, now)
            and snap.services.backends[backend_of(entry)].service == snap.services.backends[p.backend].service):
        return True
    forget(&pipe.flows, p.shard, entry)
    return False


cdef inline void set_flow_of_reply(
        FlowTuple *flow, PipelineState *pipe, const Snapshot *snap, const Packet *p, uint32_t backend, FlowEntry *entry,
        ) noexcept nogil:
    """Set the flow, as nat has it, that a packet from `backend` answers, or that an error about a packet to it is
    about.

    `entry`: the flow's; NULL if it has none.
    """
    cdef const Service *service = &snap.services.services[snap.services.backends[backend].service]
    flow.client = p.dst
    flow.be_cport = p.be_dport
    flow.vip = service.vip
    if unlikely(service.has_prefix and entry != NULL):
        flow.vip = tuple_of(&pipe.flows, entry).vip
    flow.be_vport = be_vport_of(service, p)
    flow.protocol = p.protocol
    flow.family = p.family
    flow.began = LOGGED_BIT if pipe.flows.log.events != NULL else 0
    flow.source = 0


cdef inline int enter_picked_up(
        PipelineState *pipe, const Snapshot *snap, const Packet *p, uint64_t fingerprint, FlowTuple *flow, uint32_t now,
        ) noexcept nogil:
    """Make an entry for the flow of a reply that the hash has explained, if it may have one. Returns the packet's
    reason."""
    cdef const Service *service = &snap.services.services[snap.services.backends[p.backend].service]
    cdef FlowEntry *entry
    if p.protocol != PROTO_TCP or p.tcp_flags & TCP_RST:
        return VIA_MAGLEV
    if not may_make_entry(&pipe.budget, snap.services, &pipe.flows, service, pipe.now_us):
        return VIA_OVERLOAD
    flow.since = now
    entry = find_room(&pipe.flows, p.shard, fingerprint, snap.services, NULL, now)
    if likely(entry != NULL):
        tuple_of(&pipe.flows, entry)[0] = flow[0]
        enter_flow(&pipe.flows, entry, p.shard, fingerprint, p.backend, FLOW_PICKED_UP, now)
        spend_entry(&pipe.budget)
    else:
        pipe.flows.events[service.slot].untracked += 1
    return VIA_MAGLEV


cdef inline bint find_explanation(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """Find out which of the backends at one address and port would have had the flow, by hash. If True, the packet has
    that backend, and `flow` is what the client sees; else it has none.

    Bounded: at most MAX_ALTERNATIVES services share a backend's address and port.
    """
    cdef int _looked
    for _looked in range(MAX_ALTERNATIVES):
        if p.backend == 0:
            return False
        set_flow_of_reply(flow, pipe, snap, p, p.backend, NULL)
        if explains(pipe, snap, p.backend, p, flow.be_vport, now):
            return True
        p.backend = snap.services.backends[p.backend].next_reply
    p.backend = 0
    return False


cdef inline int pick_up_reply(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """Pick up the flow of a reply without an entry: after a restart, the Maglev table tells through which VIP the
    client came."""
    cdef uint64_t fingerprint
    if find_explanation(pipe, snap, p, flow, now):
        fingerprint = flow_fingerprint(pipe.flows.key, p.fingerprint, flow.vip, flow.be_vport, True)
        if not lives_elsewhere(pipe, snap, p, fingerprint, now):
            return enter_picked_up(pipe, snap, p, fingerprint, flow, now)
    p.backend = 0
    return DROP_REPLY_UNKNOWN


cdef inline FlowEntry *entry_of_port(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """Return the entry of the flow that has the source port to which a packet was sent; NULL unless its backend sent
    it."""
    cdef SourcePort *port = &pool_of(&pipe.flows, p.family).ports[p.source - 1]
    cdef FlowEntry *entry = find_by_port(&pipe.flows, p.shard, port)
    cdef const Backend *backend
    if entry == NULL or has_expired(entry, snap.services, now):
        return NULL
    backend = &snap.services.backends[backend_of(entry)]
    if not serves(backend, p) or (backend.be_port == 0 and port.be_vport != p.be_sport):
        return NULL
    flow.client = port.client
    flow.be_cport = port.be_cport
    flow.vip = snap.services.services[backend.service].vip
    if unlikely(snap.services.services[backend.service].has_prefix):
        flow.vip = tuple_of(&pipe.flows, entry).vip
    flow.be_vport = port.be_vport
    p.backend = backend_of(entry)
    return entry


cdef inline void note_answer(PipelineState *pipe, FlowEntry *entry, const Packet *p, uint32_t now) noexcept nogil:
    """Note how long the backend took for a SYN-ACK, or that it refused. The tuple is looked at once in a flow."""
    cdef const FlowTuple *flow
    if likely(state_of(entry) != FLOW_SYN) or p.protocol != PROTO_TCP:
        return
    if p.tcp_flags & TCP_RST:
        note_refusal(&pipe.schedulers, backend_of(entry))
    if not p.tcp_flags & TCP_SYN:
        return
    flow = tuple_of(&pipe.flows, entry)
    note_response(
        &pipe.schedulers, backend_of(entry), flow.began & (LOGGED_BIT - 1), flow.since, pipe.now_us, now)


cdef inline int track_fullnat_reply(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    cdef FlowEntry *entry = entry_of_port(pipe, snap, p, flow, now)
    if unlikely(entry == NULL):
        return DROP_REPLY_UNKNOWN
    note_answer(pipe, entry, p, now)
    touch(&pipe.flows, entry, p, True, now)
    return VIA_CONNTRACK


cdef inline int track_reply(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """Set the packet's backend, and in `flow` whom the packet goes to and whom it shall come from."""
    cdef FlowEntry *entry
    if p.source != 0:
        return track_fullnat_reply(pipe, snap, p, flow, now)
    entry = find_reply(&pipe.flows, snap.services, p)
    if unlikely(entry != NULL and has_expired(entry, snap.services, now)):
        forget(&pipe.flows, p.shard, entry)
        entry = NULL
    if likely(entry != NULL):
        note_answer(pipe, entry, p, now)
        touch(&pipe.flows, entry, p, True, now)
        p.backend = backend_of(entry)
        set_flow_of_reply(flow, pipe, snap, p, p.backend, entry)
        return VIA_CONNTRACK
    return pick_up_reply(pipe, snap, p, flow, now)


# --- ICMP errors, which change no flow --------------------------------------------------------------------------------

cdef inline int backend_of_error(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Set where an error to a VIP goes: to the flow's backend, or where the Maglev table would have sent the flow."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef FlowEntry *entry = find_flow(&pipe.flows, p.shard, p.fingerprint)
    if entry != NULL and not is_stale(entry, snap.services, now):
        if snap.services.backends[backend_of(entry)].service == p.service and has_its_source(pipe, snap, entry, p):
            p.backend = backend_of(entry)
            return VIA_ICMP
    if service.forward == FORWARD_FULLNAT:
        return DROP_ICMP_UNKNOWN
    p.backend = backend_in_midflow(pipe, service, hash_of_flow(snap.services, service, p), p.src, now)
    return VIA_ICMP if p.backend != 0 else DROP_ICMP_UNKNOWN


cdef inline int flow_of_error(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """Find the flow in which the client had sent the packet to a backend that an error is about."""
    cdef FlowEntry *entry
    if p.source != 0:
        return VIA_ICMP if entry_of_port(pipe, snap, p, flow, now) != NULL else DROP_ICMP_UNKNOWN
    entry = find_reply(&pipe.flows, snap.services, p)
    if entry != NULL and not has_expired(entry, snap.services, now):
        p.backend = backend_of(entry)
        set_flow_of_reply(flow, pipe, snap, p, p.backend, entry)
        return VIA_ICMP
    return VIA_ICMP if find_explanation(pipe, snap, p, flow, now) else DROP_ICMP_UNKNOWN
