"""What lies in the tables of the data path, as a program sees it that has cimported them: for tests of all kinds."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from ipaddress import IPv4Address, IPv6Address

from cpython.bytes cimport PyBytes_FromStringAndSize

from fastlb._core cimport KetamaRing, Pipeline
from fastlb.dataplane.conntrack cimport FlowEntry, FlowTable, backend_of, state_of
from fastlb.dataplane.inspect cimport entry_at
from fastlb.dataplane.machine cimport bswap16
from fastlb.dataplane.schedule cimport ring_position
from fastlb.dataplane.types cimport FAMILY_4, Addr, FlowTuple, Service
from fastlb.dataplane.wire cimport write_addr6

from fastlb._core import flow_states


def flows(Pipeline pipeline not None):
    """Return every entry, also those that have expired and were not yet swept, as (protocol, client, port, vip, port,
    backend id, state, when it was last seen in ms). No worker may be running."""
    cdef FlowTable *table = &pipeline.state.flows
    cdef const FlowEntry *entry
    cdef const FlowTuple *flow
    cdef uint64_t at
    states = ("none", *flow_states())
    found = []
    for at in range(pipeline.flow_capacity):
        entry = entry_at(table, at)
        if entry.fingerprint != 0:
            flow = &table.tuples[at]
            found.append((
                flow.protocol, address_of(flow.client, flow.family == FAMILY_4), bswap16(flow.be_cport),
                address_of(flow.vip, flow.family == FAMILY_4), bswap16(flow.be_vport), backend_of(entry),
                states[state_of(entry)], entry.seen))
    return found


cdef object address_of(Addr addr, bint four):
    cdef unsigned char packed[16]
    write_addr6(packed, addr)
    if four:
        return IPv4Address(PyBytes_FromStringAndSize(<char *>packed + 12, 4))
    return IPv6Address(PyBytes_FromStringAndSize(<char *>packed, 16))


def ring_points(KetamaRing ring not None):
    """Return (hash, position) of every point, ascending."""
    cdef uint32_t at
    return [(ring.points[at], ring.positions[at]) for at in range(ring.size)]


def position_on_ring(KetamaRing ring not None, uint64_t hashed):
    """Return the position of the backend to which the data path sends a flow with this hash."""
    cdef Service service
    memset(&service, 0, sizeof(Service))
    service.ring_points, service.ring, service.ring_index = ring.points, ring.positions, ring.index
    service.ring_size, service.ring_shift = ring.size, ring.shift
    return ring_position(&service, hashed, 0)
