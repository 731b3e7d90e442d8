"""How a configuration reaches a worker, and when the old one may go.

One writer publishes; each reader picks the current snapshot up once per batch and says which generation it now uses.
A snapshot is freed when every reader has said a later generation: nobody can still hold it, because a reader only
moves forward.
"""

from libc.stdint cimport uint64_t

from fastlb.dataplane.machine cimport load_acquire_ptr, load_acquire_u64, store_release_ptr, store_release_u64
from fastlb.dataplane.types cimport Snapshot


cdef struct Publication:
    void *current            # Snapshot *
    uint64_t reader_generation  # the generation that the reader uses now


cdef inline const Snapshot *pick_up(Publication *publication) noexcept nogil:
    """Return the snapshot for the next batch. Call it between batches only: no pointer into an older one is left."""
    cdef const Snapshot *snap = <const Snapshot *>load_acquire_ptr(&publication.current)
    store_release_u64(&publication.reader_generation, snap.generation)
    return snap


cdef inline void publish(Publication *publication, Snapshot *snap) noexcept nogil:
    store_release_ptr(&publication.current, snap)


cdef inline uint64_t reader_generation(Publication *publication) noexcept nogil:
    return load_acquire_u64(&publication.reader_generation)
