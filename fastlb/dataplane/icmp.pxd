"""The answer to a packet that no backend can take: TCP RST (RFC 9293 section 3.5.2) or ICMP port unreachable.

The answer is built in the frame's own memory. RST shrinks the packet; ICMP grows it to the front, into the headroom
that the ring reserves, and quotes the packet where it lies.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastlb.dataplane.checksum cimport fold, sum_addr, sum_bytes
from fastlb.dataplane.flowhash cimport client_mix, fingerprint
from fastlb.dataplane.icmperror cimport ICMP_LEN, PROTO_ICMP4, PROTO_ICMP6
from fastlb.dataplane.machine cimport bswap16, store16, store32
from fastlb.dataplane.rewrite cimport move_frame, restore_tag
from fastlb.dataplane.types cimport FAMILY_4, FRAGMENT_LATER, PROTO_TCP, Packet
from fastlb.dataplane.wire cimport (
    ETH_DST, ETH_SRC, IP4_CSUM, IP4_DST, IP4_LEN, IP4_PROTO, IP4_SRC, IP4_TOTAL, IP4_TTL,
    IP6_DST, IP6_HOPS, IP6_LEN, IP6_NEXT, IP6_PAYLOAD, IP6_SRC, TCP_ACK, TCP_ACK_NO, TCP_CSUM, TCP_FIN, TCP_FLAGS,
    TCP_LEN, TCP_OFFSET, TCP_RST, TCP_SEQ, TCP_SYN, be_addr4, read_be32, write_addr6, write_be16, write_be32)


cdef enum:
    ICMP4_UNREACHABLE = 3    # RFC 792, code 3: port
    ICMP4_PORT = 3
    ICMP4_TOO_BIG = 4        # RFC 1191 section 4: the next hop's MTU is in the last two bytes
    ICMP6_UNREACHABLE = 1    # RFC 4443, code 4: port
    ICMP6_PORT = 4
    ICMP6_TOO_BIG = 2        # RFC 4443 section 3.2
    ICMP4_TIME_EXCEEDED = 11
    ICMP6_TIME_EXCEEDED = 3
    ICMP4_MAX = 576          # the whole ICMP packet, RFC 1812 section 4.3.2.3
    ICMP6_MAX = 1280         # RFC 4443 section 2.4
    REJECT_TTL = 64
    REJECTS_PER_SECOND = 1000
    TOO_BIG_PER_SECOND = 100  # of the pairs of addresses that share a bucket
    TOO_BIG_BUCKETS = 1024
    TOKENS_PER_ANSWER = 1000  # a millisecond refills as many as there may be answers a second


cdef struct AnswerBudget:
    # A token bucket for one worker's answers of a kind; RFC 4443 section 2.4 (f) demands a limit on errors.
    uint32_t tokens_spent    # and not yet refilled
    uint32_t refilled_at     # milliseconds


cdef struct AnswerBudgets:
    # Whatever can be provoked by junk must not silence what a path MTU is learned from: without it, connections stand
    # still (Linux does not limit it at all). Forged sources must fill many buckets for that: 102,400 answers a second,
    # of which none is longer than its cause.
    AnswerBudget rejects     # RST, port unreachable, time exceeded
    AnswerBudget too_big[TOO_BIG_BUCKETS]


cdef inline bint may_answer(AnswerBudget *budget, uint32_t each_second, uint32_t now) noexcept nogil:
    """True if there is a token for one more answer, which is then spent. A second's worth may come at once."""
    cdef uint64_t refilled = <uint64_t>(now - budget.refilled_at) * each_second
    budget.tokens_spent -= <uint32_t>min(<uint64_t>budget.tokens_spent, refilled)
    budget.refilled_at = now
    if budget.tokens_spent + TOKENS_PER_ANSWER > each_second * TOKENS_PER_ANSWER:
        return False
    budget.tokens_spent += TOKENS_PER_ANSWER
    return True


cdef inline bint may_reject(AnswerBudgets *budgets, uint32_t now) noexcept nogil:
    return may_answer(&budgets.rejects, REJECTS_PER_SECOND, now)


