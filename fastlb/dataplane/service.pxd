"""Which packets are ours: client packets to a VIP, and replies of nat backends.

The eBPF programs of classifier.py ask the same questions in the same order over maps with the same keys.
"""

from libc.stdint cimport uint32_t, uint64_t

from fastlb.dataplane.flowhash cimport client_mix, fingerprint, shard_of
from fastlb.dataplane.lookup cimport MISSING, find, key_meta
from fastlb.dataplane.machine cimport likely, unlikely
from fastlb.dataplane.types cimport (
    FORWARD_NAT, LEG_CLIENT, LEG_ECHO, LEG_NONE, LEG_REPLY, Packet, ServiceTable)


cdef inline uint32_t find_service(const ServiceTable *services, const Packet *p) noexcept nogil:
    """The exact port first, then the service for any port."""
    cdef uint32_t found = find(&services.vips, p.dst, key_meta(p.family, p.protocol, p.be_dport))
    if likely(found != MISSING):
        return found
    return find(&services.vips, p.dst, key_meta(p.family, p.protocol, 0))


cdef inline uint32_t find_reply_source(const ServiceTable *services, const Packet *p) noexcept nogil:
    """The first backend id that answers from this address and port."""
    cdef uint32_t found = find(&services.replies, p.src, key_meta(p.family, p.protocol, p.be_sport))
    if likely(found != MISSING):
        return found
    return find(&services.replies, p.src, key_meta(p.family, p.protocol, 0))


cdef inline void classify(const ServiceTable *services, const uint64_t *key, Packet *p) noexcept nogil:
    """Set the packet's leg; for ours also its service (or first backend), shard and fingerprint."""
    cdef uint64_t client
    p.backend = 0
    if unlikely(p.protocol == 0):
        p.service = find(&services.vips, p.dst, key_meta(p.family, 0, 0))
        p.leg = LEG_ECHO if p.service != MISSING else LEG_NONE
        return
    p.service = find_service(services, p)
    if likely(p.service != MISSING):
        p.leg = LEG_CLIENT
        client = client_mix(key, p.src, p.be_sport, p.protocol, p.family)
        p.shard = shard_of(p.src, p.be_sport)
        p.fingerprint = fingerprint(
            key, client, p.dst, p.be_dport, services.services[p.service].forward == FORWARD_NAT)
        return
    p.backend = find_reply_source(services, p)
    if p.backend == MISSING:
        p.leg = LEG_NONE
        return
    p.leg = LEG_REPLY
    p.shard = shard_of(p.dst, p.be_dport)
    p.fingerprint = client_mix(key, p.dst, p.be_dport, p.protocol, p.family)
