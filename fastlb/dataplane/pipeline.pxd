"""A batch of packets from frame to verdict: parse, classify, track, schedule, forward.

Two passes over at most BATCH packets. The first parses each frame and prefetches the bucket of its flow; the second
finds the buckets in cache. Full NAT and new flows need more than the bucket, which the first pass fetches as soon as
the bucket must have come. Every packet leaves with exactly one reason; the caller alone transmits frames and gives
their memory back.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastlb.dataplane.admission cimport is_denied
from fastlb.dataplane.affinity cimport clear_ended
from fastlb.dataplane.conntrack cimport (
    FlowEntry, entry_at, find_flow, owns, pool_of, prefetch_flow, prefetch_room, sweep, tuple_of)
from fastlb.dataplane.forward cimport answer, echo, forward_to_backend, forward_to_client, refuse, reset_flow
from fastlb.dataplane.fragment cimport (
    FragmentNote, HeldFragment, account, admit_first, datagram_key, find_note, finish, held_at, hold, note_first,
    note_passed, waited)
from fastlb.dataplane.lookup cimport MISSING
from fastlb.dataplane.machine cimport likely, must, prefetch, unlikely
from fastlb.dataplane.parse cimport parse
from fastlb.dataplane.reasons cimport (
    DROP_BACKENDS_FULL, DROP_BACKEND_LEFT, DROP_DENIED, DROP_FLOW_UNKNOWN, DROP_FRAGMENT_LIMIT, DROP_FRAGMENT_OVERLAP,
    DROP_FRAGMENT_UNKNOWN, DROP_NO_BACKEND, DROP_WRONG_WORKER, PASS_NO_SERVICE, REASONS, VIA_FRAGMENT, VIA_HELD,
    VIA_ICMP, VIA_MAGLEV, VIA_REJECT, VIA_SCHEDULER)
from fastlb.dataplane.schedule cimport hash_of_flow, prefetch_placement
from fastlb.dataplane.service cimport classify
from fastlb.dataplane.state cimport PipelineState
from fastlb.dataplane.track cimport backend_of_error, flow_of_error, may_begin, track_client, track_reply
from fastlb.dataplane.types cimport (
    BATCH, FORWARD_FULLNAT, FRAGMENT_FIRST, FRAGMENT_LATER, FRAGMENT_NONE, GATE_LISTS, LATER_BIT, LEG_CLIENT, LEG_ECHO,
    LEG_NONE, LEG_REPLY, FlowTuple, Packet, Service, Snapshot)


cdef enum:
    PREFETCH_DISTANCE = 8    # packets between `receive` and `prefetch_rest`


# --- a packet, a batch -----------------------------------------------------------------------------------------------

cdef inline int receive(PipelineState *pipe, const Snapshot *snap, Packet *p) noexcept nogil:
    """First pass: parse a packet and find out whose it is. Returns 0 if it is ours and sound, else its reason."""
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


cdef inline bint has_more_to_fetch(const Snapshot *snap, const Packet *p) noexcept nogil:
    """True if more than a bucket must come from memory: in fullnat, and where a flow may begin."""
    return p.reason == 0 and (p.source != 0 or (p.leg == LEG_CLIENT and (
        may_begin(p) or snap.services.services[p.service].forward == FORWARD_FULLNAT)))


cdef inline void prefetch_new_flow(PipelineState *pipe, const Snapshot *snap, Packet *p) noexcept nogil:
    """Fetch what a flow that begins will write and read: its entry's tuple and its slot of the Maglev table."""
    cdef const Service *service = &snap.services.services[p.service]
    p.entry = prefetch_room(&pipe.flows, p.shard, p.fingerprint)
    p.placement = hash_of_flow(snap.services, service, p)
    prefetch_placement(service, p.placement)