cdef inline bint may_tell_too_big(
        AnswerBudgets *budgets, const uint64_t *key, const Packet *p, uint32_t now) noexcept nogil:
    """True if the sender may be told its MTU. The limit is for a pair of addresses, as senders remember the answer for
    one; the pair is hashed under the flow table's secret key."""
    cdef uint64_t pair = fingerprint(key, client_mix(key, p.src, 0, 0, p.family), p.dst, 0, False)
    return may_answer(&budgets.too_big[pair >> 32 & (TOO_BIG_BUCKETS - 1)], TOO_BIG_PER_SECOND, now)


cdef inline bint answerable(const Packet *p) noexcept nogil:
    """True if the packet may be answered: not from multicast, broadcast, loopback or unspecified sources (RFC 1122
    section 3.2.2, RFC 4443 2.4 e).

    Nor to a fragment without ports in IPv4 (RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7). IPv6 has no such rule
    (RFC 4443 section 2.4): a later fragment may be the only one that is too long, and no router cuts it.
    """
    cdef uint32_t first
    if p.family == FAMILY_4:
        if p.fragment == FRAGMENT_LATER:
            return False
        first = be_addr4(p.src) & 0xFF
        return 0 < first < 224 and first != 127
    return p.src.hi & 0xFF != 0xFF and (p.src.hi != 0 or p.src.lo & 0xFFFFFFFFU != 0)


cdef inline void return_to_sender(Packet *p) noexcept nogil:
    """Send the answer back the way that the packet came, under the same VLAN tags."""
    cdef uint8_t mac[6]
    memcpy(mac, p.frame + ETH_DST, 6)
    memcpy(p.frame + ETH_DST, p.frame + ETH_SRC, 6)
    memcpy(p.frame + ETH_SRC, mac, 6)
    p.out_ifindex = p.ifindex


cdef inline uint64_t write_ip(uint8_t *ip, const Packet *p, uint8_t protocol, uint32_t payload) noexcept nogil:
    """Write an IP header from the packet's destination to its source. Returns the sum of the pseudo-header."""
    if p.family == FAMILY_4:
        memset(ip, 0, IP4_LEN)
        ip[0] = 0x45
        write_be16(ip + IP4_TOTAL, <uint16_t>(IP4_LEN + payload))
        ip[6] = 0x40                                     # DF: small enough for any link that carries the VIP
        ip[IP4_TTL] = REJECT_TTL
        ip[IP4_PROTO] = protocol
        store32(ip + IP4_SRC, be_addr4(p.dst))
        store32(ip + IP4_DST, be_addr4(p.src))
        store16(ip + IP4_CSUM, <uint16_t>~fold(sum_bytes(ip, IP4_LEN)))
    else:
        memset(ip, 0, 8)
        ip[0] = 0x60
        write_be16(ip + IP6_PAYLOAD, <uint16_t>payload)
        ip[IP6_NEXT] = protocol
        ip[IP6_HOPS] = REJECT_TTL
        write_addr6(ip + IP6_SRC, p.dst)
        write_addr6(ip + IP6_DST, p.src)
    return sum_addr(p.src) + sum_addr(p.dst) + bswap16(<uint16_t>payload) + <uint32_t>bswap16(protocol)


cdef inline uint32_t sequence_length(const Packet *p, const uint8_t *tcp) noexcept nogil:
    """Return SEG.LEN: the payload, and one each for SYN and FIN."""
    cdef uint32_t length = p.l3_length - (p.l4 - p.l3) - p.l4_header
    return length + (1 if tcp[TCP_FLAGS] & TCP_SYN else 0) + (1 if tcp[TCP_FLAGS] & TCP_FIN else 0)


