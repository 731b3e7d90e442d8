/* Why a packet ended as it did: one row a reason, with the name of its counter, its verdict and what it means.
 *
 * The order matters: `reason <= VIA_REJECT` is a packet to be sent now, and up to PASS_NO_SERVICE nothing is dropped.
 * A new reason is a row here and its number's name in reasons.pxd; docs/counters.md has a row of the same name.
 * The second table is that of decapsulation, whose reasons docs/decap.md explains. */
#ifndef FASTLB_REASONS_H
#define FASTLB_REASONS_H

#define FASTLB_REASONS(ROW) \
    /* forwarded */ \
    ROW(VIA_CONNTRACK, "conntrack", FORWARD, "the flow table knew the flow, on either leg") \
    ROW(VIA_SCHEDULER, "scheduled", FORWARD, "a new flow, placed by the service's scheduler") \
    ROW(VIA_OVERLOAD, "overload", FORWARD, "a flow that gets no entry for now: its hash decided") \
    ROW(VIA_MAGLEV, "maglev", FORWARD, "in mid-flow without an entry: the Maglev table decided") \
    ROW(VIA_FRAGMENT, "fragment", FORWARD, "a later fragment: it went the way of the first one of its datagram") \
    ROW(VIA_ICMP, "icmp", FORWARD, "an ICMP error about a flow, passed on to its backend or its client") \
    ROW(VIA_ECHO, "echo", FORWARD, "an echo request to a VIP, answered") \
    ROW(VIA_TOO_BIG, "too_big", FORWARD, "longer than the MTU: answered with fragmentation needed or packet too big") \
    ROW(VIA_TIME_EXCEEDED, "time_exceeded", FORWARD, "a TTL of 1 in a NAT mode, answered") \
    ROW(VIA_RESET, "reset", FORWARD, "a flow whose backend has left or is down, answered with RST") \
    ROW(VIA_REJECT, "rejected", FORWARD, "no backend: answered with RST or ICMP port unreachable") \
    /* to be forwarded, and not yet */ \
    ROW(VIA_HELD, "held", FORWARD, "a later fragment that waits for the first one; not an end") \
    /* left to the host: nothing of ours, or not enough of a packet to tell */ \
    ROW(PASS_NOT_IP, "not_ip", PASS, "neither IPv4 nor IPv6") \
    ROW(PASS_IP_HEADER, "ip_header", PASS, "a wrong IP version, or an IPv4 header length below 20") \
    ROW(PASS_FRAGMENT, "icmp_fragment", PASS, "a fragment of an ICMP message") \
    ROW(PASS_NOT_TCP_UDP, "not_tcp_udp", PASS, "another protocol than TCP and UDP") \
    ROW(PASS_EXTENSION_HEADERS, "extension_headers", PASS, \
        "too many IPv6 extension headers, or one behind the header of a fragment") \
    ROW(PASS_ICMP_QUOTE, "icmp_quote", PASS, "an ICMP error that quotes no TCP or UDP ports") \
    ROW(PASS_TRUNCATED, "truncated", PASS, "ends before the ports, so that nobody can tell whose it is") \
    ROW(PASS_NO_SERVICE, "no_service", PASS, "to no VIP, and from no backend that replies") \
    /* dropped: malformed */ \
    ROW(DROP_IP_LENGTH, "ip_length", DROP, "the IP length field disagrees with the frame") \
    ROW(DROP_ROUTING_HEADER, "routing_header", DROP, \
        "an IPv6 routing header with segments left: the VIP is not its destination") \
    ROW(DROP_TCP_HEADER, "tcp_header", DROP, "a TCP header length below 20 or beyond the packet") \
    ROW(DROP_TCP_FLAGS, "tcp_flags", DROP, "SYN together with FIN or RST") \
    ROW(DROP_UDP_LENGTH, "udp_length", DROP, "a UDP length below 8 or beyond the packet") \
    ROW(DROP_ICMP_HEADER, "icmp_header", DROP, \
        "an ICMP error to another host than the sender of what it quotes, or one that quotes less than eight bytes") \
    ROW(DROP_FRAGMENT_SHAPE, "fragment_shape", DROP, \
        "a fragment beyond 64 KiB, empty, not of whole 8-byte units, or inside the TCP header") \
    ROW(DROP_FRAGMENT_OVERLAP, "fragment_overlap", DROP, \
        "covers what another fragment of its datagram has brought, or contradicts it") \
    /* dropped: not let in */ \
    ROW(DROP_DENIED, "denied", DROP, "the service's lists do not let this source in") \
    ROW(DROP_SOURCE_LIMIT, "source_limit", DROP, "too many new flows from this source") \
    ROW(DROP_NEW_FLOW_RATE, "new_flow_rate", DROP, \
        "too many new flows altogether, where a flow needs its entry") \
    /* dropped: nowhere to go */ \
    ROW(DROP_NO_BACKEND, "no_backend", DROP, "the service has no backend with a weight") \
    ROW(DROP_BACKENDS_FULL, "backends_full", DROP, "every backend has as many flows as it may have") \
    ROW(DROP_NO_ROUTE, "no_route", DROP, "no route to the backend or the client, or its link is down") \
    ROW(DROP_NO_NEIGHBOUR, "no_neighbour", DROP, "the next hop's MAC is not known yet") \
    ROW(DROP_NOT_ON_LINK, "not_on_link", DROP, "dsr through a gateway would come straight back") \
    ROW(DROP_TTL_EXPIRED, "ttl_expired", DROP, "a TTL of 1 in a NAT mode, of a packet that must not be answered") \
    ROW(DROP_OVER_MTU, "over_mtu", DROP, "longer than the link's MTU, and its sender must not be told") \
    ROW(DROP_NO_TUNNEL_SOURCE, "no_tunnel_source", DROP, "no address of the backend's IP version to send from") \
    ROW(DROP_TUNNEL_OFFLOAD, "tunnel_offload", DROP, \
        "a GSO packet that cannot be cut: neither TCP nor UDP, or into too many segments") \
    ROW(DROP_REPLY_UNKNOWN, "reply_unknown", DROP, "from a backend, but of no flow and of none that Maglev explains") \
    ROW(DROP_ICMP_UNKNOWN, "icmp_unknown", DROP, "an ICMP error about no flow") \
    ROW(DROP_FRAGMENT_UNKNOWN, "fragment_unknown", DROP, \
        "the first fragment did not come in time, or was not forwarded") \
    ROW(DROP_FRAGMENT_LIMIT, "fragment_limit", DROP, "no room to wait for the first fragment") \
    ROW(DROP_NAT_CONFLICT, "nat_conflict", DROP, \
        "the client's port already talks to every candidate through another VIP") \
    ROW(DROP_NO_SOURCE_PORT, "no_source_port", DROP, "fullnat: every source port of the flow's shard is taken") \
    ROW(DROP_FLOW_TABLE_FULL, "flow_table_full", DROP, \
        "no room for an entry without which the flow cannot be forwarded") \
    ROW(DROP_FLOW_UNKNOWN, "flow_unknown", DROP, \
        "fullnat: a RST of a flow that is not known; other packets are answered") \
    ROW(DROP_BACKEND_LEFT, "backend_left", DROP, "as reset, but the client's address is none that may be answered") \
    ROW(DROP_REJECT_LIMIT, "reject_limit", DROP, "would have been answered, but answers are limited") \
    /* dropped: by the ring, before or after the pipeline */ \
    ROW(DROP_WRONG_WORKER, "wrong_worker", DROP, "of a shard that another worker owns") \
    ROW(DROP_RING_HOLE, "ring_hole", DROP, "a slot that the kernel counted and never filled") \
    ROW(DROP_RING_CLAMPED, "ring_clamped", DROP, "a frame longer than what its block could hold") \
    ROW(DROP_TX_FULL, "tx_full", DROP, "the outgoing interface's queue was full") \
    ROW(DROP_TX_TOO_BIG, "tx_too_big", DROP, "the outgoing interface refused the frame's length") \
    ROW(DROP_TX_LINK_DOWN, "tx_link_down", DROP, "the outgoing interface is down or gone") \
    ROW(DROP_TX_ERROR, "tx_error", DROP, "the kernel refused the frame for another reason")

