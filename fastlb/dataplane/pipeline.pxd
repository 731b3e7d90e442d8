"""A batch of packets from frame to verdict: parse, classify, track, schedule, forward.

Two passes over at most BATCH packets. The first parses each frame and prefetches the bucket of its flow; the second
finds the buckets in cache. Full NAT and new flows need more than the bucket; for batches that hold such packets there
is a pass between, which fetches it. Every packet leaves with exactly one reason; the caller alone transmits frames and
gives their memory back.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.admission cimport (
    FlowBudget, exceed, is_denied, may_go_by_hash, may_remember, remembered, source_may_begin)
from fastlb.dataplane.affinity cimport AffinityTable, affine_backend, clear_ended, stuck_backend
from fastlb.dataplane.conntrack cimport (
    FLOW_PICKED_UP, FLOW_SYN, FlowEntry, FlowTable, approach_room, backend_of, be_vport_of, conflicts, enter_flow,
    find_flow, find_reply, find_room, first_state, forget, has_expired, is_over, is_stale, owns, pool_of, prefetch_flow,
    serves, state_of, sweep, touch, tuple_of)
from fastlb.dataplane.encap cimport complete_checksum, encapsulate, is_tunnel, outer_length, split_outer
from fastlb.dataplane.flowhash cimport fingerprint as flow_fingerprint
from fastlb.dataplane.flowhash cimport flow_hash
from fastlb.dataplane.fragment cimport (
    FragmentNote, FragmentState, HeldFragment, account, admit_first, datagram_key, find_note, finish, held_at, hold,
    note_first, readdress, waited)
from fastlb.dataplane.icmp cimport (
    RejectLimit, answer_time_exceeded, answer_too_big, answerable, may_reject, reject, send_back)
from fastlb.dataplane.icmperror cimport (
    answer_echo, translate_client_in_error, translate_source_in_error, translate_to_backend, translate_to_client)
from fastlb.dataplane.lookup cimport MISSING
from fastlb.dataplane.machine cimport bswap16, likely, load_acquire_u32, must, prefetch, store_release_u32, unlikely
from fastlb.dataplane.parse cimport parse
from fastlb.dataplane.pieces cimport (
    GSO_ECN, GSO_TCP4, GSO_TCP6, GSO_UDP, MAX_GROWTH, MAX_HEADERS, MIN_MTU6, MIN_SEGMENT, cut_segment, cut_to,
    is_promised, may_be_fragmented)
from fastlb.dataplane.reasons cimport (
    DROP_BACKENDS_FULL, DROP_BACKEND_LEFT, DROP_DENIED, DROP_FLOW_TABLE_FULL, DROP_FLOW_UNKNOWN, DROP_FRAGMENT_LIMIT,
    DROP_FRAGMENT_OVERLAP, DROP_FRAGMENT_UNKNOWN, DROP_ICMP_UNKNOWN, DROP_NAT_CONFLICT, DROP_NEW_FLOW_RATE,
    DROP_NO_BACKEND, DROP_NO_NEIGHBOUR, DROP_NO_SOURCE_PORT, DROP_NO_TUNNEL_SOURCE, DROP_OVER_MTU, DROP_REJECT_LIMIT,
    DROP_REPLY_UNKNOWN, DROP_SOURCE_LIMIT, DROP_TTL_EXPIRED, DROP_TUNNEL_OFFLOAD, DROP_WRONG_WORKER, PASS_NO_SERVICE,
    REASONS, VIA_CONNTRACK, VIA_ECHO, VIA_FRAGMENT, VIA_HELD, VIA_ICMP, VIA_MAGLEV, VIA_OVERLOAD, VIA_REJECT, VIA_RESET,
    VIA_SCHEDULER, VIA_TIME_EXCEEDED, VIA_TOO_BIG)
from fastlb.dataplane.rewrite cimport (
    clamp_mss, decrement_ttl, fits, set_link_header, translate_both, translate_destination, translate_source)
from fastlb.dataplane.route cimport find_route, hop_to_address, hop_to_backend
from fastlb.dataplane.schedule cimport (
    BY_SOURCE, Place, SchedulerState, has_room, hash_of_flow, hashed_backend, hashed_candidate, note_response, place_of,
    placement_hash, prefetch_placement, scheduled_backend, start_tick)
from fastlb.dataplane.service cimport classify
from fastlb.dataplane.sourceport cimport SourcePool, SourcePort, address_of, be_port_of, give_back, take_port
from fastlb.dataplane.types cimport (
    BATCH, CLAMP_TO_PATH, FAMILY_4, FORWARD_FULLNAT, FORWARD_NAT, FRAGMENT_LATER, FRAGMENT_NONE, GATE_LISTS, KEEP_ALL,
    KEEP_BUT_SYN, KEEP_TO_RESET, LEG_CLIENT, LEG_ECHO, LEG_NONE, LEG_REPLY, LOGGED_BIT, NO_BACKEND_RESET, NO_HOP,
    PROTO_TCP, Addr, Backend, BackendStats, Candidate, FlowTuple, Hop, LinkRoute, Packet, Service, Snapshot)
from fastlb.dataplane.wire cimport IP4_LEN, IP6_LEN, TCP_ACK, TCP_LEN, TCP_RST, TCP_SYN, same_addr


cdef enum:
    # Other Maglev slots that a NAT conflict may look at, and backends that may share a reply's address and port.
    MAX_ALTERNATIVES = 16
    MAX_UNRESOLVED = 64      # clients on a link, without a MAC, that wait to be asked for
    MAX_SERVICES = 1 << 16   # slots of counters


cdef struct Unresolved:
    Addr addr
    uint32_t ifindex
    uint8_t family


cdef struct ReasonCounts:
    # Of one service; the two reasons of most packets, conntrack and scheduled, are not counted.
    uint64_t by_reason[REASONS]


cdef struct PipelineState:
    # What one worker writes: its flow table, its fragments and its counters.
    FlowTable flows
    RejectLimit rejects
    FragmentState fragments
    uint64_t reasons[REASONS]
    uint64_t packets
    uint64_t bytes
    uint64_t forwarded
    uint64_t forwarded_bytes
    SchedulerState schedulers
    AffinityTable affinity
    uint64_t now_us          # of this batch, for response times
    uint16_t outer_number    # of the next outer IPv4 header
    Unresolved unresolved[MAX_UNRESOLVED]
    uint32_t unresolved_count      # set back to 0 by Python, which asks the kernel to resolve them
    FlowBudget budget
    uint64_t *limits         # of sources (admission.pxd); everybody's
    ReasonCounts *by_service  # by slot


# --- track and schedule: the client's leg ----------------------------------------------------------------------------

cdef inline bint is_syn(const Packet *p) noexcept nogil:
    return p.protocol == PROTO_TCP and p.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN


cdef inline bint may_begin(const Packet *p) noexcept nogil:
    """May this be the first packet of a flow?"""
    return p.protocol != PROTO_TCP or is_syn(p)


cdef inline uint32_t backend_in_midflow(
        PipelineState *pipe, const Service *service, uint64_t hashed, Addr client, uint32_t now) noexcept nogil:
    """Where a packet without an entry goes that begins no flow: to where its client sticks, else by the hash.

    Nothing is remembered of it: anybody can forge one. 0 when the service has no backend.
    """
    cdef uint32_t backend = 0
    if unlikely(service.affinity != NULL):
        backend = affine_backend(&pipe.affinity, &pipe.flows, service.affinity, client, now)
    return backend if backend != 0 else hashed_backend(service, hashed)


cdef inline uint32_t backend_of_new_flow(
        PipelineState *pipe, const Snapshot *snap, const Service *service, Place *place, uint64_t hashed,
        const Packet *p, uint32_t now) noexcept nogil:
    """0 when the service has none, or none with room."""
    if unlikely(service.affinity != NULL):
        return stuck_backend(
            &pipe.affinity, &pipe.schedulers, &pipe.flows, snap.services, service, place, hashed, p.src, now)
    return scheduled_backend(&pipe.schedulers, &pipe.flows, service, place, hashed)


cdef inline bint may_have(
        PipelineState *pipe, const Snapshot *snap, const Packet *p, uint32_t backend, uint32_t now) noexcept nogil:
    """In NAT a backend cannot tell two flows of one client port apart (see `conflicts`)."""
    if snap.services.services[p.service].forward != FORWARD_NAT:
        return True
    return not conflicts(&pipe.flows, snap.services, p, &snap.services.backends[backend], now)


cdef inline uint32_t alternative(
        PipelineState *pipe, const Snapshot *snap, const Service *service, Place *place, uint64_t hashed,
        const Packet *p, bint fresh, uint32_t now) noexcept nogil:
    """The next by the hash that may have the flow, with room for it if it is new; 0: none of MAX_ALTERNATIVES."""
    cdef const Candidate *candidate
    cdef int offset
    for offset in range(MAX_ALTERNATIVES if service.candidate_count != 0 else 0):
        candidate = hashed_candidate(service, hashed, offset)
        if fresh and not has_room(&pipe.schedulers, &pipe.flows, service, place, candidate):
            continue
        if likely(may_have(pipe, snap, p, candidate.backend, now)):
            return candidate.backend
    return 0


cdef inline int choose_backend(
        PipelineState *pipe, const Snapshot *snap, Packet *p, bint fresh, uint32_t now) noexcept nogil:
    """Set the backend of a flow that is new, or without an entry; 0, or why there is none."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef Place *place = place_of(&pipe.schedulers, p.service)
    cdef uint64_t hashed = hash_of_flow(snap.services, service, p)
    if fresh:
        p.backend = backend_of_new_flow(pipe, snap, service, place, hashed, p, now)
    else:
        p.backend = backend_in_midflow(pipe, service, hashed, p.src, now)
    if unlikely(p.backend == 0):
        return DROP_NO_BACKEND if service.candidate_count == 0 else DROP_BACKENDS_FULL
    if unlikely(not may_have(pipe, snap, p, p.backend, now)):
        p.backend = alternative(pipe, snap, service, place, hashed, p, fresh, now)
    if unlikely(p.backend == 0):
        return DROP_NAT_CONFLICT
    if unlikely(service.restrained):
        place.flows += fresh
    return 0