cdef inline void write_reset(Packet *p) noexcept nogil:
    """Write a RST (RFC 9293 section 3.10.7.1): its sequence number is the peer's ACK, or 0 with an ACK of what the peer
    sent."""
    cdef const uint8_t *old = p.frame + p.l4
    cdef uint32_t seq = 0
    cdef uint32_t ack = 0
    cdef uint8_t flags = TCP_RST
    cdef uint16_t header = IP4_LEN if p.family == FAMILY_4 else IP6_LEN
    cdef uint8_t *tcp = p.frame + p.l3 + header
    cdef uint64_t pseudo
    if p.tcp_flags & TCP_ACK:
        seq = read_be32(old + TCP_ACK_NO)
    else:
        ack = read_be32(old + TCP_SEQ) + sequence_length(p, old)
        flags = TCP_RST | TCP_ACK
    pseudo = write_ip(p.frame + p.l3, p, PROTO_TCP, TCP_LEN)
    memset(tcp, 0, TCP_LEN)
    store16(tcp, p.be_dport)
    store16(tcp + 2, p.be_sport)
    write_be32(tcp + TCP_SEQ, seq)
    write_be32(tcp + TCP_ACK_NO, ack)
    tcp[TCP_OFFSET] = TCP_LEN // 4 << 4
    tcp[TCP_FLAGS] = flags
    store16(tcp + TCP_CSUM, <uint16_t>~fold(pseudo + sum_bytes(tcp, TCP_LEN)))
    p.length = p.l3 + header + TCP_LEN


cdef inline void write_error(Packet *p, uint8_t type, uint8_t code, uint32_t rest) noexcept nogil:
    """Write an ICMP error that quotes the packet. `rest`: the four bytes behind the checksum, in host order."""
    cdef bint four = p.family == FAMILY_4
    cdef uint16_t header = IP4_LEN if four else IP6_LEN
    cdef uint32_t quoted = min(p.l3_length, <uint32_t>((ICMP4_MAX if four else ICMP6_MAX) - header - ICMP_LEN))
    cdef uint8_t link[24]
    cdef uint16_t link_length = p.l3
    cdef uint8_t *icmp
    cdef uint64_t pseudo
    memcpy(link, p.frame, link_length)
    move_frame(p, -(header + ICMP_LEN))
    memcpy(p.frame, link, link_length)
    p.l3 = link_length
    icmp = p.frame + p.l3 + header
    memset(icmp, 0, ICMP_LEN)
    icmp[0] = type
    icmp[1] = code
    write_be32(icmp + 4, rest)
    pseudo = write_ip(p.frame + p.l3, p, PROTO_ICMP4 if four else PROTO_ICMP6, ICMP_LEN + quoted)
    if four:
        pseudo = 0                                       # ICMPv4 has none
    store16(icmp + 2, <uint16_t>~fold(pseudo + sum_bytes(icmp, ICMP_LEN + quoted)))
    p.length = p.l3 + header + ICMP_LEN + quoted


cdef inline void write_port_unreachable(Packet *p) noexcept nogil:
    if p.family == FAMILY_4:
        write_error(p, ICMP4_UNREACHABLE, ICMP4_PORT, 0)
    else:
        write_error(p, ICMP6_UNREACHABLE, ICMP6_PORT, 0)


cdef inline void send_back(Packet *p) noexcept nogil:
    """Send what has been written over the packet to its sender, complete and as one frame."""
    memset(&p.vnet, 0, sizeof(p.vnet))
    p.segment_size = p.fragment_size = 0
    return_to_sender(p)
    if p.vlan_tpid != 0:
        restore_tag_in_front(p)


cdef inline void reject(Packet *p) noexcept nogil:
    """Turn the packet into its refusal. Never called for a RST, which must not be answered."""
    if p.protocol == PROTO_TCP:
        write_reset(p)
    else:
        write_port_unreachable(p)
    send_back(p)


cdef inline void answer_too_big(Packet *p, uint32_t mtu) noexcept nogil:
    """Turn the packet into fragmentation needed, or packet too big, with the MTU that it should keep to."""
    if p.family == FAMILY_4:
        write_error(p, ICMP4_UNREACHABLE, ICMP4_TOO_BIG, mtu)
    else:
        write_error(p, ICMP6_TOO_BIG, 0, mtu)
    send_back(p)


cdef inline void answer_time_exceeded(Packet *p) noexcept nogil:
    """Turn the packet into time exceeded in transit (RFC 792; RFC 4443 section 3.3)."""
    write_error(p, ICMP4_TIME_EXCEEDED if p.family == FAMILY_4 else ICMP6_TIME_EXCEEDED, 0, 0)
    send_back(p)


cdef inline void restore_tag_in_front(Packet *p) noexcept nogil:
    """Put the VLAN tag back as in a forwarded frame, but keep the MAC addresses."""
    cdef uint8_t macs[12]
    memcpy(macs, p.frame, 12)
    restore_tag(p)
    memcpy(p.frame, macs, 12)
