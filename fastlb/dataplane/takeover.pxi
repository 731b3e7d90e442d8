# The Python face of takeover.pxd: how a flow table lies in a file.

cdef tuple STATE_NAMES = (
    "none", "syn", "syn-ack", "picked-up", "udp-new", "established", "fin-client", "fin-backend", "udp", "closing",
    "reset")
assert len(STATE_NAMES) == FLOW_STATES


def flow_layout(uint64_t flows):
    """Describe how a table for so many flows lies in memory. Two processes that agree on it can use the same memory.

    ``buckets``, ``tuples``: bytes of the hot and the cold part, in whole large pages; the rest says what is in them.
    The key "owner" has the name that files of former versions have for `packed`.
    """
    cdef FlowEntry entry
    cdef FlowTuple flow
    cdef char *e = <char *>&entry
    cdef char *f = <char *>&flow
    per_shard = buckets_per_shard(flows)
    return {
        "shards": <int>SHARDS,
        "buckets_per_shard": per_shard,
        "buckets": whole_pages(<size_t>per_shard * SHARDS * sizeof(Bucket)),
        "tuples": whole_pages(<size_t>per_shard * SHARDS * ENTRIES * sizeof(FlowTuple)),
        "entry": {
            "fingerprint": <char *>&entry.fingerprint - e, "owner": <char *>&entry.packed - e,
            "seen": <char *>&entry.seen - e, "": sizeof(FlowEntry)},
        "owner": {"backend": <int>BACKEND_BITS, "check": <int>CHECK_BITS},
        "tuple": {
            "client": <char *>&flow.client - f, "vip": <char *>&flow.vip - f, "be_cport": <char *>&flow.be_cport - f,
            "be_vport": <char *>&flow.be_vport - f, "protocol": <char *>&flow.protocol - f,
            "family": <char *>&flow.family - f, "began": <char *>&flow.began - f, "source": <char *>&flow.source - f,
            "since": <char *>&flow.since - f, "": sizeof(FlowTuple)},
        "states": list(STATE_NAMES),
    }


cdef uint32_t buckets_per_shard(uint64_t flows) except 0:
    if not 0 < flows <= 1 << 30:
        raise ValueError(f"a flow table takes 1..{1 << 30} flows, not {flows}")
    return <uint32_t>((flows + SHARDS * 3 - 1) // (SHARDS * 3))
