"""What one worker writes while it runs batches: its flow table, its fragments, its schedulers and its counters."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.admission cimport FlowBudget
from fastlb.dataplane.affinity cimport AffinityTable
from fastlb.dataplane.conntrack cimport FlowTable
from fastlb.dataplane.flowhash cimport SHARDS
from fastlb.dataplane.fragment cimport FragmentState
from fastlb.dataplane.icmp cimport AnswerBudgets
from fastlb.dataplane.reasons cimport REASONS
from fastlb.dataplane.schedule cimport SchedulerState
from fastlb.dataplane.types cimport Addr


cdef enum:
    MAX_UNRESOLVED = 64      # clients on a link, without a MAC, that wait to be asked for
    MAX_SERVICES = 1 << 16   # slots of counters
    NUMBERS = (1 << 16) // SHARDS  # identifications of outer headers that a shard has


cdef struct Unresolved:
    Addr addr
    uint32_t ifindex
    uint8_t family


cdef struct ReasonCounts:
    # One service's counters; the two reasons of most packets, conntrack and scheduled, are not counted.
    uint64_t by_reason[REASONS]


cdef struct PipelineState:
    FlowTable flows
    FragmentState fragments
    uint64_t reasons[REASONS]
    uint64_t packets
    uint64_t bytes
    uint64_t forwarded
    uint64_t forwarded_bytes
    SchedulerState schedulers
    AffinityTable affinity
    uint64_t now_us          # of this batch, for response times
    uint16_t outer_number    # of the last outer header: see `take_numbers`
    Unresolved unresolved[MAX_UNRESOLVED]
    uint32_t unresolved_count      # set back to 0 by Python, which asks the kernel to resolve them
    FlowBudget budget
    AnswerBudgets answers
    uint64_t *limits         # of sources (admission.pxd); everybody's
    ReasonCounts *by_service  # by slot
