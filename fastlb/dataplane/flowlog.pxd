"""Flows that began and ended, on their way from the worker to the log.

A queue with one writer, the worker, and one reader, Python. When it is full, what is new is lost, and counted: packets
do not wait for a log.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastlb.dataplane.machine cimport load_acquire_u32, store_release_u32, unlikely
from fastlb.dataplane.types cimport FlowTuple


cdef struct FlowEvent:
    FlowTuple flow
    uint32_t backend
    uint32_t when            # milliseconds
    uint8_t began
    uint8_t state            # the flow's first, or its last
    uint8_t pad[6]


cdef struct FlowLog:
    FlowEvent *events        # NULL: nothing is logged
    uint32_t size            # a power of two
    uint32_t written
    uint32_t read
    uint64_t lost


cdef inline void log_flow(
        FlowLog *log, const FlowTuple *flow, uint32_t backend, uint32_t state, bint began, uint32_t when,
        ) noexcept nogil:
    cdef FlowEvent *event
    if unlikely(log.written - load_acquire_u32(&log.read) == log.size):
        log.lost += 1
        return
    event = &log.events[log.written & (log.size - 1)]
    event.flow = flow[0]
    event.backend = backend
    event.when = when
    event.began = began
    event.state = <uint8_t>state
    store_release_u32(&log.written, log.written + 1)