#define FASTLB_DECAP_REASONS(ROW) \
    ROW(DECAPSULATED, "decapsulated", FORWARD, "written to the TUN device") \
    ROW(DECAP_NOT_TUNNEL, "not_tunnel", DROP, "of no tunnel that is received here; the filter keeps these out") \
    ROW(DECAP_OUTER_HEADER, "outer_header", DROP, "a wrong IP version, or lengths that disagree with the frame") \
    ROW(DECAP_OUTER_FRAGMENT, "outer_fragment", DROP, "a fragment, left to the host; the filter keeps these out") \
    ROW(DECAP_OUTER_CHECKSUM, "outer_checksum", DROP, "a wrong checksum of the outer IPv4 or UDP header") \
    ROW(DECAP_GRE_HEADER, "gre_header", DROP, "a GRE header that is truncated, or has fields other than a key") \
    ROW(DECAP_GRE_KEY, "gre_key", DROP, "another GRE key, one where none is expected, or none") \
    ROW(DECAP_GRE_PROTOCOL, "gre_protocol", DROP, "GRE that carries neither IPv4 nor IPv6") \
    ROW(DECAP_UDP_LENGTH, "udp_length", DROP, "an outer UDP length below 8 or beyond the packet") \
    ROW(DECAP_GUE_HEADER, "gue_header", DROP, "a GUE header that is truncated, of another variant, or with flags") \
    ROW(DECAP_GUE_CONTROL, "gue_control", DROP, "a GUE control message") \
    ROW(DECAP_GUE_PROTOCOL, "gue_protocol", DROP, "GUE that carries neither IPv4 nor IPv6") \
    ROW(DECAP_INNER_HEADER, "inner_header", DROP, \
        "an inner packet of another IP version than the tunnel promises, or with too short a header") \
    ROW(DECAP_INNER_TRUNCATED, "inner_truncated", DROP, "an inner packet that says to be longer than what came") \
    ROW(DECAP_NESTED, "nested", DROP, "a tunnel in the tunnel") \
    ROW(DECAP_ECN, "ecn", DROP, "congestion that the inner packet cannot tell its receiver (RFC 6040)") \
    ROW(DECAP_OFFLOAD, "offload", DROP, "offloads that nobody can do behind the tunnel") \
    ROW(DECAP_RING_HOLE, "ring_hole", DROP, "a slot that the kernel counted and never filled") \
    ROW(DECAP_RING_CLAMPED, "ring_clamped", DROP, "a frame longer than what its block could hold") \
    ROW(DECAP_TUN_REFUSED, "tun_refused", DROP, "refused by the TUN device")

enum fastlb_verdict { VERDICT_FORWARD = 0, VERDICT_PASS = 1, VERDICT_DROP = 2 };

struct fastlb_reason_row {
    const char *name; /* of its counter; also `Result.reason` */
    enum fastlb_verdict verdict;
    const char *help;
};

#define FASTLB_REASON_NUMBER(number, name, verdict, help) number,
#define FASTLB_REASON_ROW(number, name, verdict, help) {name, VERDICT_##verdict, help},

enum fastlb_reason { FASTLB_REASONS(FASTLB_REASON_NUMBER) REASONS };
static const struct fastlb_reason_row fastlb_reason_rows[] = {FASTLB_REASONS(FASTLB_REASON_ROW)};

enum fastlb_decap_reason { FASTLB_DECAP_REASONS(FASTLB_REASON_NUMBER) DECAP_REASONS };
static const struct fastlb_reason_row fastlb_decap_reason_rows[] = {FASTLB_DECAP_REASONS(FASTLB_REASON_ROW)};

#endif
