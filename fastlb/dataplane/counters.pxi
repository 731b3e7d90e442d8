# What is counted: one row a counter with name, type, unit and help, for documentation, status and metrics.
#
# Each group has the keys of one method. A new counter is a row here and a key there; a test holds the two together, and
# docs/counters.md against both. Reasons have rows of their own (reasons.h).

cdef tuple PIPELINE_COUNTERS = (  # `Pipeline.counters`, beside the reasons
    ("packets", "counter", "packets", "taken from the rings"),
    ("bytes", "counter", "bytes", "taken from the rings"),
    ("forwarded", "counter", "packets", "that the data path decided to send"),
    ("forwarded_bytes", "counter", "bytes", "that the data path decided to send"),
    ("flows_evicted", "counter", "flows", "half-open, given up for newer ones in a full table"),
    ("flows_untracked", "counter", "flows", "without an entry, because only established ones stood in its place"),
    ("flows_expired", "counter", "flows", "forgotten after their timeout"),
    ("flow_log_lost", "counter", "lines", "missing in the flow log, which could not keep up"),
    ("affine", "counter", "flows", "new ones that went where their client's last one had gone"),
)
cdef tuple WORKER_COUNTERS = (  # `Worker.counters`
    ("transmitted", "counter", "packets", "that the kernel accepted for sending"),
    ("transmitted_bytes", "counter", "bytes", "that the kernel accepted, those lost with an AF_XDP socket included"),
    ("transmitted_xdp", "counter", "packets", "of those transmitted, by AF_XDP; the rest left by sendmmsg"),
    ("tunnels_offloaded", "counter", "packets", "GSO packets in tunnels that the kernel or the device cuts"),
    ("blocks_read", "counter", "blocks", "of the rings, read"),
    ("read_early", "counter", "packets", "taken from blocks that the kernel was still filling"),
    ("sleeps", "counter", "sleeps", "of workers that found nothing for as long as they spin"),
    ("ring_packets", "counter", "packets", "that passed the filter, as the kernel counts them"),
    ("ring_drops", "counter", "packets", "lost because a ring was full"),
    ("ring_freezes", "counter", "times", "that a ring was full"),
)
cdef tuple EVENTS = (  # `Pipeline.service_events`
    ("affine", "counter", "flows", "new ones that went where their client's last one had gone"),
    ("affine_moved", "counter", "flows", "new ones that could not, so that their client was placed anew"),
    ("load_moved", "counter", "flows", "new ones that the scheduler's first choice had no room for"),
    ("conflict_moved", "counter", "flows", "nat: new ones whose backend already talks to the client's port"),
    ("flows_evicted", "counter", "flows", "half-open, given up for newer ones of any service"),
    ("flows_untracked", "counter", "flows", "without an entry, because no other gave way"),
)
cdef tuple BACKEND_COUNTERS = (  # `Pipeline.backend_stats`
    ("packets", "counter", "packets", "from clients to the backend"),
    ("bytes", "counter", "bytes", "from clients to the backend"),
    ("reply_packets", "counter", "packets", "from the backend to clients, in nat and fullnat"),
    ("reply_bytes", "counter", "bytes", "from the backend to clients, in nat and fullnat"),
    ("new_flows", "counter", "flows", "that got an entry with the backend"),
    ("answered_flows", "counter", "flows", "of TCP that the backend answered; one-way: that went on after the SYN"),
    ("active_flows", "gauge", "flows", "that are not over: those that schedulers and max_flows go by"),
)
cdef tuple DECAP_COUNTERS = (  # `Decapsulator.counters`, beside its drops
    ("packets", "counter", "packets", "out of the ring's frames, each decapsulated or dropped"),
    ("decapsulated", "counter", "packets", "written to the TUN device"),
    ("merged", "counter", "packets", "of those decapsulated, that left in GSO packets"),
    ("writes", "counter", "writes", "to the TUN device"),
    ("blocks", "counter", "blocks", "of the ring, read"),
)


def counter_descriptions():
    """Return (name, type, unit, help) of every counter by group: pipeline, worker, events, backend, decap.

    Types are counter and gauge. The help goes on where the unit ends: "packets", "taken from the rings".
    """
    return {
        "pipeline": PIPELINE_COUNTERS, "worker": WORKER_COUNTERS, "events": EVENTS, "backend": BACKEND_COUNTERS,
        "decap": DECAP_COUNTERS}
