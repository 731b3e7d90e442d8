# The Python face of inspect.pxd, and of the decisions on one tuple's way.

cdef class FlowWalk:
    """A walk over a whole flow table in slices, by entry numbers; workers may go on meanwhile.

    Expired flows are left out, and those that the filter does not want. ``backends``: the ids that are wanted;
    ``client``: the prefix; ``states``: their names; None: all. Raises ValueError for a state that there is not, and
    RuntimeError before services were published.
    """

    def __cinit__(self, Pipeline pipeline not None, backends=None, client=None, states=None):
        self.pipeline = pipeline
        self.services = snapshot_of(pipeline).services
        if backends is not None:
            self.want_backends(backends)
        if client is not None:
            self.filter.client = addr_from(client.network_address)
            self.filter.length, self.filter.family = client.prefixlen, client.version
        self.want_states(STATE_NAMES if states is None else states)

    cdef int want_backends(self, backends) except -1:
        wanted = bytearray(self.services.table.backend_limit)
        for backend in backends:
            wanted[backend] = 1
        self.wanted = bytes(wanted)
        self.filter.backends = <const uint8_t *><const char *>self.wanted
        self.filter.backend_limit = self.services.table.backend_limit
        return 0

    cdef int want_states(self, states) except -1:
        for state in states:
            self.filter.states |= <uint32_t>1 << <int>STATE_NAMES.index(state)
        return 0

    cdef uint64_t end_of(self, uint64_t start, uint64_t entries) noexcept:
        cdef uint64_t left = self.pipeline.flow_capacity - min(start, self.pipeline.flow_capacity)
        return start + min(entries, left)

    def rows(self, uint64_t start, uint64_t entries, uint32_t room, uint32_t now_ms):
        """Look at ``entries`` entries from number ``start`` on, but stop at the ``room``-th flow.

        Returns a list of (protocol, client, port, vip, port, backend id, state, age in ms, idle in ms, source, port),
        where the source is None unless the flow has one of its own (full NAT); and the number of the entry to go on
        with, or None at the end of the table.
        """
        cdef FlowTable *table = &self.pipeline.state.flows
        cdef uint64_t end = self.end_of(start, entries)
        cdef FlowCopy copy
        cdef bint found = True
        rows = []
        while found and len(rows) < room:
            with nogil:
                found = next_flow(table, &self.services.table, &self.filter, &start, end, now_ms, &copy)
            if found:
                rows.append(row_of_flow(table, &copy, now_ms))
        return rows, start if start < self.pipeline.flow_capacity else None

    def counts(self, uint64_t start, uint64_t entries, uint32_t now_ms):
        """Count the flows of ``entries`` entries from number ``start`` on. Returns {(backend id, state): flows}, and
        the number of the entry to go on with, or None."""
        cdef uint64_t end = self.end_of(start, entries)
        cdef size_t size = <size_t>self.services.table.backend_limit * FLOW_STATES
        cdef uint64_t *counts = <uint64_t *>zeroed(size, sizeof(uint64_t))
        cdef size_t at
        with nogil:
            count_flows(&self.pipeline.state.flows, &self.services.table, &self.filter, start, end, now_ms, counts)
        found = {}
        for at in range(size):
            if counts[at] != 0:
                found[at // FLOW_STATES, STATE_NAMES[at % FLOW_STATES]] = counts[at]
        free(counts)
        return found, end if end < self.pipeline.flow_capacity else None


def flow_states():
    """Return the names of every state that a flow can have."""
    return STATE_NAMES[1:]


cdef PublishedSnapshot snapshot_of(Pipeline pipeline):
    """Return what the next batch will see."""
    if not pipeline.snapshots:
        raise RuntimeError("publish services and routes first")
    return pipeline.snapshots[len(pipeline.snapshots) - 1]


cdef tuple row_of_flow(FlowTable *table, const FlowCopy *copy, uint32_t now_ms):
    cdef const FlowTuple *flow = &copy.flow
    source, port = source_of_flow(table, flow)
    return (
        flow.protocol, address_from(flow.client, flow.family), bswap16(flow.be_cport),
        address_from(flow.vip, flow.family), bswap16(flow.be_vport), backend_of(&copy.entry),
        STATE_NAMES[state_of(&copy.entry)], since(flow.since, now_ms), since(copy.entry.seen, now_ms), source, port)


cdef tuple source_of_flow(FlowTable *table, const FlowTuple *flow):
    """Return (address, port) of a flow in full NAT, else (None, 0)."""
    cdef SourcePool *pool = pool_of(table, flow.family)
    if flow.source == 0 or pool.count == 0:
        return None, 0
    return address_from(address_of(pool, flow.source - 1), flow.family), port_of(flow.source - 1)


cdef uint32_t since(uint32_t then, uint32_t now_ms) noexcept:
    """Return the milliseconds that have passed; 0 if the clock is behind by a tick. It comes round after 49 days."""
    return 0 if then - now_ms < 1000 else now_ms - then


# --- one tuple --------------------------------------------------------------------------------------------------------

def explain_tuple(Pipeline pipeline not None, src, sport, dst, dport, uint8_t protocol, uint32_t now_ms):
    """Return what the pipeline would do with a packet from ``src`` to ``dst``: every decision on its way, with its
    grounds, as a dict (see _core.pyi).

    Nothing is changed by it, not even in a pipeline that a worker runs. It has to be the pipeline that owns the tuple's
    shard (`shard_of_client`), because turns and response times are each worker's own. Raises ValueError for what is no
    tuple.
    """
    cdef Packet p
    cdef PublishedSnapshot published = snapshot_of(pipeline)
    cdef const Snapshot *snap = &published.value
    set_tuple(&p, src, sport, dst, dport, protocol)
    classify(snap.services, &pipeline.state.flows, &p)
    found = {"leg": None, "shard": p.shard}
    if p.leg == LEG_REPLY:
        found |= {"leg": "reply", "reply": explain_reply(pipeline, snap, &p, now_ms)}
    elif p.leg == LEG_CLIENT:
        found |= {"leg": "client"} | explain_flow(pipeline, snap, &p, now_ms)
    return found


def shard_of_client(src, sport):
    """Return the shard of a client's flows from this port."""
    return shard_of(addr_from(src), be_port_from(sport))


cdef int set_tuple(Packet *p, src, sport, dst, dport, uint8_t protocol) except -1:
    if src.version != dst.version:
        raise ValueError(f"source {src} and destination {dst} are of different IP versions")
    memset(p, 0, sizeof(Packet))
    p.src, p.dst = addr_from(src), addr_from(dst)
    p.be_sport, p.be_dport = be_port_from(sport), be_port_from(dport)
    p.family, p.protocol, p.asked = dst.version, protocol, protocol
    return 0


cdef dict explain_flow(Pipeline pipeline, const Snapshot *snap, Packet *p, uint32_t now_ms):
    """Explain a packet on the client's leg."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef uint64_t hashed = hash_of_flow(snap.services, service, p)
    cdef Client client
    cdef uint64_t slot = 0
    cdef uint32_t scheduled
    cdef uint32_t backend
    cdef bint forgotten
    if service.affinity != NULL:
        client = client_of(
            &pipeline.state.affinity, service.affinity, pipeline.state.flows.key, p.src, now_ms)
        slot = live_slot(&pipeline.state.affinity, &client)
    entry = explain_entry(pipeline, snap, p, now_ms)
    forgotten = entry is not None and entry["void"] is not None and entry["is_load"]
    counts = _FlowCounts(pipeline, snap.services.backend_limit, entry["backend"] if forgotten else 0)
    admission = explain_admission(pipeline, snap, p, now_ms)
    scheduled = next_choice(pipeline, counts, service, p.service, hashed, &client, slot)
    if admission["scheduled"]:
        backend = backend_without_conflict(pipeline, counts, snap, p, True, scheduled, hashed, now_ms)
    else:
        backend = backend_in_midflow(&pipeline.state, service, hashed, p.src, now_ms)
        backend = backend_without_conflict(pipeline, counts, snap, p, False, backend, hashed, now_ms)
    p.backend = backend
    admission["needs_entry"] = backend != 0 and needs_entry(&pipeline.state, snap, service, p, now_ms)
    if entry is not None and entry["void"] is None:
        backend = entry["backend"]
    return {
        "service": p.service,
        "hash": hashed,
        "admission": admission,
        "entry": entry,
        "placement": explain_placement(pipeline, counts, service, p.service, hashed),
        "affine": explain_affinity(counts, service.affinity, &client, slot) if slot != 0 else None,
        "scheduled": scheduled,
        "full": scheduled == 0 and service.candidate_count != 0,
        "hashed": backend_in_midflow(&pipeline.state, service, hashed, p.src, now_ms),
        "backend": backend,
        "hop": explain_hop(snap, service, backend) if backend != 0 else None,
        "source_ports": explain_ports(pipeline, service, p),
    }


cdef dict explain_admission(Pipeline pipeline, const Snapshot *snap, const Packet *p, uint32_t now_ms):
    """Explain whether the client is let in, and whether a flow that is new may begin and be remembered.

    ``limit``: how many flows its source may begin at this moment, and the seconds until the next, or None;
    ``remembered``: it gets an entry; ``crowded``: it gets none, because its shard keeps the rest for others;
    ``scheduled``: by the scheduler, not by the hash.
    """
    cdef const Service *service = &snap.services.services[p.service]
    cdef const FlowBudget *budget = &pipeline.state.budget
    cdef bint crowded = finds_no_room(pipeline, snap, service, p, now_ms)
    cdef bint room = has_budget(pipeline, snap, service, now_ms) and not crowded
    cdef bint by_hash = not room or (budget.ran_out_once and may_go_by_hash(budget, snap.services, service, now_ms))
    return {
        "denied": is_turned_away(snap, p), "limit": explain_limit(pipeline, service, p, now_ms), "remembered": room,
        "crowded": crowded, "scheduled": not by_hash or is_found_again(service)}


cdef uint64_t microseconds(Pipeline pipeline, uint32_t now_ms) noexcept:
    """Return the time as the pipeline has it: a worker's clock is the machine's, an embedding program gives its own."""
    return clock_ns() // 1000 if pipeline.running else <uint64_t>now_ms * 1000


cdef bint finds_no_room(
        Pipeline pipeline, const Snapshot *snap, const Service *service, const Packet *p, uint32_t now_ms) noexcept:
    cdef FlowTable *table = &pipeline.state.flows
    return only_reserve_left(snap.services, table, service, p.shard) and entry_to_replace(
        table, snap.services, p.shard, p.fingerprint, now_ms) == NULL


cdef bint has_budget(Pipeline pipeline, const Snapshot *snap, const Service *service, uint32_t now_ms) noexcept:
    """True if one more entry may be made. A copy of the budget is asked, because asking refills it."""
    cdef FlowBudget budget = pipeline.state.budget
    return may_make_entry(&budget, snap.services, &pipeline.state.flows, service, microseconds(pipeline, now_ms))


cdef object explain_limit(Pipeline pipeline, const Service *service, const Packet *p, uint32_t now_ms):
    """Return (flows, seconds) of the source's bucket; None without a limit."""
    cdef uint64_t now = microseconds(pipeline, now_ms) * TICKS & ticks_mask()
    cdef const Admission *admission = service.admission
    cdef uint64_t seen, key, full
    if not service.gates & GATE_LIMIT:
        return None
    key = source_key(pipeline.state.flows.key, service, p.src)
    slot_of_source(pipeline.state.limits, key, now, &seen)
    full = until_full(seen, now, admission.limit_burst) if seen >> TIME_BITS == key & TAG_MASK else 0
    if full + admission.limit_interval <= admission.limit_burst:
        return (admission.limit_burst - full) // admission.limit_interval, 0.0
    return 0, (full + admission.limit_interval - admission.limit_burst) / (TICKS * 1e6)


cdef dict explain_entry(Pipeline pipeline, const Snapshot *snap, const Packet *p, uint32_t now_ms):
    """Explain the flow's entry; ``void`` is why it does not decide, or None. A SYN starts a flow that is over anew."""
    cdef FlowTable *table = &pipeline.state.flows
    cdef FlowEntry *entry = find_flow(table, p.shard, p.fingerprint)
    cdef FlowCopy copy
    if entry == NULL:
        return None
    copy_entry(entry, &copy.entry)
    copy.flow = tuple_of(table, entry)[0]
    if copy.entry.fingerprint != p.fingerprint or state_of(&copy.entry) >= FLOW_STATES:
        return None
    source, port = source_of_flow(table, &copy.flow)
    return {
        "backend": backend_of(&copy.entry), "state": STATE_NAMES[state_of(&copy.entry)],
        "age": since(copy.flow.since, now_ms), "idle": since(copy.entry.seen, now_ms), "source": source,
        "source_port": port, "is_load": not is_over(state_of(&copy.entry)),
        "void": why_void(snap, &copy, p, now_ms)}


cdef str why_void(const Snapshot *snap, const FlowCopy *copy, const Packet *p, uint32_t now_ms):
    """Return why an entry does not decide where a SYN goes, in the order of `track_client`; None if it does."""
    cdef const FlowEntry *entry = &copy.entry
    cdef const Backend *backend = &snap.services.backends[backend_of(entry)]
    if has_expired(entry, snap.services, now_ms):
        return "expired"
    if backend.flow_policy == KEEP_NONE:
        return "left"
    if backend.service != p.service:
        return "of another service"
    if backend.flow_policy == KEEP_TO_RESET:
        return "to reset"
    if backend.flow_policy == KEEP_EXCEPT_SYN and p.protocol == PROTO_TCP:
        return "down"
    if is_over(state_of(entry)):
        return "over"
    if snap.services.services[p.service].forward == FORWARD_FULLNAT and copy.flow.source == 0:
        return "of another mode"
    return None


cdef dict explain_affinity(_FlowCounts counts, const Affinity *by, const Client *client, uint64_t slot):
    """Explain what is remembered of a client: ``backend`` is 0 if it is released, ``left`` is in seconds, and ``full``
    means that the backend has all the flows that it may have."""
    cdef const Taker *taker = taker_of(by, client, slot)
    return {
        "backend": taker.backend if taker != NULL else 0, "place": sticky_in(slot),
        "left": ticks_left(slot, client.tick) * (1 << TICK_BITS) / 1000,
        "full": taker != NULL and not takes_one_more(&counts.table, taker)}


cdef class _FlowCounts:
    """Backends' flows as a scheduler meets them: without the entry that does not decide, which is forgotten by then.

    One more row of counts, which takes it away: nobody else's are touched.
    """
    cdef FlowTable table
    cdef BackendStats *rows[SHARDS + 1]
    cdef BackendStats *less
    cdef uint32_t row_count

    def __cinit__(self, Pipeline pipeline, uint32_t backend_limit, uint32_t forgotten):
        """``forgotten``: the backend id of such an entry; 0: there is none."""
        cdef uint32_t count = pipeline.state.flows.row_count[0]
        self.table = pipeline.state.flows
        self.table.events = NULL                         # what is only looked at is not counted
        self.less = <BackendStats *>zeroed(backend_limit, sizeof(BackendStats))
        memcpy(self.rows, self.table.rows, count * sizeof(BackendStats *))
        self.rows[count] = self.less
        self.row_count = count + 1
        self.table.rows, self.table.row_count = self.rows, &self.row_count
        if 0 < forgotten < backend_limit:
            self.less[forgotten].active_flows = -1

    def __dealloc__(self):
        free(self.less)


cdef uint32_t next_choice(
        Pipeline pipeline, _FlowCounts counts, const Service *service, uint32_t index, uint64_t hashed,
        const Client *client, uint64_t slot) noexcept:
    """Return the backend id that the next new flow would get. Copies of cursor and random state are used, so nothing
    changes.

    ``slot``: the client's in the affinity table; 0 if it has none, and then ``client`` is not looked at.
    """
    cdef SchedulerState schedulers = pipeline.state.schedulers
    cdef Cursor cursor = cursor_of(&schedulers, index)[0]
    cdef const Taker *taker = taker_of(service.affinity, client, slot) if slot != 0 else NULL
    schedulers.batch += 1                                # flows are added up anew
    if taker != NULL and takes_one_more(&counts.table, taker):
        return taker.backend
    return scheduled_backend(&schedulers, &counts.table, service, &cursor, hashed)


cdef uint32_t backend_without_conflict(
        Pipeline pipeline, _FlowCounts counts, const Snapshot *snap, const Packet *p, bint fresh, uint32_t backend,
        uint64_t hashed, uint32_t now_ms) noexcept:
    """Return a backend id as `choose_backend` would: in nat by the hash one that does not already talk to this client
    port, or 0."""
    cdef const Service *service = &snap.services.services[p.service]
    cdef SchedulerState schedulers = pipeline.state.schedulers
    cdef Cursor cursor = cursor_of(&schedulers, p.service)[0]
    cdef const Candidate *candidate
    cdef int offset
    schedulers.batch += 1
    if backend == 0 or service.forward != FORWARD_NAT or not in_conflict(pipeline, snap, p, backend, now_ms):
        return backend
    for offset in range(MAX_ALTERNATIVES if service.candidate_count != 0 else 0):
        candidate = hashed_candidate(service, hashed, offset)
        if ((not fresh or has_room(&schedulers, &counts.table, service, &cursor, candidate))
                and not in_conflict(pipeline, snap, p, candidate.backend, now_ms)):
            return candidate.backend
    return 0


cdef bint in_conflict(
        Pipeline pipeline, const Snapshot *snap, const Packet *p, uint32_t backend, uint32_t now_ms) noexcept:
    cdef FlowEntry *entry = conflict_with(
        &pipeline.state.flows, snap.services, p, &snap.services.backends[backend])
    return entry != NULL and not gives_way(entry, snap.services, now_ms)


cdef dict explain_placement(
        Pipeline pipeline, _FlowCounts counts, const Service *service, uint32_t index, uint64_t hashed):
    """Explain where hash and turn point to, and what schedulers by load compare."""
    cdef SchedulerState *schedulers = &pipeline.state.schedulers
    cdef uint32_t turn = cursor_of(schedulers, index).position
    cdef const Candidate *candidate
    cdef uint32_t at
    found = {"slot": None, "slots": 0, "point": None, "points": 0, "turn": None, "turns": 0, "candidates": []}
    if service.maglev != NULL and not has_ring(service):
        found |= {"slot": hashed % service.maglev_size, "slots": service.maglev_size}
    if service.ring_size != 0:
        at = ring_point(service, hashed) % service.ring_size
        found |= {"point": service.ring_points[at], "points": service.ring_size}
    if service.wrr_size != 0 and goes_in_turn(service):
        found |= {"turn": turn if turn < service.wrr_size else 0, "turns": service.wrr_size}
    for at in range(service.candidate_count if goes_by_load(service) else 0):
        candidate = &service.candidates[at]
        found["candidates"].append({
            "backend": candidate.backend, "weight": candidate.weight,
            "flows": active_flows(&counts.table, candidate.backend),
            "response": response_of(schedulers, candidate) / 1e6 if goes_by_response(service) else None,
            "load": load_of(schedulers, &counts.table, service, candidate)})
    return found


cdef dict explain_hop(const Snapshot *snap, const Service *service, uint32_t backend):
    """Explain how packets leave for a backend. ``fault``: the drop's reason, or None; ``mtu``: the longest packet that
    fits inside."""
    cdef const Hop *hop = NULL
    cdef int fault = hop_to_backend(snap.routes, backend, &hop)
    cdef uint32_t outer = outer_length(service, snap.services.backends[backend].family)
    found = {"fault": None, "link": 0, "mac": None, "mtu": 0, "outer": outer}
    if hop != NULL:
        found |= {"link": hop.ifindex, "mtu": max(hop.mtu, outer) - outer}
        if fault == 0:
            found["mac"] = PyBytes_FromStringAndSize(<const char *>hop.dst_mac, 6)
    if fault == 0 and is_tunnel(service) and not snap.routes.backend_source[backend].known:
        fault = DROP_NO_TUNNEL_SOURCE
    if fault != 0:
        found["fault"] = (<bytes>reason_name(fault)).decode()
    return found


cdef object explain_ports(Pipeline pipeline, const Service *service, const Packet *p):
    """Return (taken, all) of full NAT's source ports in the flow's shard; None in other modes."""
    cdef SourcePool *pool = pool_of(&pipeline.state.flows, p.family)
    if service.forward != FORWARD_FULLNAT:
        return None
    if pool.count == 0:
        return 0, 0
    return free_ports(pool, p.protocol, p.shard).taken, ports_per_address(pool, p.shard) * pool.count


cdef dict explain_reply(Pipeline pipeline, const Snapshot *snap, Packet *p, uint32_t now_ms):
    """Explain a packet that counts as a backend's answer: the flow that it answers, and its state. ``backend`` is 0 if
    there is no such flow."""
    cdef const Service *service
    cdef FlowTuple flow
    cdef FlowEntry *entry
    cdef FlowCopy copy
    cdef uint32_t backend
    memset(&flow, 0, sizeof(FlowTuple))
    if p.source != 0:
        entry = entry_of_port(&pipeline.state, snap, p, &flow, now_ms)
    else:
        entry = find_reply(&pipeline.state.flows, snap.services, p)
    if entry != NULL:
        copy_entry(entry, &copy.entry)
        if copy.entry.fingerprint != 0 and not has_expired(&copy.entry, snap.services, now_ms):
            if p.source == 0:
                set_flow_of_reply(&flow, &pipeline.state, snap, p, backend_of(&copy.entry), entry)
            return answered(&flow, p.family, backend_of(&copy.entry), STATE_NAMES[state_of(&copy.entry)], True)
    backend = answering_backend(pipeline, snap, p, &flow, now_ms)
    service = &snap.services.services[snap.services.backends[backend].service]
    remembered = p.protocol != PROTO_TCP or has_budget(pipeline, snap, service, now_ms)
    return answered(&flow, p.family, backend, None, remembered)


cdef uint32_t answering_backend(
        Pipeline pipeline, const Snapshot *snap, const Packet *p, FlowTuple *flow, uint32_t now_ms) noexcept:
    """Return a backend id as `pick_up_reply` would: of those at this address and port the one whose hash explains the
    flow, or 0."""
    cdef uint32_t backend = p.backend if p.source == 0 else 0
    cdef int _looked
    for _looked in range(MAX_ALTERNATIVES):
        if backend == 0:
            break
        set_flow_of_reply(flow, &pipeline.state, snap, p, backend, NULL)
        if explains(&pipeline.state, snap, backend, p, flow.be_vport, now_ms):
            return backend
        backend = snap.services.backends[backend].next_reply
    return 0


cdef dict answered(const FlowTuple *flow, uint8_t family, uint32_t backend, state, remembered):
    return {
        "remembered": remembered,
        "backend": backend, "state": state, "client": address_from(flow.client, family),
        "client_port": bswap16(flow.be_cport), "vip": address_from(flow.vip, family),
        "vip_port": bswap16(flow.be_vport)}
