"""The extension's classes, for other extensions: `cimport fastlb._core` reaches the pipeline itself."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.affinity cimport AffinityTable
from fastlb.dataplane.conntrack cimport FlowTable
from fastlb.dataplane.decap cimport Decap
from fastlb.dataplane.flowlog cimport FlowLog
from fastlb.dataplane.fragment cimport FragmentNote
from fastlb.dataplane.hostroutes cimport KEY_ROOM, Enclosing, ParsedRoute
from fastlb.dataplane.inspect cimport FlowFilter
from fastlb.dataplane.publish cimport Publication
from fastlb.dataplane.ring cimport RxRing
from fastlb.dataplane.sourceport cimport SourcePool
from fastlb.dataplane.state cimport PipelineState
from fastlb.dataplane.types cimport (
    BATCH, Affinity, Backend, BackendStats, Candidate, Hop, Intervals, MaskList, Packet, RouteTable, Service,
    ServiceTable, Snapshot, StickyBackend, Taker)
from fastlb.dataplane.worker cimport WorkerState
from fastlb.dataplane.xsk cimport Xsk


cdef class MaglevTable:
    cdef uint16_t *slots
    cdef readonly uint32_t size
    cdef object __weakref__


cdef class KetamaRing:
    cdef uint64_t *points
    cdef uint16_t *positions
    cdef uint32_t *index
    cdef uint8_t shift
    cdef readonly uint32_t size
    cdef object __weakref__

    cdef void put(self, const uint64_t *hashes, uint32_t count, uint16_t position) noexcept nogil
    cdef void sort(self) noexcept nogil


cdef class SmoothWrr:
    cdef uint16_t *positions
    cdef readonly uint32_t size
    cdef object __weakref__


cdef class Choices:
    cdef uint32_t count
    cdef Candidate *everyone          # by position among the members; weight 0: takes no new flow
    cdef Candidate *candidates        # those with a weight, in the same order
    cdef uint32_t *candidate_of       # by position, the place among the candidates
    cdef uint32_t candidate_count
    cdef uint64_t weight              # of all candidates
    cdef bint capped                  # a member may have only so many flows
    cdef StickyBackend *sticky_backends
    cdef uint32_t sticky_limit
    cdef Taker *takers                # of all sticky backends
    cdef tuple tables                 # keeps their memory alive

    cdef int set_candidate(self, Candidate *candidate, scheduler, member) except -1
    cdef void gather(self) noexcept nogil
    cdef int stick(self, Choices before, dict found, spec) except -1
    cdef int set_takers(self, uint32_t number, uint32_t at, scheduler, list takers, bint pinned) except -1
    cdef int copy_takers(self, Choices before, bytes replaced, uint32_t at) except -1


cdef class Services:
    cdef ServiceTable table
    cdef uint32_t *members
    cdef Affinity *affinities         # by service
    cdef list choices                 # by service
    cdef Services origin              # from which it has tables, lists and members; None: they are its own
    cdef bint is_changed              # it has an origin: the garbage collector takes that away before the end
    cdef list echoes_of               # by service, the numbers of the VIPs that answer echo requests for it
    cdef list servers_of              # by that number, the services

    cdef int allocate(self, list specs) except -1
    cdef int copy_arrays(self, Services other) except -1
    cdef int add_echo(self, list specs) except -1
    cdef int answer_echoes(self, uint32_t index) except -1
    cdef list set_timeouts(self, list wanted)
    cdef int add_service(self, uint32_t index, spec, const uint32_t *members) except -1
    cdef int set_masks(self, list specs) except -1
    cdef int set_mask_list(self, MaskList *listed, version, wanted) except -1
    cdef int add_reply(self, const Service *service, Backend *backend, uint32_t number, uint64_t meta) except -1
    cdef int set_tunnel(self, Service *service, tunnel) except -1
    cdef int choose(self, uint32_t index, spec, Choices choices) except -1
    cdef int add_affinity(self, uint32_t index, spec) except -1
    cdef int add_backend(self, uint32_t index, spec, member, uint16_t timeouts) except -1
    cdef void free_shared(self) noexcept


cdef class Prefixes:
    cdef uint64_t *hi
    cdef uint64_t *lo                 # NULL: all are 0
    cdef uint32_t *meta               # prefix length, number of the attributes
    cdef uint64_t count
    cdef uint64_t room

    cdef int reserve(self, uint64_t room) except -1
    cdef int need_lo(self) except -1
    cdef int append(self, uint64_t hi, uint64_t lo, uint32_t meta) except -1
    cdef uint64_t lo_of(self, uint64_t at) noexcept nogil
    cdef uint64_t place(self, uint64_t hi, uint64_t lo, uint32_t length, bint behind, uint64_t end) noexcept nogil
    cdef void settle_last(self) noexcept nogil
    cdef bint is_ahead(self, uint64_t at, uint64_t hi, uint64_t lo, uint32_t meta) noexcept nogil
    cdef int copy(self, Prefixes other, uint64_t begin, uint64_t end) except -1
    cdef Prefixes changed(self, list changes)
    cdef list numbers(self, uint64_t hi, uint64_t lo, uint32_t length)


cdef class HostRoutes:
    cdef Prefixes prefixes4
    cdef Prefixes prefixes6
    cdef uint64_t *rank               # by number of the attributes; the least is the best
    cdef uint32_t *way
    cdef uint32_t number_count
    cdef Intervals intervals4
    cdef Intervals intervals6
    cdef readonly list ways
    cdef frozenset used               # (index, way) of those that any address has
    cdef object make

    cdef int finish(self, make, list ways, list choices) except -1
    cdef void divide(self, Prefixes prefixes, Intervals *table) noexcept nogil
    cdef void end_prefix(self, Intervals *table, const Enclosing *stack, uint32_t depth) noexcept nogil
    cdef uint32_t best(self, Prefixes prefixes, uint64_t *at) noexcept nogil
    cdef int note_used(self) except -1
    cdef object made(self, version, uint64_t at, Prefixes prefixes, uint32_t way)


cdef class RouteStore:
    cdef Prefixes prefixes4
    cdef Prefixes prefixes6
    cdef dict changes4                # since the last `table`: (hi, lo, length) -> numbers
    cdef dict changes6
    cdef dict numbers                 # by attributes
    cdef readonly list described      # by number
    cdef object describe
    cdef ParsedRoute route            # that was parsed last
    cdef uint8_t last_key[KEY_ROOM]   # the attributes that were numbered last
    cdef uint32_t last_length
    cdef uint32_t last_number

    cdef uint32_t number(self, const uint8_t *message, uint32_t size) except? 0xFFFFFFFF
    cdef int add(self, Prefixes prefixes, uint32_t number) except -1
    cdef list removed(self, list known, uint32_t number)
    cdef list added(self, list known, uint32_t number, uint16_t flags)


cdef class Routes:
    cdef RouteTable table
    cdef HostRoutes host              # keeps its intervals alive

    cdef int allocate(self, size_t hops, size_t ways, size_t neighbours, uint32_t backend_limit) except -1
    cdef int set_hop(self, Hop *hop, tuple described) except -1
    cdef int set_source(self, uint32_t backend, network) except -1


cdef class PublishedSnapshot:
    cdef Snapshot value
    cdef Services services
    cdef Routes routes


cdef class FlowMemory:
    cdef FlowTable table              # without an owner
    cdef FragmentNote *notes
    cdef uint64_t *limits             # of sources
    cdef size_t hot_bytes
    cdef size_t cold_bytes
    cdef bint taken_over              # a pipeline finds flows that it has not counted
    cdef FlowLog ended                # those that `take_over` did not keep
    cdef readonly bint large_pages    # back the file, if there is one

    cdef int map_entries(self, file) except -1
    cdef int open_pool(self, SourcePool *pool, list addresses, int lowest, int highest) except -1
    cdef int close_pool(self, SourcePool *pool) except -1
    cdef BackendStats *add_row(self) except NULL


cdef class AffinityMemory:
    cdef AffinityTable table          # without a worker's part


cdef class Pipeline:
    cdef PipelineState state
    cdef FlowMemory memory_of_flows
    cdef AffinityMemory memory_of_affinity
    cdef Publication publication
    cdef list snapshots               # published and not yet passed, oldest first
    cdef uint64_t generation          # of the snapshot published last
    cdef readonly uint32_t now_ms     # of the last `process`
    cdef uint8_t *scratch[BATCH]      # a frame each, for `process`
    cdef Packet packets[BATCH]
    cdef readonly bint running        # a worker reads the publication
    cdef readonly uint64_t flow_capacity

    cdef int own(self, shards) except -1
    cdef int load(self, int at, frame, uint32_t ifindex) except -1
    cdef int run(self, const Snapshot *snap, int count, uint32_t now_ms, list results) except -1
    cdef uint32_t clock(self) noexcept
    cdef int settle(self, const Snapshot *snap, uint32_t now_ms, list results) except -1


cdef class FlowWalk:
    cdef Pipeline pipeline
    cdef Services services            # of the snapshot at the beginning
    cdef FlowFilter filter
    cdef bytes wanted                 # the filter's backends

    cdef int want_backends(self, backends) except -1
    cdef int want_states(self, states) except -1
    cdef uint64_t end_of(self, uint64_t start, uint64_t entries) noexcept


cdef class RingMemory:
    cdef uint8_t *base
    cdef size_t size
    cdef size_t ring_size
    cdef size_t used
    cdef readonly uint32_t block_size
    cdef readonly uint32_t blocks

    cdef int map_ring(self, RxRing *ring, bint open_blocks) except -1


cdef class Ring:
    cdef RxRing ring
    cdef RingMemory memory
    cdef object socket
    cdef readonly str interface
    cdef dict totals


cdef class Worker:
    cdef WorkerState state
    cdef Pipeline pipeline
    cdef list rings
    cdef RingMemory memory
    cdef object socket
    cdef object bell                  # an eventfd that ends a sleep
    cdef Py_buffer asleep
    cdef readonly bint stopped

    cdef int listen_to(self, list rings, list bells, asleep) except -1
    cdef int open_in(self, Xsk *xsk, uint32_t ifindex, uint32_t queue) except -1
    cdef const Xsk *any_xsk(self) noexcept
    cdef Xsk *slot_of(self, uint32_t ifindex) noexcept


cdef class Decapsulator:
    cdef Decap state
    cdef Ring ring                    # while, and after, it is read
    cdef int bell                     # an eventfd that ends a sleep
