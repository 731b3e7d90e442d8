"""Why a packet ended as it did. Every packet gets exactly one reason, and every reason is one counter.

The rows are in reasons.h: name, verdict and help of each. Here are their numbers, in the same order: first the paths by
which a packet is forwarded, then the reasons for which it is left to the host (PASS), then the named drops. At the end
are those of decapsulation, which has counters of its own.
"""


cdef extern from "reasons.h" nogil:
    cdef enum Verdict "fastlb_verdict":
        VERDICT_FORWARD
        VERDICT_PASS
        VERDICT_DROP

    cdef enum Reason "fastlb_reason":
        # forwarded
        VIA_CONNTRACK
        VIA_SCHEDULER
        VIA_OVERLOAD
        VIA_MAGLEV
        VIA_FRAGMENT
        VIA_ICMP
        VIA_ECHO
        VIA_TOO_BIG
        VIA_TIME_EXCEEDED
        VIA_RESET
        VIA_REJECT
        # to be forwarded, and not yet
        VIA_HELD
        # left to the host: nothing of ours, or not enough of a packet to tell
        PASS_NOT_IP
        PASS_IP_HEADER
        PASS_FRAGMENT
        PASS_NOT_TCP_UDP
        PASS_EXTENSION_HEADERS
        PASS_ICMP_QUOTE
        PASS_TRUNCATED
        PASS_NO_SERVICE
        # dropped: malformed
        DROP_IP_LENGTH
        DROP_ROUTING_HEADER
        DROP_TCP_HEADER
        DROP_TCP_FLAGS
        DROP_UDP_LENGTH
        DROP_ICMP_HEADER
        DROP_FRAGMENT_SHAPE
        DROP_FRAGMENT_OVERLAP
        # dropped: not let in
        DROP_DENIED
        DROP_SOURCE_LIMIT
        DROP_NEW_FLOW_RATE
        # dropped: nowhere to go
        DROP_NO_BACKEND
        DROP_BACKENDS_FULL
        DROP_NO_ROUTE
        DROP_NO_NEIGHBOUR
        DROP_NOT_ON_LINK
        DROP_TTL_EXPIRED
        DROP_OVER_MTU
        DROP_NO_TUNNEL_SOURCE
        DROP_TUNNEL_OFFLOAD
        DROP_REPLY_UNKNOWN
        DROP_ICMP_UNKNOWN
        DROP_FRAGMENT_UNKNOWN
        DROP_FRAGMENT_LIMIT
        DROP_NAT_CONFLICT
        DROP_NO_SOURCE_PORT
        DROP_FLOW_TABLE_FULL
        DROP_FLOW_UNKNOWN
        DROP_BACKEND_LEFT
        DROP_REJECT_LIMIT
        # dropped: by the ring, before or after the pipeline
        DROP_WRONG_WORKER
        DROP_RING_HOLE
        DROP_RING_CLAMPED
        DROP_TX_FULL
        DROP_TX_TOO_BIG
        DROP_TX_LINK_DOWN
        DROP_TX_ERROR
        REASONS              # how many there are

    cdef struct ReasonRow "fastlb_reason_row":
        const char *name     # of its counter; also ``Result.reason``
        Verdict verdict
        const char *help

    const ReasonRow REASON_ROWS "fastlb_reason_rows"[]

    cdef enum DecapReason "fastlb_decap_reason":
        DECAPSULATED
        DECAP_NOT_TUNNEL
        DECAP_OUTER_HEADER
        DECAP_OUTER_FRAGMENT
        DECAP_OUTER_CHECKSUM
        DECAP_GRE_HEADER
        DECAP_GRE_KEY
        DECAP_GRE_PROTOCOL
        DECAP_UDP_LENGTH
        DECAP_GUE_HEADER
        DECAP_GUE_CONTROL
        DECAP_GUE_PROTOCOL
        DECAP_INNER_HEADER
        DECAP_INNER_TRUNCATED
        DECAP_NESTED
        DECAP_ECN
        DECAP_OFFLOAD
        DECAP_RING_HOLE
        DECAP_RING_CLAMPED
        DECAP_TUN_REFUSED
        DECAP_REASONS

    const ReasonRow DECAP_REASON_ROWS "fastlb_decap_reason_rows"[]


cdef inline const char *reason_name(int reason) noexcept nogil:
    return REASON_ROWS[reason].name


cdef inline int verdict_of(int reason) noexcept nogil:
    return REASON_ROWS[reason].verdict