cdef inline bint translates(const Service *service) noexcept nogil:
    """The NAT modes: both legs of a flow pass."""
    return service.forward <= FORWARD_FULLNAT


cdef inline FlowEntry *enter_client(
        PipelineState *pipe, const Snapshot *snap, const Packet *p, uint32_t now) noexcept nogil:
    """Make the entry of a packet's flow, which has none; NULL when there is no room."""
    cdef FlowEntry *entry = find_room(
        &pipe.flows, p.shard, p.fingerprint, snap.services, <FlowEntry *>p.entry, now)
    cdef FlowTuple *flow
    if unlikely(entry == NULL):
        return NULL
    flow = tuple_of(&pipe.flows, entry)
    flow.client = p.src
    flow.vip = p.dst
    flow.be_cport = p.be_sport
    flow.be_vport = p.be_dport
    flow.protocol = p.protocol
    flow.family = p.family
    flow.began = start_tick(pipe.now_us)
    if unlikely(pipe.flows.log.events != NULL) and translates(&snap.services.services[p.service]):
        flow.began |= LOGGED_BIT
    flow.source = p.source
    flow.since = now
    enter_flow(&pipe.flows, entry, p.shard, p.fingerprint, p.backend, first_state(p), now)
    remembered(&pipe.budget)
    return entry


cdef inline bint is_found_again(const Service *service) noexcept nogil:
    """Do packets in mid-flow go where a new flow of their client would: by the same hash, by the affinity table?"""
    if service.forward == FORWARD_FULLNAT or service.affinity != NULL:
        return True
    return service.scheduler <= BY_SOURCE and not service.restrained


