"""Which backend a flow without an entry gets."""

from libc.stdint cimport uint32_t, uint64_t

from fastlb.dataplane.flowhash cimport flow_hash
from fastlb.dataplane.types cimport Packet, Service, ServiceTable


cdef inline uint32_t maglev_backend(const Service *service, uint64_t hashed, uint32_t offset) noexcept nogil:
    """The backend id in slot hash mod M, or `offset` slots further; 0 when the service has no backend."""
    if service.maglev == NULL:
        return 0
    return service.members[service.maglev[(hashed + offset) % service.maglev_size]]


cdef inline uint64_t hash_of_flow(const ServiceTable *services, const Packet *p) noexcept nogil:
    """Of a client-leg packet: what a fleet agrees on."""
    return flow_hash(p.src, p.be_sport, p.dst, p.be_dport, p.protocol, p.family, services.hash_seed)
