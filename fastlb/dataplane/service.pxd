"""Which packets are ours: client packets to a VIP, and replies of nat and fullnat backends.

The eBPF programs of classifier.py ask the same questions in the same order over maps with the same keys.
"""

from libc.stdint cimport uint32_t, uint64_t

from fastlb.dataplane.conntrack cimport FlowTable
from fastlb.dataplane.flowhash cimport SHARDS, client_mix, fingerprint, shard_of
from fastlb.dataplane.lookup cimport MISSING, find, key_meta
from fastlb.dataplane.machine cimport likely, prefetch, unlikely
from fastlb.dataplane.sourceport cimport find_port, port_of
from fastlb.dataplane.types cimport (
    FAMILY_6, FORWARD_NAT, LEG_CLIENT, LEG_ECHO, LEG_NONE, LEG_REPLY, Packet, ServiceTable, Table)


cdef inline uint32_t find_service(const ServiceTable *services, const Packet *p) noexcept nogil:
    """The exact port first, then the service for any port."""
    cdef uint32_t found = find(&services.vips, p.dst, key_meta(p.family, p.protocol, p.be_dport))
    if likely(found != MISSING):
        return found
    return find(&services.vips, p.dst, key_meta(p.family, p.protocol, 0))


cdef inline uint32_t find_answering(const Table *backends, const Packet *p) noexcept nogil:
    """What `backends` says of the address and port that a packet came from."""
    cdef uint32_t found = find(backends, p.src, key_meta(p.family, p.protocol, p.be_sport))
    if likely(found != MISSING):
        return found
    return find(backends, p.src, key_meta(p.family, p.protocol, 0))


cdef inline bint is_full_reply(const ServiceTable *services, const FlowTable *flows, Packet *p) noexcept nogil:
    """From a fullnat backend to a source port? Whose, is seen when the port's memory has come (`approach`)."""
    p.source = find_port(&flows.pools[p.family == FAMILY_6], p.dst, p.be_dport, p.protocol, p.family)
    if p.source == 0 or find_answering(&services.full_replies, p) == MISSING:
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
    if unlikely(p.protocol == 0):
        p.service = find(&services.vips, p.dst, key_meta(p.family, 0, 0))
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
    if is_full_reply(services, flows, p):
        p.leg = LEG_REPLY
        return
    p.source = 0
    p.backend = find_answering(&services.replies, p)
    if p.backend == MISSING:
        p.leg = LEG_NONE
        return
    p.leg = LEG_REPLY
    p.shard = shard_of(p.dst, p.be_dport)
    p.fingerprint = client_mix(flows.key, p.dst, p.be_dport, p.protocol, p.family)