cdef inline bint needs_entry(
        PipelineState *pipe, const Snapshot *snap, const Service *service, const Packet *p, uint32_t now,
        ) noexcept nogil:
    """Would nobody know whose flow it is that the packet's backend answers? (See `explains`.)"""
    cdef uint64_t hashed
    if not translates(service):
        return False
    if service.forward == FORWARD_FULLNAT or service.has_prefix:
        return True
    hashed = hash_of_flow(snap.services, service, p)
    return backend_in_midflow(pipe, service, hashed, p.src, now) != p.backend


cdef inline int pass_unremembered(
        PipelineState *pipe, const Snapshot *snap, Packet *p, bint fresh, int reason, uint32_t now) noexcept nogil:
    """A flow that gets no entry goes from its first packet on as the next ones will, with an entry or not: by its
    client's affinity, or else by the hash.

    `reason`: how it ends where nothing works without an entry.
    """
    cdef const Service *service = &snap.services.services[p.service]
    cdef int fault
    if not fresh and service.forward == FORWARD_FULLNAT:
        return DROP_FLOW_UNKNOWN
    exceed(&pipe.budget, now)
    fault = choose_backend(pipe, snap, p, fresh and is_found_again(service), now)
    if unlikely(fault):
        return fault
    if needs_entry(pipe, snap, service, p, now):
        p.backend = 0
        return reason
    return VIA_OVERLOAD


cdef inline int start_full_flow(
        PipelineState *pipe, const Snapshot *snap, Packet *p, bint fresh, uint32_t now) noexcept nogil:
    """In fullnat a flow is nothing without its source port, and a port nothing without an entry that remembers it."""
    cdef SourcePool *pool = pool_of(&pipe.flows, p.family)
    cdef SourcePort *port
    if not fresh:
        return DROP_FLOW_UNKNOWN
    p.source = take_port(pool, p.protocol, p.shard)
    if unlikely(p.source == 0):
        return DROP_NO_SOURCE_PORT
    if unlikely(enter_client(pipe, snap, p, now) == NULL):
        give_back(pool, p.protocol, p.shard, p.source)
        return DROP_FLOW_TABLE_FULL
    port = &pool.ports[p.source - 1]
    port.fingerprint = p.fingerprint
    port.client = p.src
    port.be_cport = p.be_sport
    port.be_vport = p.be_dport
    return VIA_SCHEDULER


