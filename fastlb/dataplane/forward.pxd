"""The packet on its way: rewritten or wrapped for its backend, translated back for its client, or answered.

Nothing here decides where a packet goes; `track` has.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from fastlb.dataplane.conntrack cimport FlowEntry, forget, owned_after, pool_of
from fastlb.dataplane.encap cimport complete_checksum, encapsulate, split_outer
from fastlb.dataplane.fragment cimport readdress
from fastlb.dataplane.icmp cimport (
    answer_time_exceeded, answer_too_big, answerable, may_reject, may_tell_too_big, reject, send_back)
from fastlb.dataplane.icmperror cimport (
    answer_echo, translate_client_in_error, translate_source_in_error, translate_to_backend, translate_to_client)
from fastlb.dataplane.machine cimport likely, load_acquire_u32, must, store_release_u32, unlikely
from fastlb.dataplane.mode cimport is_tunnel, outer_length, translates
from fastlb.dataplane.reasons cimport (
    DROP_BACKEND_LEFT, DROP_NO_BACKEND, DROP_NO_NEIGHBOUR, DROP_NO_TUNNEL_SOURCE, DROP_OVER_MTU, DROP_REJECT_LIMIT,
    DROP_TTL_EXPIRED, DROP_TUNNEL_OFFLOAD, VIA_ECHO, VIA_REJECT, VIA_RESET, VIA_TIME_EXCEEDED, VIA_TOO_BIG)
from fastlb.dataplane.rewrite cimport (
    clamp_mss, decrement_ttl, fits, has_number, is_last_hop, renumber, set_link_header, translate_both,
    translate_destination, translate_source)
from fastlb.dataplane.route cimport find_route, hop_to_address, hop_to_backend
from fastlb.dataplane.segments cimport (
    MIN_MTU6, cut_segment, cut_to, gso_kind, is_divisible, is_promised, max_frames, may_be_fragmented)
from fastlb.dataplane.sourceport cimport SourcePool, address_of, be_port_of
from fastlb.dataplane.state cimport MAX_UNRESOLVED, NUMBERS, PipelineState
from fastlb.dataplane.track cimport find_prefetched
from fastlb.dataplane.types cimport (
    CLAMP_TO_PATH, FAMILY_4, FRAGMENT_LATER, GSO_TCP6, GSO_UDP, NO_BACKEND_RESET, NO_HOP, PROTO_TCP, Addr, Backend,
    BackendStats, FlowTuple, Hop, LinkRoute, Packet, Service, ServiceTable, Snapshot)
from fastlb.dataplane.wire cimport IP4_LEN, IP6_LEN, TCP_LEN, TCP_RST, TCP_SYN, same_addr


# --- what fits --------------------------------------------------------------------------------------------------------

cdef inline int make_fit(
        PipelineState *pipe, Packet *p, const Service *service, uint32_t mtu, uint32_t now) noexcept nogil:
    """Decide about a packet that is longer than `mtu`. Returns 0 if it leaves in several frames, else how it ends.

    Its sender learns the MTU by which its packets would pass (RFC 1191, RFC 8201): silence here is a black hole. Where
    the service clamps the MSS such an answer is known to get lost, and not every sender could be told by SYN-ACK.
    """
    if translates(service) and is_last_hop(p):
        return expire(pipe, p, now)                      # what a router looks at first (RFC 1812 section 5.2.1.2)
    if may_be_fragmented(p) or (is_promised(p) and gso_kind(p) == GSO_TCP6):
        return 0 if cut_to(p, mtu) else DROP_OVER_MTU
    if service.mss != 0 and cut_segment(p, mtu):
        return 0
    if p.quoted or not answerable(p):                    # RFC 1122 section 3.2.2: no errors about errors
        return DROP_OVER_MTU
    if not may_tell_too_big(&pipe.answers, pipe.flows.key, p, now):
        return DROP_REJECT_LIMIT
    answer_too_big(p, mtu if p.family == FAMILY_4 else max(mtu, <uint32_t>MIN_MTU6))
    return VIA_TOO_BIG


cdef inline int spend_ttl(PipelineState *pipe, Packet *p, uint32_t now) noexcept nogil:
    """Decrement the TTL as a router does. Returns 0, or how the packet ends instead."""
    if unlikely(is_last_hop(p)):
        return expire(pipe, p, now)
    decrement_ttl(p)
    return 0


cdef inline int expire(PipelineState *pipe, Packet *p, uint32_t now) noexcept nogil:
    """End a packet whose TTL is spent. Its sender is told, so that traceroute finds this hop."""
    if p.quoted or not answerable(p):
        return DROP_TTL_EXPIRED
    if not may_reject(&pipe.answers, now):
        return DROP_REJECT_LIMIT
    answer_time_exceeded(p)
    return VIA_TIME_EXCEEDED


cdef inline void clamp(Packet *p, const Service *service, uint32_t mtu) noexcept nogil:
    """Lower the MSS of a SYN or SYN-ACK as the service says. `mtu` is what reaches its backend."""
    cdef uint32_t headers = TCP_LEN + (IP4_LEN if p.family == FAMILY_4 else IP6_LEN)
    if p.protocol != PROTO_TCP or not p.tcp_flags & TCP_SYN:
        return
    clamp_mss(p, service.mss if service.mss != CLAMP_TO_PATH else min(mtu - headers, <uint32_t>CLAMP_TO_PATH))


cdef inline uint16_t take_numbers(PipelineState *pipe, uint32_t count) noexcept nogil:
    """Return the first of `count` consecutive identifications for outer headers, which tell fragments apart (RFC 6864).

    Each shard has NUMBERS of them, so that no two workers use the same ones towards a backend. They are used again only
    after all others of this worker. A packet in more frames than NUMBERS runs over; links that narrow do not exist.
    """
    cdef uint32_t first = pipe.outer_number + 1
    if unlikely(pipe.outer_number % NUMBERS + count >= NUMBERS):
        first = owned_after(&pipe.flows, pipe.outer_number // NUMBERS) * NUMBERS
    pipe.outer_number = <uint16_t>(first + min(count, <uint32_t>NUMBERS) - 1)
    return <uint16_t>first


cdef inline int wrap(
        PipelineState *pipe, const Snapshot *snap, Packet *p, const Hop *hop, bint split) noexcept nogil:
    """Put the packet into its tunnel. Returns 0 or the drop reason. A GSO packet leaves in segments, whoever cuts it:
    see transmit.pxd.

    `split`: the tunnel's packet, or each one of a GSO packet, will be too long, and leaves in fragments.
    """
    cdef const Backend *backend = &snap.services.backends[p.backend]
    cdef uint16_t number
    if unlikely(split) and p.vnet.gso_type == 0:
        complete_checksum(p)
    if unlikely(not snap.routes.backend_source[p.backend].known):
        return DROP_NO_TUNNEL_SOURCE
    if unlikely(p.vnet.gso_type != 0):
        if p.segment_size == 0:
            p.segment_size = p.vnet.gso_size
        if not is_divisible(p, p.segment_size):
            return DROP_TUNNEL_OFFLOAD
    number = take_numbers(pipe, max_frames(p))
    encapsulate(
        p, &snap.services.services[p.service], backend, &snap.routes.backend_source[p.backend], hop, number)
    if unlikely(split) and not split_outer(
            p, backend.family, hop.mtu, <uint32_t>p.fingerprint << 16 | number):
        return DROP_OVER_MTU
    return 0


# --- to the backend, to the client ------------------------------------------------------------------------------------

cdef inline void translate_for_backend(PipelineState *pipe, Packet *p, const Backend *backend) noexcept nogil:
    """Translate to the backend's address and port; in fullnat also from a source port of ours."""
    if unlikely(has_number(p)):
        renumber(p)
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
    """Rewrite the packet for its backend, or wrap it. Returns `reason`, or how it ends instead."""
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
        split = is_tunnel(service) and is_promised(p) and (p.vnet.gso_type == 0 or p.vnet.gso_type == GSO_UDP)
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
    """Note a client on one of our links whose MAC is missing. The kernel must be asked for it, because fastlb's packets
    do not make it ask."""
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
    """Translate from the VIP's address and port; in fullnat also to the client's."""
    if unlikely(has_number(p)):
        renumber(p)
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
    """Rewrite a reply so that it comes from the VIP. Returns `reason`, or how it ends instead."""
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


