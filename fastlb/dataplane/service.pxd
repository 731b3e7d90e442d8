"""Which packets are ours: client packets to a VIP, and replies of nat and fullnat backends.

The eBPF programs (kernel/ebpf/classification.py) ask the same questions in the same order over maps with the same keys.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport FlowTable
from fastlb.dataplane.flowhash cimport SHARDS, client_mix, fingerprint, shard_of
from fastlb.dataplane.lookup cimport MISSING, find, key_meta
from fastlb.dataplane.machine cimport likely, prefetch, unlikely
from fastlb.dataplane.sourceport cimport find_port, port_of, position_of
from fastlb.dataplane.types cimport (
    FAMILY_6, FORWARD_NAT, FRAGMENT_LATER, LEG_CLIENT, LEG_ECHO, LEG_NONE, LEG_REPLY, Addr, Mask, MaskList, Packet,
    ServiceTable, Table)


cdef inline uint32_t find_masked(
        const Table *table, const MaskList *masks, const Packet *p, Addr addr, uint16_t be_port) noexcept nogil:
    """Return the most specific entry for an address and port: that of the whole address and port first, then by the
    masks (model/match.py). Bounded by the masks."""
    cdef uint32_t found = find(table, addr, key_meta(p.family, p.asked, be_port))
    cdef const Mask *mask
    cdef Addr masked
    cdef uint32_t i
    if likely(found != MISSING):
        return found
    for i in range(masks.count):
        mask = &masks.masks[i]
        masked.hi = addr.hi & mask.addr.hi
        masked.lo = addr.lo & mask.addr.lo
        found = find(table, masked, key_meta(p.family, p.asked, be_port & mask.be_port) | mask.meta)
        if found != MISSING:
            return found
    return MISSING


cdef inline uint32_t find_service(const ServiceTable *services, const Packet *p) noexcept nogil:
    return find_masked(&services.vips, &services.vip_masks[p.family == FAMILY_6], p, p.dst, p.be_dport)


cdef inline uint32_t find_answering(
        const ServiceTable *services, const Table *backends, const Packet *p) noexcept nogil:
    """Return what `backends` says of the address and port that a packet came from."""
    return find_masked(backends, &services.reply_masks[p.family == FAMILY_6], p, p.src, p.be_sport)


cdef inline bint is_fullnat_reply(const ServiceTable *services, const FlowTable *flows, Packet *p) noexcept nogil:
    """True for a packet from a fullnat backend to a source port. Which flow has that port is seen when its memory has
    come (`prefetch_rest`)."""
    if unlikely(p.fragment == FRAGMENT_LATER):
        return (position_of(&flows.pools[p.family == FAMILY_6], p.dst, p.family) != MISSING
                and find_answering(services, &services.fullnat_replies, p) != MISSING)
    p.source = find_port(&flows.pools[p.family == FAMILY_6], p.dst, p.be_dport, p.protocol, p.family)
    if p.source == 0 or find_answering(services, &services.fullnat_replies, p) == MISSING:
        return False
    p.shard = port_of(p.source - 1) % SHARDS
    prefetch(&flows.pools[p.family == FAMILY_6].ports[p.source - 1])
    return True


cdef inline void classify(const ServiceTable *services, const FlowTable *flows, Packet *p) noexcept nogil:
    """Set the packet's leg; for ours also its service (or first backend, or source port), shard and fingerprint."""
    cdef uint64_t client
    p.backend = 0
    p.source = 0
    p.entry = NULL
    p.placement = 0
    if unlikely(p.protocol == 0):
        p.service = find_service(services, p)
        p.leg = LEG_ECHO if p.service != MISSING else LEG_NONE
        return
    p.service = find_service(services, p)
    if likely(p.service != MISSING):
        p.leg = LEG_CLIENT
        client = client_mix(flows.key, p.src, p.be_sport, p.protocol, p.family)
        p.shard = shard_of(p.src, p.be_sport)
        p.fingerprint = fingerprint(
            flows.key, client, p.dst, p.be_dport, services.services[p.service].forward == FORWARD_NAT)
        return
    if is_fullnat_reply(services, flows, p):
        p.leg = LEG_REPLY
        return
    p.source = 0
    p.backend = find_answering(services, &services.replies, p)
    if p.backend == MISSING:
        p.leg = LEG_NONE
        return
    p.leg = LEG_REPLY
    p.shard = shard_of(p.dst, p.be_dport)
    p.fingerprint = client_mix(flows.key, p.dst, p.be_dport, p.protocol, p.family)