cdef inline int start_flow(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """A packet without an entry: schedule a new flow, or pick one up in mid-flow."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef bint fresh = may_begin(p)
    cdef bint scheduled = fresh
    cdef int fault
    if unlikely(service.gates != 0) and fresh and not source_may_begin(
            pipe.limits, &pipe.flows, service, p, pipe.now_us):
        return DROP_SOURCE_LIMIT
    if unlikely(not may_remember(&pipe.budget, snap.services, &pipe.flows, pipe.now_us)):
        return pass_unremembered(pipe, snap, p, fresh, DROP_NEW_FLOW_RATE, now)
    if unlikely(pipe.budget.exceeded_once):
        scheduled = fresh and (
            is_found_again(service) or not may_go_by_hash(&pipe.budget, snap.services, service, now))
    fault = choose_backend(pipe, snap, p, scheduled, now)
    if unlikely(fault):
        return fault
    if unlikely(service.forward == FORWARD_FULLNAT):
        return start_full_flow(pipe, snap, p, fresh, now)
    if unlikely(p.tcp_flags & TCP_RST):                  # ends what is not even there
        return VIA_MAGLEV
    if unlikely(enter_client(pipe, snap, p, now) == NULL):
        return pass_unremembered(pipe, snap, p, fresh, DROP_FLOW_TABLE_FULL, now)
    return VIA_SCHEDULER if scheduled else VIA_MAGLEV


cdef inline bint still_holds(
        const Snapshot *snap, const FlowEntry *entry, const Packet *p, uint32_t now) noexcept nogil:
    """An entry decides unless it has expired, its VIP went to another service, its backend does not keep the flow, or
    a SYN starts anew."""
    cdef const Backend *backend = &snap.services.backends[backend_of(entry)]
    if unlikely(has_expired(entry, snap.services, now)):
        return False
    if unlikely(backend.service != p.service):
        return False
    if unlikely(backend.keeping != KEEP_ALL) and not keeps(backend, p):
        return False
    return not (is_syn(p) and (is_over(state_of(entry)) or state_of(entry) == FLOW_PICKED_UP))


cdef inline bint keeps(const Backend *backend, const Packet *p) noexcept nogil:
    """Does a backend that is down, or goes, get this packet of a flow of its? A RST that ends the flow it does."""
    if backend.keeping == KEEP_TO_RESET:
        return p.tcp_flags & TCP_RST != 0
    return backend.keeping == KEEP_BUT_SYN and not is_syn(p)


cdef inline bint is_to_reset(
        const Snapshot *snap, const FlowEntry *entry, const Packet *p, uint32_t now) noexcept nogil:
    """Of an entry that does not decide: is the client told so? Not by a SYN's answer, which is a new flow's."""
    cdef const Backend *backend = &snap.services.backends[backend_of(entry)]
    return (not has_expired(entry, snap.services, now) and backend.keeping == KEEP_TO_RESET
            and backend.service == p.service and not is_syn(p))


cdef inline FlowEntry *find_again(PipelineState *pipe, const Packet *p) noexcept nogil:
    """The flow's entry, or NULL; without another look where `approach` has seen it, or a place for it that is empty.

    Whoever had entered the flow since would have taken that place, the first that was empty, unless one before it has
    become empty.
    """
    cdef FlowEntry *entry = <FlowEntry *>p.entry
    if entry != NULL:
        if entry.fingerprint == p.fingerprint:
            return entry
        if likely(entry.fingerprint == 0 and not pipe.flows.emptied):
            return NULL
    return find_flow(&pipe.flows, p.shard, p.fingerprint)


cdef inline int track_client(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Set the packet's backend; the reason tells how it was found, or why there is none."""
    cdef FlowEntry *entry = find_again(pipe, p)
    if likely(entry != NULL):
        if likely(still_holds(snap, entry, p, now)):
            p.backend = backend_of(entry)
            touch(&pipe.flows, entry, p, translates(&snap.services.services[p.service]), now)
            if snap.services.services[p.service].forward == FORWARD_FULLNAT:
                p.source = tuple_of(&pipe.flows, entry).source
            return VIA_CONNTRACK
        if unlikely(is_to_reset(snap, entry, p, now)):
            return DROP_BACKEND_LEFT
        forget(&pipe.flows, p.shard, entry)
    return start_flow(pipe, snap, p, now)


# --- track: the reply leg --------------------------------------------------------------------------------------------

cdef inline bint explains(
        PipelineState *pipe, const Snapshot *snap, uint32_t backend, const Packet *p, uint16_t be_vport, uint32_t now,
        ) noexcept nogil:
    """Would this backend's service have sent the client's side of the flow to it?

    With a prefix there is no telling: the hash takes the whole VIP.
    """
    cdef const Service *service = &snap.services.services[snap.services.backends[backend].service]
    cdef uint64_t hashed
    if service.has_prefix or not service.first_port <= bswap16(be_vport) <= service.last_port:
        return False
    hashed = placement_hash(snap.services, service, p.dst, p.be_dport, service.vip, be_vport)
    return backend_in_midflow(pipe, service, hashed, p.dst, now) == backend


cdef inline bint lives_elsewhere(
        PipelineState *pipe, const Snapshot *snap, const Packet *p, uint64_t fingerprint, uint32_t now) noexcept nogil:
    """Has the flow an entry with another backend of the same service? One that no longer decides makes way."""
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
    """The flow, as nat has it, of what `backend` answers, or of an error about what was sent to it.

    `entry`: the flow's; NULL when it has none.
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
    """Make an entry for the flow of a reply that the hash has explained, if it may have one. The packet's reason."""
    cdef FlowEntry *entry
    if p.protocol != PROTO_TCP or p.tcp_flags & TCP_RST:
        return VIA_MAGLEV
    if not may_remember(&pipe.budget, snap.services, &pipe.flows, pipe.now_us):
        return VIA_OVERLOAD
    flow.since = now
    entry = find_room(&pipe.flows, p.shard, fingerprint, snap.services, NULL, now)
    if likely(entry != NULL):
        tuple_of(&pipe.flows, entry)[0] = flow[0]
        enter_flow(&pipe.flows, entry, p.shard, fingerprint, p.backend, FLOW_PICKED_UP, now)
        remembered(&pipe.budget)
    return VIA_MAGLEV


cdef inline int pick_up_reply(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """A reply without an entry: after a restart, the Maglev table tells through which VIP the client came.

    Bounded: at most MAX_ALTERNATIVES services share a backend's address and port.
    """
    cdef uint32_t backend = p.backend
    cdef uint64_t fingerprint
    cdef int _looked
    for _looked in range(MAX_ALTERNATIVES):
        if backend == 0:
            break
        set_flow_of_reply(flow, pipe, snap, p, backend, NULL)
        if explains(pipe, snap, backend, p, flow.be_vport, now):
            p.backend = backend
            fingerprint = flow_fingerprint(pipe.flows.key, p.fingerprint, flow.vip, flow.be_vport, True)
            if lives_elsewhere(pipe, snap, p, fingerprint, now):
                break
            return enter_picked_up(pipe, snap, p, fingerprint, flow, now)
        backend = snap.services.backends[backend].next_reply
    p.backend = 0
    return DROP_REPLY_UNKNOWN


cdef inline FlowEntry *entry_of_port(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """The entry of the flow that has the source port that a packet was sent to; NULL, unless its backend sent it."""
    cdef const SourcePort *port = &pool_of(&pipe.flows, p.family).ports[p.source - 1]
    cdef FlowEntry *entry = find_flow(&pipe.flows, p.shard, port.fingerprint) if port.fingerprint != 0 else NULL
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


cdef inline void hear_answer(PipelineState *pipe, FlowEntry *entry, const Packet *p, uint32_t now) noexcept nogil:
    """A SYN-ACK tells how long the backend took; its tuple is looked at once in a flow."""
    cdef const FlowTuple *flow
    if likely(state_of(entry) != FLOW_SYN) or p.protocol != PROTO_TCP or not p.tcp_flags & TCP_SYN:
        return
    flow = tuple_of(&pipe.flows, entry)
    note_response(
        &pipe.schedulers, backend_of(entry), flow.began & (LOGGED_BIT - 1), flow.since, pipe.now_us, now)


cdef inline int track_full_reply(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    cdef FlowEntry *entry = entry_of_port(pipe, snap, p, flow, now)
    if unlikely(entry == NULL):
        return DROP_REPLY_UNKNOWN
    hear_answer(pipe, entry, p, now)
    touch(&pipe.flows, entry, p, True, now)
    return VIA_CONNTRACK


cdef inline int track_reply(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """Set the packet's backend, and what of `flow` tells whom it goes to and whom it shall come from."""
    cdef FlowEntry *entry
    if p.source != 0:
        return track_full_reply(pipe, snap, p, flow, now)
    entry = find_reply(&pipe.flows, snap.services, p)
    if unlikely(entry != NULL and has_expired(entry, snap.services, now)):
        forget(&pipe.flows, p.shard, entry)
        entry = NULL
    if likely(entry != NULL):
        hear_answer(pipe, entry, p, now)
        touch(&pipe.flows, entry, p, True, now)
        p.backend = backend_of(entry)
        set_flow_of_reply(flow, pipe, snap, p, p.backend, entry)
        return VIA_CONNTRACK
    return pick_up_reply(pipe, snap, p, flow, now)


# --- track: ICMP errors, which change no flow -------------------------------------------------------------------------

cdef inline int backend_of_error(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """An error to a VIP: to the flow's backend, or where the Maglev table would have sent the flow."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef FlowEntry *entry = find_flow(&pipe.flows, p.shard, p.fingerprint)
    if entry != NULL and not is_stale(entry, snap.services, now):
        if snap.services.backends[backend_of(entry)].service == p.service:
            p.backend = backend_of(entry)
            p.source = tuple_of(&pipe.flows, entry).source
            return VIA_ICMP
    if service.forward == FORWARD_FULLNAT:
        return DROP_ICMP_UNKNOWN
    p.backend = backend_in_midflow(pipe, service, hash_of_flow(snap.services, service, p), p.src, now)
    return VIA_ICMP if p.backend != 0 else DROP_ICMP_UNKNOWN


cdef inline int flow_of_error(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """An error about a packet to a backend: the flow in which the client had sent it. Bounded: MAX_ALTERNATIVES."""
    cdef FlowEntry *entry
    cdef uint32_t backend = p.backend
    cdef int _looked
    if p.source != 0:
        return VIA_ICMP if entry_of_port(pipe, snap, p, flow, now) != NULL else DROP_ICMP_UNKNOWN
    entry = find_reply(&pipe.flows, snap.services, p)
    if entry != NULL and not has_expired(entry, snap.services, now):
        p.backend = backend_of(entry)
        set_flow_of_reply(flow, pipe, snap, p, p.backend, entry)
        return VIA_ICMP
    for _looked in range(MAX_ALTERNATIVES):
        if backend == 0:
            break
        set_flow_of_reply(flow, pipe, snap, p, backend, NULL)
        if explains(pipe, snap, backend, p, flow.be_vport, now):
            p.backend = backend
            return VIA_ICMP
        backend = snap.services.backends[backend].next_reply
    p.backend = 0
    return DROP_ICMP_UNKNOWN


# --- forward ---------------------------------------------------------------------------------------------------------

cdef inline int make_fit(
        PipelineState *pipe, Packet *p, const Service *service, uint32_t mtu, uint32_t now) noexcept nogil:
    """What to do with a packet that is longer than `mtu`: 0, it leaves in pieces; else how it ends.

    Its sender learns the MTU by which its packets would pass (RFC 1191, RFC 8201): silence here is a black hole. Where
    the service clamps the MSS such an answer is known to get lost, and not every sender could be told by SYN-ACK.
    """
    if may_be_fragmented(p) or (is_promised(p) and p.vnet.gso_type):
        return 0 if cut_to(p, mtu) else DROP_OVER_MTU
    if service.mss != 0 and cut_segment(p, mtu):
        return 0
    if p.quoted or not answerable(p):                    # RFC 1122 section 3.2.2: no errors about errors
        return DROP_OVER_MTU
    if not may_reject(&pipe.rejects, now):
        return DROP_REJECT_LIMIT
    answer_too_big(p, mtu if p.family == FAMILY_4 else max(mtu, <uint32_t>MIN_MTU6))
    return VIA_TOO_BIG


cdef inline int spend_ttl(PipelineState *pipe, Packet *p, uint32_t now) noexcept nogil:
    """As a router does; 0, or how else the packet ends: its sender is told, so that traceroute finds this hop."""
    if likely(decrement_ttl(p) == 0):
        return 0
    if p.quoted or not answerable(p):
        return DROP_TTL_EXPIRED
    if not may_reject(&pipe.rejects, now):
        return DROP_REJECT_LIMIT
    answer_time_exceeded(p)
    return VIA_TIME_EXCEEDED


cdef inline void clamp(Packet *p, const Service *service, uint32_t mtu) noexcept nogil:
    """The MSS of a SYN or SYN-ACK, as the service says; `mtu` is what reaches its backend."""
    cdef uint32_t headers = TCP_LEN + (IP4_LEN if p.family == FAMILY_4 else IP6_LEN)
    if p.protocol != PROTO_TCP or not p.tcp_flags & TCP_SYN:
        return
    clamp_mss(p, service.mss if service.mss != CLAMP_TO_PATH else min(mtu - headers, <uint32_t>CLAMP_TO_PATH))


cdef inline int wrap(
        PipelineState *pipe, const Snapshot *snap, Packet *p, const Hop *hop, bint split) noexcept nogil:
    """Into the tunnel; 0 or the drop reason. A super-frame leaves in pieces: no device can segment it in there.

    `split`: the tunnel's packet will be too long, and leaves in fragments.
    """
    cdef uint8_t kind = p.vnet.gso_type & ~<uint8_t>GSO_ECN
    cdef const Backend *backend = &snap.services.backends[p.backend]
    if unlikely(split):
        complete_checksum(p)
    if unlikely(not snap.routes.backend_source[p.backend].known):
        return DROP_NO_TUNNEL_SOURCE
    if unlikely(kind != 0):
        if kind != GSO_TCP4 and kind != GSO_TCP6 and kind != GSO_UDP:
            return DROP_TUNNEL_OFFLOAD
        if p.pieces == 0:
            p.pieces = p.vnet.gso_size
        if p.pieces < MIN_SEGMENT or p.l4 + p.l4_header > MAX_HEADERS - MAX_GROWTH:
            return DROP_TUNNEL_OFFLOAD
    encapsulate(
        p, &snap.services.services[p.service], backend, &snap.routes.backend_source[p.backend], hop, pipe.outer_number)
    pipe.outer_number += <uint16_t>(1 + (p.l3_length // p.pieces if p.pieces else 0))
    if unlikely(split) and not split_outer(
            p, backend.family, hop.mtu, <uint32_t>p.fingerprint << 16 | pipe.outer_number):
        return DROP_OVER_MTU
    return 0


cdef inline void translate_for_backend(PipelineState *pipe, Packet *p, const Backend *backend) noexcept nogil:
    """To the backend's address and port; in fullnat from a source port of ours."""
    cdef uint16_t be_port = backend.be_port if backend.be_port != 0 else p.be_dport
    cdef SourcePool *pool = pool_of(&pipe.flows, p.family)
    if unlikely(p.fragment == FRAGMENT_LATER):
        readdress(p, address_of(pool, p.source - 1) if p.source != 0 else p.src, backend.addr)
        return
    if unlikely(p.quoted):
        translate_to_backend(p, p.dst, backend.addr, be_port)
        if p.source != 0:
            translate_client_in_error(p, address_of(pool, p.source - 1), be_port_of(p.source - 1))
        return
    if p.source != 0:
        translate_both(p, address_of(pool, p.source - 1), be_port_of(p.source - 1), backend.addr, be_port)
    else:
        translate_destination(p, backend.addr, be_port)


cdef inline int forward_to_backend(
        PipelineState *pipe, const Snapshot *snap, Packet *p, int reason, uint32_t now) noexcept nogil:
    """Rewrite the packet for its backend, or wrap it; `reason`, or how else it ends."""
    cdef const Backend *backend = &snap.services.backends[p.backend]
    cdef const Service *service = &snap.services.services[p.service]
    cdef BackendStats *stats = &pipe.flows.stats[p.backend]
    cdef const Hop *hop = NULL
    cdef int fault = hop_to_backend(snap.routes, p.backend, &hop)
    cdef uint32_t mtu
    cdef bint split = False
    must(0 < p.backend < snap.services.backend_limit and backend.present)
    if unlikely(fault):
        return fault
    mtu = max(hop.mtu, outer_length(service, backend.family)) - outer_length(service, backend.family)
    if unlikely(not fits(p, mtu)):
        # RFC 2473 section 7.1, RFC 4213 section 3.2.2: a tunnel passes what IPv6 promises, in fragments of its own
        split = is_tunnel(service) and is_promised(p) and p.vnet.gso_type == 0
        fault = 0 if split else make_fit(pipe, p, service, mtu, now)
        if fault:
            return fault
    if unlikely(service.mss != 0):
        clamp(p, service, mtu)
    if is_tunnel(service):
        fault = wrap(pipe, snap, p, hop, split)
        if unlikely(fault):
            return fault
    else:
        if translates(service):
            fault = spend_ttl(pipe, p, now)
            if unlikely(fault):
                return fault
            translate_for_backend(pipe, p, backend)
        set_link_header(p, hop)
    stats.packets += 1
    stats.bytes += p.length
    return reason


cdef inline void note_unresolved(
        PipelineState *pipe, const Snapshot *snap, Addr client, uint8_t family) noexcept nogil:
    """A client on one of our links whose MAC the kernel must be asked for: fastlb's packets do not make it ask."""
    cdef const LinkRoute *route = find_route(snap.routes, client, family)
    cdef uint32_t at = load_acquire_u32(&pipe.unresolved_count)
    if at >= MAX_UNRESOLVED or route == NULL or route.hop != NO_HOP:
        return
    if at != 0 and same_addr(pipe.unresolved[at - 1].addr, client):
        return
    pipe.unresolved[at].addr = client
    pipe.unresolved[at].ifindex = route.ifindex
    pipe.unresolved[at].family = family
    store_release_u32(&pipe.unresolved_count, at + 1)


cdef inline void translate_for_client(Packet *p, const FlowTuple *flow) noexcept nogil:
    """From the VIP's address and port; in fullnat to the client's."""
    if unlikely(p.fragment == FRAGMENT_LATER):
        readdress(p, flow.vip, flow.client)
        return
    if unlikely(p.quoted):
        translate_to_client(p, p.src, flow.vip, flow.be_vport)
        if p.source != 0:
            translate_source_in_error(p, flow.client, flow.be_cport)
        return
    if p.source != 0:
        translate_both(p, flow.vip, flow.be_vport, flow.client, flow.be_cport)
    else:
        translate_source(p, flow.vip, flow.be_vport)


cdef inline int forward_to_client(
        PipelineState *pipe, const Snapshot *snap, Packet *p, const FlowTuple *flow, int reason, uint32_t now,
        ) noexcept nogil:
    """Rewrite a reply so that it comes from the VIP; `reason`, or how else it ends."""
    cdef BackendStats *stats = &pipe.flows.stats[p.backend]
    cdef const Service *service = &snap.services.services[snap.services.backends[p.backend].service]
    cdef const Hop *hop = NULL
    cdef const Hop *back = NULL
    cdef int fault = hop_to_address(snap.routes, flow.client, p.family, &hop)
    if unlikely(fault):
        if fault == DROP_NO_NEIGHBOUR:
            note_unresolved(pipe, snap, flow.client, p.family)
        return fault
    if unlikely(not fits(p, hop.mtu)):
        fault = make_fit(pipe, p, service, hop.mtu, now)
        if fault:
            return fault
    if unlikely(service.mss != 0 and hop_to_backend(snap.routes, p.backend, &back) == 0):
        clamp(p, service, min(hop.mtu, back.mtu))
    fault = spend_ttl(pipe, p, now)
    if unlikely(fault):
        return fault
    translate_for_client(p, flow)
    set_link_header(p, hop)
    stats.reply_packets += 1
    stats.reply_bytes += p.length
    return reason


cdef inline int refuse(
        PipelineState *pipe, const Snapshot *snap, Packet *p, int reason, uint32_t now) noexcept nogil:
    """No backend, or none with room: drop, or answer, as the service says."""
    if snap.services.services[p.service].no_backend != NO_BACKEND_RESET:
        return reason
    return answer(pipe, p, reason, now)


cdef inline int answer(PipelineState *pipe, Packet *p, int reason, uint32_t now) noexcept nogil:
    """Tell the sender that its packet goes nowhere; `reason`, when it may not be told."""
    if p.tcp_flags & TCP_RST or not answerable(p):
        return reason
    if not may_reject(&pipe.rejects, now):
        return DROP_REJECT_LIMIT
    reject(p)
    return VIA_REJECT


cdef inline int reset_flow(PipelineState *pipe, Packet *p, uint32_t now) noexcept nogil:
    """Its backend has left, and the client is told so; where that must wait, the entry waits for its next packet."""
    cdef FlowEntry *entry = find_again(pipe, p)
    cdef int reason = answer(pipe, p, DROP_BACKEND_LEFT, now)
    if likely(reason != DROP_REJECT_LIMIT):
        forget(&pipe.flows, p.shard, entry)
    return VIA_RESET if reason == VIA_REJECT else reason


cdef inline int echo(Packet *p) noexcept nogil:
    """A VIP answers while one of its services has a backend: what monitoring and load balancers in front ask for."""
    if p.service == 0 or not answerable(p):
        return DROP_NO_BACKEND
    answer_echo(p)
    send_back(p)
    return VIA_ECHO


# --- a packet, a batch -----------------------------------------------------------------------------------------------

cdef inline int receive(PipelineState *pipe, const Snapshot *snap, Packet *p) noexcept nogil:
    """First pass: whose packet is it? 0 when it is ours and sound, else its reason."""
    cdef int failed = parse(p)
    p.leg = LEG_NONE
    p.backend = 0
    if unlikely(failed):
        return -failed
    classify(snap.services, &pipe.flows, p)
    if unlikely(p.leg == LEG_NONE):
        p.backend = 0
        return PASS_NO_SERVICE
    if unlikely(p.leg == LEG_ECHO or p.fragment == FRAGMENT_LATER):
        return p.fault
    if unlikely(not owns(&pipe.flows, p.shard)):
        p.backend = 0
        return DROP_WRONG_WORKER
    if p.source == 0:
        prefetch_flow(&pipe.flows, p.shard, p.fingerprint)
    return p.fault


cdef inline bint is_far(const Snapshot *snap, const Packet *p) noexcept nogil:
    """Is there more to fetch than a bucket: in fullnat, and where a flow may begin?"""
    return p.reason == 0 and (p.source != 0 or (p.leg == LEG_CLIENT and (
        may_begin(p) or snap.services.services[p.service].forward == FORWARD_FULLNAT)))


cdef inline void approach_start(PipelineState *pipe, const Snapshot *snap, Packet *p) noexcept nogil:
    """What a flow that begins will write and read: its entry's tuple, its slot of the Maglev table."""
    cdef const Service *service = &snap.services.services[p.service]
    p.entry = approach_room(&pipe.flows, p.shard, p.fingerprint)
    p.placement = hash_of_flow(snap.services, service, p)
    prefetch_placement(service, p.placement)


cdef inline void approach(PipelineState *pipe, const Snapshot *snap, Packet *p) noexcept nogil:
    """Between the passes: by what the first has fetched, fetch what it names. Only a hint; nothing is decided."""
    cdef FlowEntry *entry
    cdef uint64_t fingerprint
    if p.leg == LEG_CLIENT:
        entry = find_flow(&pipe.flows, p.shard, p.fingerprint)
        p.entry = entry
        if entry != NULL:
            prefetch(&tuple_of(&pipe.flows, entry).source)
        elif may_begin(p):
            approach_start(pipe, snap, p)
        return
    fingerprint = pool_of(&pipe.flows, p.family).ports[p.source - 1].fingerprint
    prefetch_flow(&pipe.flows, p.shard, fingerprint)


cdef inline int pass_error_on(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """An ICMP error about a flow, on to the flow's other side."""
    cdef FlowTuple flow
    cdef int reason
    if p.leg == LEG_CLIENT:
        reason = backend_of_error(pipe, snap, p, now)
        return forward_to_backend(pipe, snap, p, reason, now) if reason == VIA_ICMP else reason
    reason = flow_of_error(pipe, snap, p, &flow, now)
    return forward_to_client(pipe, snap, p, &flow, reason, now) if reason == VIA_ICMP else reason


cdef inline int dispatch_later(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """A fragment without ports: after the first of its datagram, or it waits for it."""
    cdef uint64_t key = datagram_key(pipe.flows.key, p)
    cdef int reason = follow_first(pipe, snap, p, key, now)
    if reason != VIA_HELD:
        return reason
    return VIA_HELD if hold(&pipe.fragments, p, key, now) else DROP_FRAGMENT_LIMIT


cdef inline bint is_turned_away(const Snapshot *snap, const Packet *p) noexcept nogil:
    return snap.services.services[p.service].gates & GATE_LISTS and is_denied(snap.services, p)


cdef inline int follow_first(
        PipelineState *pipe, const Snapshot *snap, Packet *p, uint64_t key, uint32_t now) noexcept nogil:
    """VIA_HELD while it is not known where to."""
    cdef FragmentNote *note = find_note(&pipe.fragments, key, now)
    cdef FlowTuple flow
    cdef uint32_t leg
    cdef int fault
    if note == NULL:
        return VIA_HELD
    fault = account(note, p, now) if note.backend != 0 else DROP_FRAGMENT_UNKNOWN
    leg, p.backend, p.source, p.fingerprint = note.leg, note.backend, note.source, note.fingerprint
    flow.client, flow.vip = note.client, note.vip
    finish(note)
    if fault:
        return fault
    if p.backend >= snap.services.backend_limit or not snap.services.backends[p.backend].present or leg != p.leg:
        p.backend = 0
        return DROP_FRAGMENT_UNKNOWN                     # a reload in between
    if leg == LEG_REPLY:
        return forward_to_client(pipe, snap, p, &flow, VIA_FRAGMENT, now)
    p.service = snap.services.backends[p.backend].service
    if unlikely(is_turned_away(snap, p)):
        return DROP_DENIED
    return forward_to_backend(pipe, snap, p, VIA_FRAGMENT, now)


cdef inline int dispatch_first(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """The fragment with the ports goes the way of any packet; the others will want to know which."""
    cdef uint64_t key = datagram_key(pipe.flows.key, p)
    cdef uint8_t leg = p.leg
    cdef FlowTuple flow
    cdef int reason
    if admit_first(&pipe.fragments, key, now):
        return DROP_FRAGMENT_OVERLAP
    flow.client, flow.vip = p.src, p.dst
    reason = dispatch_packet(pipe, snap, p, &flow, now)
    note_first(&pipe.fragments, key, p, leg, p.backend if reason <= VIA_MAGLEV else 0, &flow, now)
    return reason


cdef inline int dispatch(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Second pass: where does it go? The packet's reason."""
    cdef FlowTuple flow
    if unlikely(p.fragment != FRAGMENT_NONE):
        if p.fragment == FRAGMENT_LATER:
            return dispatch_later(pipe, snap, p, now)
        return dispatch_first(pipe, snap, p, now)
    return dispatch_packet(pipe, snap, p, &flow, now)


cdef inline int dispatch_packet(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """`flow`: on the reply leg, whose answer it was."""
    cdef int reason
    if unlikely(p.leg == LEG_ECHO):
        return echo(p)
    if p.leg == LEG_CLIENT and unlikely(is_turned_away(snap, p)):
        return DROP_DENIED
    if unlikely(p.quoted):
        return pass_error_on(pipe, snap, p, now)
    if p.leg == LEG_CLIENT:
        reason = track_client(pipe, snap, p, now)
        if unlikely(reason == DROP_NO_BACKEND or reason == DROP_BACKENDS_FULL):
            return refuse(pipe, snap, p, reason, now)
        if unlikely(reason == DROP_FLOW_UNKNOWN):
            return answer(pipe, p, reason, now)
        if unlikely(reason == DROP_BACKEND_LEFT):
            return reset_flow(pipe, p, now)
        if unlikely(reason > VIA_REJECT):
            return reason
        return forward_to_backend(pipe, snap, p, reason, now)
    reason = track_reply(pipe, snap, p, flow, now)
    if unlikely(reason > VIA_REJECT):
        return reason
    return forward_to_client(pipe, snap, p, flow, reason, now)


cdef inline void run_batch(
        PipelineState *pipe, const Snapshot *snap, Packet *packets, int count, uint32_t now) noexcept nogil:
    """Give each of `count` <= BATCH packets its reason. `now` in milliseconds, one for the whole batch."""
    cdef Packet *p
    cdef bint far = False
    cdef int i
    must(0 <= count <= BATCH)
    pipe.schedulers.batch += 1
    pipe.schedulers.now = now
    for i in range(count):
        p = &packets[i]
        pipe.bytes += p.length
        p.reason = <uint8_t>receive(pipe, snap, p)
        far |= is_far(snap, p)
    pipe.packets += count
    if far:
        pipe.flows.emptied = False
    for i in range(count if far else 0):
        if is_far(snap, &packets[i]):
            approach(pipe, snap, &packets[i])
    for i in range(count):
        p = &packets[i]
        if likely(p.reason == 0):
            p.reason = <uint8_t>dispatch(pipe, snap, p, now)
        count_end(pipe, snap, p)


cdef inline uint32_t service_of(const Snapshot *snap, const Packet *p) noexcept nogil:
    """The index of the service that a packet belongs to, or MISSING where that is not known."""
    if p.leg == LEG_CLIENT and p.fragment != FRAGMENT_LATER:
        return p.service
    if p.leg == LEG_NONE or p.leg == LEG_ECHO or not 0 < p.backend < snap.services.backend_limit:
        return MISSING
    return snap.services.backends[p.backend].service if snap.services.backends[p.backend].present else <uint32_t>MISSING


cdef inline void count_by_service(PipelineState *pipe, const Snapshot *snap, const Packet *p) noexcept nogil:
    cdef uint32_t index = service_of(snap, p)
    if index != MISSING and p.reason != VIA_HELD:
        pipe.by_service[snap.services.services[index].slot].by_reason[p.reason] += 1


cdef inline void count_end(PipelineState *pipe, const Snapshot *snap, const Packet *p) noexcept nogil:
    """A fragment that is held has not ended yet."""
    must(p.reason < REASONS)
    pipe.reasons[p.reason] += p.reason != VIA_HELD
    if unlikely(p.reason > VIA_SCHEDULER):
        count_by_service(pipe, snap, p)
    if likely(p.reason <= VIA_REJECT):
        pipe.forwarded += 1
        pipe.forwarded_bytes += p.length


cdef inline void sweep_tables(PipelineState *pipe, const Snapshot *snap, uint32_t now) noexcept nogil:
    """What is due of the flows of this worker, and of the affinity table, which one of the workers looks after."""
    sweep(&pipe.flows, snap.services, now)
    if owns(&pipe.flows, 0):
        clear_ended(&pipe.affinity, now)


# --- fragments that waited -------------------------------------------------------------------------------------------

cdef inline bint must_look(PipelineState *pipe, uint32_t now) noexcept nogil:
    """Are there fragments that wait, and has anything happened that may have changed that?"""
    return pipe.fragments.count != 0 and (pipe.fragments.noted or pipe.fragments.looked != now)


cdef inline Packet *next_settled(
        PipelineState *pipe, const Snapshot *snap, uint32_t *at, uint32_t now) noexcept nogil:
    """From position `at` on, the next held fragment that has its reason; NULL when there is none, and all were seen.

    Its memory is its own until `let_go` gives the place at `at` back.
    """
    cdef HeldFragment *held
    cdef int reason
    if at[0] == 0:
        pipe.fragments.looked, pipe.fragments.noted = now, False
    while at[0] < pipe.fragments.count:
        held = held_at(&pipe.fragments, at[0])
        reason = follow_first(pipe, snap, &held.packet, held.key, now)
        if reason == VIA_HELD and waited(held, now):
            reason = DROP_FRAGMENT_UNKNOWN
        if reason != VIA_HELD:
            held.packet.reason = <uint8_t>reason
            count_end(pipe, snap, &held.packet)
            return &held.packet
        at[0] += 1
    return NULL