# --- back to the sender -----------------------------------------------------------------------------------------------

cdef inline int refuse(
        PipelineState *pipe, const Snapshot *snap, Packet *p, int reason, uint32_t now) noexcept nogil:
    """End a packet for which there is no backend, or none with room: drop it or answer it, as the service says."""
    if snap.services.services[p.service].no_backend != NO_BACKEND_RESET:
        return reason
    return answer(pipe, p, reason, now)


cdef inline int answer(PipelineState *pipe, Packet *p, int reason, uint32_t now) noexcept nogil:
    """Tell the sender that its packet goes nowhere. Returns `reason` if it may not be told."""
    if p.tcp_flags & TCP_RST or not answerable(p):
        return reason
    if not may_reject(&pipe.answers, now):
        return DROP_REJECT_LIMIT
    reject(p)
    return VIA_REJECT


cdef inline int reset_flow(PipelineState *pipe, Packet *p, uint32_t now) noexcept nogil:
    """Tell the client that its flow's backend has left, and forget the flow. Where answers are limited at the moment,
    the entry stays for the flow's next packet."""
    cdef FlowEntry *entry = find_prefetched(pipe, p)
    cdef int reason = answer(pipe, p, DROP_BACKEND_LEFT, now)
    if likely(reason != DROP_REJECT_LIMIT):
        forget(&pipe.flows, p.shard, entry)
    return VIA_RESET if reason == VIA_REJECT else reason


cdef inline int echo(const ServiceTable *services, Packet *p) noexcept nogil:
    """Answer an echo request to a VIP while one of its services has a backend, as monitoring and load balancers in
    front expect."""
    if not services.answers_echo[p.service] or not answerable(p):
        return DROP_NO_BACKEND
    answer_echo(p)
    send_back(p)
    return VIA_ECHO
