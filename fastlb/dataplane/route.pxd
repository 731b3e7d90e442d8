"""Next hops: fixed for backends, by longest prefix match for clients."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastlb.dataplane.hostroutes cimport NO_WAY, way_to_address
from fastlb.dataplane.lookup cimport MISSING, find
from fastlb.dataplane.machine cimport bswap64
from fastlb.dataplane.reasons cimport DROP_NO_NEIGHBOUR, DROP_NO_ROUTE
from fastlb.dataplane.types cimport FAMILY_4, NO_HOP, Addr, Hop, LinkRoute, RouteTable


cdef inline uint64_t neighbour_meta(uint8_t family, uint32_t ifindex) noexcept nogil:
    return <uint64_t>family << 24 | <uint64_t>ifindex << 32


cdef inline uint64_t top_bits(uint32_t length) noexcept nogil:
    """Return a mask of the first `length` of 64 bits, in network order."""
    return 0 if length == 0 else bswap64(<uint64_t>0xFFFFFFFFFFFFFFFFULL << (64 - length))


cdef inline Addr mask_addr(Addr addr, uint8_t family, uint32_t length) noexcept nogil:
    if family == FAMILY_4:
        addr.lo &= top_bits(length) << 32
    elif length <= 64:
        addr.hi &= top_bits(length)
        addr.lo = 0
    else:
        addr.lo &= top_bits(length - 64)
    return addr


cdef inline const LinkRoute *find_route(const RouteTable *routes, Addr addr, uint8_t family) noexcept nogil:
    """Return the route to an address, of the longest prefix; NULL without one."""
    cdef uint32_t way = way_to_address(routes.ways4, routes.ways6, addr, family)
    return NULL if way == NO_WAY else &routes.routes[way]


cdef inline int hop_to_address(
        const RouteTable *routes, Addr addr, uint8_t family, const Hop **hop) noexcept nogil:
    """Find the next hop towards a client. Returns 0, or the drop reason."""
    cdef const LinkRoute *route = find_route(routes, addr, family)
    cdef uint32_t index
    if route == NULL:
        return DROP_NO_ROUTE
    index = route.hop
    if index == NO_HOP:
        index = find(&routes.neighbours, addr, neighbour_meta(family, route.ifindex))
        if index == MISSING:
            return DROP_NO_NEIGHBOUR
    hop[0] = &routes.hops[index]
    return hop[0].fault


cdef inline int hop_to_backend(const RouteTable *routes, uint32_t backend, const Hop **hop) noexcept nogil:
    """Find the next hop towards a backend. Returns 0, or the drop reason."""
    if backend >= routes.backend_limit:
        return DROP_NO_ROUTE
    hop[0] = &routes.hops[routes.backend_hop[backend]]
    return hop[0].fault
