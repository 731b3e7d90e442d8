"""Why a packet ended as it did. Every packet gets exactly one reason, and every reason is one counter.

The verdict follows from the reason: first the paths by which a packet is forwarded, then the reasons for which
it is left to the host (PASS), then the named drops.
"""


cdef enum Verdict:
    VERDICT_FORWARD = 0
    VERDICT_PASS = 1
    VERDICT_DROP = 2


cdef enum Reason:
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
    REASONS


cdef inline const char *reason_name(int reason) noexcept nogil:
    """The counter's name in statistics; also ``Result.reason``."""
    if reason == VIA_CONNTRACK:             # the flow table knew the flow, on either leg
        return "conntrack"
    elif reason == VIA_SCHEDULER:           # a new flow, placed by the service's scheduler
        return "scheduled"
    elif reason == VIA_OVERLOAD:            # a flow that gets no entry, for now: its hash decided
        return "overload"
    elif reason == VIA_MAGLEV:              # in mid-flow without an entry: the Maglev table decided
        return "maglev"
    elif reason == VIA_FRAGMENT:            # a later fragment: the way of the first one of its datagram
        return "fragment"
    elif reason == VIA_HELD:                # a later fragment that waits for the first one: not an end
        return "held"
    elif reason == VIA_ICMP:                # an error about a flow: passed on to its backend, or to its client
        return "icmp"
    elif reason == VIA_ECHO:                # an echo request to a VIP: answered
        return "echo"
    elif reason == VIA_TIME_EXCEEDED:       # a TTL of 1 in a NAT mode: answered
        return "time_exceeded"
    elif reason == VIA_TOO_BIG:             # longer than the MTU: answered with fragmentation needed, packet too big
        return "too_big"
    elif reason == VIA_RESET:               # a flow whose backend has left, or is down: answered with RST
        return "reset"
    elif reason == VIA_REJECT:              # no backend: answered with RST or ICMP port unreachable
        return "rejected"
    elif reason == PASS_NOT_IP:
        return "not_ip"
    elif reason == PASS_IP_HEADER:          # wrong version, or a header length below 20
        return "ip_header"
    elif reason == PASS_FRAGMENT:           # of ICMP
        return "icmp_fragment"
    elif reason == PASS_NOT_TCP_UDP:
        return "not_tcp_udp"
    elif reason == PASS_EXTENSION_HEADERS:     # too many, or behind the header of a fragment
        return "extension_headers"
    elif reason == PASS_ICMP_QUOTE:         # an error that quotes no TCP or UDP ports
        return "icmp_quote"
    elif reason == PASS_TRUNCATED:          # ends before the ports, so nobody can tell whose it is
        return "truncated"
    elif reason == PASS_NO_SERVICE:
        return "no_service"
    elif reason == DROP_IP_LENGTH:          # the length field disagrees with the frame
        return "ip_length"
    elif reason == DROP_ROUTING_HEADER:     # IPv6 routing header with segments left: the VIP is not its end
        return "routing_header"
    elif reason == DROP_TCP_HEADER:         # header length below 20 or beyond the packet
        return "tcp_header"
    elif reason == DROP_TCP_FLAGS:          # SYN together with FIN or RST
        return "tcp_flags"
    elif reason == DROP_UDP_LENGTH:
        return "udp_length"
    elif reason == DROP_ICMP_HEADER:        # not sent to who sent what it quotes, or quotes less than eight bytes of it
        return "icmp_header"
    elif reason == DROP_FRAGMENT_SHAPE:     # beyond 64 KiB, empty, not of whole 8-byte units, or in the TCP header
        return "fragment_shape"
    elif reason == DROP_FRAGMENT_OVERLAP:   # covers what another fragment of its datagram has brought
        return "fragment_overlap"
    elif reason == DROP_FRAGMENT_UNKNOWN:   # the first fragment did not come in time, or was not forwarded
        return "fragment_unknown"
    elif reason == DROP_FRAGMENT_LIMIT:     # no place to wait for the first fragment
        return "fragment_limit"
    elif reason == DROP_ICMP_UNKNOWN:       # an ICMP error about no flow
        return "icmp_unknown"
    elif reason == DROP_DENIED:             # the service's lists do not let this source in
        return "denied"
    elif reason == DROP_SOURCE_LIMIT:       # too many new flows from this source
        return "source_limit"
    elif reason == DROP_NEW_FLOW_RATE:      # too many new flows altogether, where a flow is nothing without an entry
        return "new_flow_rate"
    elif reason == DROP_NO_BACKEND:
        return "no_backend"
    elif reason == DROP_BACKENDS_FULL:      # every backend has as many flows as it may have
        return "backends_full"
    elif reason == DROP_NO_ROUTE:
        return "no_route"
    elif reason == DROP_NO_NEIGHBOUR:       # the next hop's MAC is not known (yet)
        return "no_neighbour"
    elif reason == DROP_NOT_ON_LINK:        # dsr through a gateway would come straight back
        return "not_on_link"
    elif reason == DROP_TTL_EXPIRED:
        return "ttl_expired"
    elif reason == DROP_OVER_MTU:
        return "over_mtu"
    elif reason == DROP_NO_TUNNEL_SOURCE:   # no address of the backend's IP version to send from
        return "no_tunnel_source"
    elif reason == DROP_TUNNEL_OFFLOAD:     # a super-frame that cannot be cut: neither TCP nor UDP, or into too many
        return "tunnel_offload"
    elif reason == DROP_REPLY_UNKNOWN:      # from a backend, but of no flow and of none that Maglev explains
        return "reply_unknown"
    elif reason == DROP_NAT_CONFLICT:       # the client's port already talks to every candidate through another VIP
        return "nat_conflict"
    elif reason == DROP_NO_SOURCE_PORT:     # fullnat: every source port of the flow's shard is taken
        return "no_source_port"
    elif reason == DROP_FLOW_TABLE_FULL:    # fullnat: no room to remember the source port
        return "flow_table_full"
    elif reason == DROP_FLOW_UNKNOWN:       # fullnat: a RST of a flow that is not known; other packets are answered
        return "flow_unknown"
    elif reason == DROP_BACKEND_LEFT:       # the same, but the client's address is none that can be answered
        return "backend_left"
    elif reason == DROP_REJECT_LIMIT:       # would be rejected, but answers are rate-limited
        return "reject_limit"
    elif reason == DROP_WRONG_WORKER:       # of a shard that another worker owns
        return "wrong_worker"
    elif reason == DROP_RING_HOLE:          # the kernel counted a slot that it never filled
        return "ring_hole"
    elif reason == DROP_RING_CLAMPED:       # frame longer than what the block could hold
        return "ring_clamped"
    elif reason == DROP_TX_FULL:
        return "tx_full"
    elif reason == DROP_TX_TOO_BIG:
        return "tx_too_big"
    elif reason == DROP_TX_LINK_DOWN:
        return "tx_link_down"
    elif reason == DROP_TX_ERROR:
        return "tx_error"
    return "?"


cdef inline int verdict_of(int reason) noexcept nogil:
    if reason <= VIA_HELD:
        return VERDICT_FORWARD
    return VERDICT_PASS if reason <= PASS_NO_SERVICE else VERDICT_DROP