cdef inline void prefetch_rest(PipelineState *pipe, const Snapshot *snap, Packet *p) noexcept nogil:
    """Fetch what the memory names that `receive` has fetched. This is only a hint; nothing is decided.

    It runs some packets behind `receive`, which gives memory time for both. As a pass of its own it asked for all at
    once, and `dispatch` waited 25 ns longer for the entry of an answer in fullnat.
    """
    cdef FlowEntry *entry
    if not has_more_to_fetch(snap, p):
        return
    if p.leg == LEG_CLIENT:
        entry = find_flow(&pipe.flows, p.shard, p.fingerprint)
        p.entry = entry
        if entry != NULL:
            prefetch(&tuple_of(&pipe.flows, entry).source)
        elif may_begin(p):
            prefetch_new_flow(pipe, snap, p)
        return
    prefetch(entry_at(&pipe.flows, pool_of(&pipe.flows, p.family).ports[p.source - 1].next))


cdef inline int pass_error_on(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Forward an ICMP error about a flow to the flow's other side."""
    cdef FlowTuple flow
    cdef int reason
    if p.leg == LEG_CLIENT:
        reason = backend_of_error(pipe, snap, p, now)
        return forward_to_backend(pipe, snap, p, reason, now) if reason == VIA_ICMP else reason
    reason = flow_of_error(pipe, snap, p, &flow, now)
    return forward_to_client(pipe, snap, p, &flow, reason, now) if reason == VIA_ICMP else reason


cdef inline int dispatch_later(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Forward a fragment without ports as the first one of its datagram was, or hold it until that has come."""
    cdef uint64_t key = datagram_key(pipe.flows.key, p)
    cdef int reason = forward_like_first(pipe, snap, p, key, now)
    if reason != VIA_HELD:
        return reason
    return VIA_HELD if hold(&pipe.fragments, p, key, now) else DROP_FRAGMENT_LIMIT


cdef inline bint is_turned_away(const Snapshot *snap, const Packet *p) noexcept nogil:
    return snap.services.services[p.service].gates & GATE_LISTS and is_denied(snap.services, p)


cdef inline int forward_like_first(
        PipelineState *pipe, const Snapshot *snap, Packet *p, uint64_t key, uint32_t now) noexcept nogil:
    """Forward a later fragment as the first one of its datagram was. Returns VIA_HELD as long as that is not known."""
    cdef FragmentNote *note = find_note(&pipe.fragments, key, now)
    cdef FlowTuple flow
    cdef uint32_t leg
    cdef int fault
    if note == NULL:
        return VIA_HELD
    if note.leg == LEG_NONE:
        account(note, p, now)                            # the host may judge overlaps
        finish(note)
        return PASS_NO_SERVICE
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
    if p.source == 0 and snap.services.services[p.service].forward == FORWARD_FULLNAT:
        p.backend = 0
        return DROP_FRAGMENT_UNKNOWN
    if unlikely(is_turned_away(snap, p)):
        return DROP_DENIED
    return forward_to_backend(pipe, snap, p, VIA_FRAGMENT, now)


cdef inline int dispatch_first(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Dispatch a first fragment, which has the ports, as any packet; note for the later ones where it went."""
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


cdef inline void pass_first(PipelineState *pipe, const Snapshot *snap, const Packet *p, uint32_t now) noexcept nogil:
    """Note that a first fragment is the host's. The later ones must follow it, even where their addresses alone would
    say otherwise.

    Seldom so in a running balancer: the filter keeps out both (kernel/ebpf/fragments.py).
    """
    cdef Packet later = p[0]
    if p.fault:
        return
    later.fragment = FRAGMENT_LATER
    later.asked |= LATER_BIT
    later.be_sport = later.be_dport = 0
    classify(snap.services, &pipe.flows, &later)
    if later.leg != LEG_NONE:
        note_passed(&pipe.fragments, datagram_key(pipe.flows.key, p), p, now)


cdef inline int dispatch(PipelineState *pipe, const Snapshot *snap, Packet *p, uint32_t now) noexcept nogil:
    """Second pass: decide where the packet goes, and forward it. Returns its reason."""
    cdef FlowTuple flow
    if unlikely(p.fragment != FRAGMENT_NONE):
        if p.fragment == FRAGMENT_LATER:
            return dispatch_later(pipe, snap, p, now)
        return dispatch_first(pipe, snap, p, now)
    return dispatch_packet(pipe, snap, p, &flow, now)


cdef inline int dispatch_packet(
        PipelineState *pipe, const Snapshot *snap, Packet *p, FlowTuple *flow, uint32_t now) noexcept nogil:
    """Dispatch a packet with ports. `flow` is set to the flow that a reply answers."""
    cdef int reason
    if unlikely(p.leg == LEG_ECHO):
        return echo(snap.services, p)
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
    cdef bint more_to_fetch = False
    cdef int i
    must(0 <= count <= BATCH)
    pipe.schedulers.batch += 1
    pipe.schedulers.now = now
    pipe.flows.emptied = False
    for i in range(count):
        p = &packets[i]
        pipe.bytes += p.length
        p.reason = <uint8_t>receive(pipe, snap, p)
        more_to_fetch |= has_more_to_fetch(snap, p)
        if unlikely(more_to_fetch) and i >= PREFETCH_DISTANCE:
            prefetch_rest(pipe, snap, &packets[i - PREFETCH_DISTANCE])
    pipe.packets += count
    for i in range(max(count - PREFETCH_DISTANCE, 0) if unlikely(more_to_fetch) else count, count):
        prefetch_rest(pipe, snap, &packets[i])
    for i in range(count):
        p = &packets[i]
        if likely(p.reason == 0):
            p.reason = <uint8_t>dispatch(pipe, snap, p, now)
        elif unlikely(p.fragment == FRAGMENT_FIRST and p.reason == PASS_NO_SERVICE):
            pass_first(pipe, snap, p, now)
        count_end(pipe, snap, p)


cdef inline uint32_t service_of(const Snapshot *snap, const Packet *p) noexcept nogil:
    """Return the index of the service that a packet belongs to, or MISSING where that is not known."""
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
    """Count a packet's reason. A fragment that is held has not ended yet."""
    must(p.reason < REASONS)
    pipe.reasons[p.reason] += p.reason != VIA_HELD
    if unlikely(p.reason > VIA_SCHEDULER):
        count_by_service(pipe, snap, p)
    if likely(p.reason <= VIA_REJECT):
        pipe.forwarded += 1
        pipe.forwarded_bytes += p.length


cdef inline void sweep_tables(PipelineState *pipe, const Snapshot *snap, uint32_t now) noexcept nogil:
    """Sweep what is due of this worker's flows, and of the affinity table, which one of the workers looks after."""
    sweep(&pipe.flows, snap.services, now)
    if owns(&pipe.flows, 0):
        clear_ended(&pipe.affinity, now)


# --- fragments that waited -------------------------------------------------------------------------------------------

cdef inline bint must_check_held(PipelineState *pipe, uint32_t now) noexcept nogil:
    """True if fragments wait, and anything has happened that may have changed that."""
    return pipe.fragments.count != 0 and (pipe.fragments.noted or pipe.fragments.checked_at != now)


cdef inline Packet *next_settled(
        PipelineState *pipe, const Snapshot *snap, uint32_t *at, uint32_t now) noexcept nogil:
    """Return the next held fragment, from position `at` on, that has its reason now; NULL if there is none, and all
    were seen.

    Its memory is its own until `free_slot` frees the one at `at`.
    """
    cdef HeldFragment *held
    cdef int reason
    if at[0] == 0:
        pipe.fragments.checked_at, pipe.fragments.noted = now, False
    while at[0] < pipe.fragments.count:
        held = held_at(&pipe.fragments, at[0])
        reason = forward_like_first(pipe, snap, &held.packet, held.key, now)
        if reason == PASS_NO_SERVICE or (reason == VIA_HELD and waited(held, now)):
            reason = DROP_FRAGMENT_UNKNOWN               # the host cannot have back what has been taken
        if reason != VIA_HELD:
            held.packet.reason = <uint8_t>reason
            count_end(pipe, snap, &held.packet)
            return &held.packet
        at[0] += 1
    return NULL
