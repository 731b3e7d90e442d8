"""Headers as they lie on the wire: offsets, flag bits, and the only byte-order conversions of the data path."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.machine cimport bswap16, bswap32, load16, load32, load64, store16, store32, store64
from fastlb.dataplane.types cimport Addr


cdef enum:
    # Ethernet II and 802.1Q
    ETH_DST = 0
    ETH_SRC = 6
    ETH_TYPE = 12
    ETH_LEN = 14
    VLAN_LEN = 4
    ETHERTYPE_IP4 = 0x0800
    ETHERTYPE_IP6 = 0x86DD
    ETHERTYPE_VLAN = 0x8100
    ETHERTYPE_QINQ = 0x88A8
    ETHERTYPE_OFFLOAD = 0x88B5  # IEEE 802's first for local experiments: it never leaves this host

    # IPv4, RFC 791
    IP4_LEN = 20
    MAX_IP = 65535           # bytes of a packet, as IPv4 counts them with its header
    IP4_TOTAL = 2
    IP4_ID = 4
    IP4_FRAG = 6
    IP4_TTL = 8
    IP4_PROTO = 9
    IP4_CSUM = 10
    IP4_SRC = 12
    IP4_DST = 16
    IP4_FRAG_MASK = 0x3FFF   # MF and the offset; not DF
    IP4_OFFSET_MASK = 0x1FFF
    IP4_MF = 0x2000
    IP4_DF = 0x40            # in the first of the two bytes

    OPTION_END = 0           # of IPv4 and of TCP
    OPTION_NOP = 1

    # IPv6, RFC 8200
    IP6_LEN = 40
    IP6_PAYLOAD = 4
    IP6_NEXT = 6
    IP6_HOPS = 7
    IP6_SRC = 8
    IP6_DST = 24
    IP6_FRAG_MASK = 0xFFF9   # of the Fragment header: the offset, in bytes, and whether there are more
    IP6_OFFSET_MASK = 0xFFF8
    IP6_FRAG_LEN = 8
    IP6_FRAG_NUMBER = 4      # from its end
    EXT_HOP_BY_HOP = 0
    EXT_ROUTING = 43
    EXT_FRAGMENT = 44
    EXT_AUTH = 51
    EXT_DEST_OPTS = 60
    MAX_EXT_HEADERS = 6      # as in the receive filter: longer chains are the host's

    # TCP, RFC 9293
    TCP_LEN = 20
    TCP_SEQ = 4
    TCP_ACK_NO = 8
    TCP_OFFSET = 12
    TCP_FLAGS = 13
    TCP_CSUM = 16
    TCP_FIN = 0x01
    TCP_SYN = 0x02
    TCP_RST = 0x04
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    TCP_URG = 0x20
    TCP_CWR = 0x80

    # UDP, RFC 768
    UDP_LEN = 8
    UDP_LENGTH = 4
    UDP_CSUM = 6


cdef inline uint16_t read_be16(const uint8_t *p) noexcept nogil:
    return bswap16(load16(p))


cdef inline uint32_t read_be32(const uint8_t *p) noexcept nogil:
    return bswap32(load32(p))


cdef inline void write_be16(uint8_t *p, uint16_t value) noexcept nogil:
    store16(p, bswap16(value))


cdef inline void write_be32(uint8_t *p, uint32_t value) noexcept nogil:
    store32(p, bswap32(value))


cdef inline Addr read_addr4(const uint8_t *p) noexcept nogil:
    cdef Addr addr
    addr.hi = 0
    addr.lo = <uint64_t>load32(p) << 32
    return addr


cdef inline Addr read_addr6(const uint8_t *p) noexcept nogil:
    cdef Addr addr
    addr.hi = load64(p)
    addr.lo = load64(p + 8)
    return addr


cdef inline uint32_t be_addr4(Addr addr) noexcept nogil:
    return <uint32_t>(addr.lo >> 32)


cdef inline void write_addr6(uint8_t *p, Addr addr) noexcept nogil:
    store64(p, addr.hi)
    store64(p + 8, addr.lo)


cdef inline bint same_addr(Addr a, Addr b) noexcept nogil:
    return (a.hi == b.hi) & (a.lo == b.lo)
