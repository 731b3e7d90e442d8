"""The Internet checksum: whole (RFC 1071) and by difference (RFC 1624).

Sums are taken over 16-bit words as they lie in memory. The one's complement sum does not care about byte order
(RFC 1071 section 2), so nothing is swapped.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.machine cimport bswap16, load16, load32, load64, must, store16
from fastlb.dataplane.types cimport Addr
from fastlb.dataplane.wire cimport IP4_SRC, IP6_SRC


cdef inline uint16_t fold(uint64_t total) noexcept nogil:
    """Return a running sum as one 16-bit word; it is zero only if the sum is.

    Added to itself with its halves exchanged, a number has in its upper half the sum of both, and the carry from below
    is the end-around one. The order of bytes does not matter, so this is RFC 1071's sum in six operations.
    """
    cdef uint32_t half
    total += total << 32 | total >> 32
    half = <uint32_t>(total >> 32)
    half += half << 16 | half >> 16
    return <uint16_t>(half >> 16)


cdef inline uint64_t sum_addr(Addr addr) noexcept nogil:
    return (
        (addr.hi & 0xFFFFFFFFU) + (addr.hi >> 32) + (addr.lo & 0xFFFFFFFFU) + (addr.lo >> 32)
    )


cdef inline uint64_t sum_bytes(const uint8_t *data, uint32_t length) noexcept nogil:
    """Return the unfolded sum of up to 64 KiB."""
    cdef uint64_t total = 0
    cdef uint64_t word
    must(length <= 65536)
    while length >= 8:
        word = load64(data)
        total += (word & 0xFFFFFFFFU) + (word >> 32)
        data += 8
        length -= 8
    if length >= 4:
        total += load32(data)
        data += 4
        length -= 4
    if length >= 2:
        total += load16(data)
        data += 2
        length -= 2
    if length:
        total += data[0]
    return total


cdef inline uint64_t pseudo_sum(const uint8_t *ip, uint8_t protocol, uint32_t length) noexcept nogil:
    """Return the sum of the pseudo-header of `length` bytes of TCP or UDP (RFC 9293 section 3.1, RFC 768, RFC 8200
    section 8.1)."""
    cdef uint64_t addresses = sum_bytes(ip + IP4_SRC, 8) if ip[0] >> 4 == 4 else sum_bytes(ip + IP6_SRC, 32)
    return addresses + bswap16(protocol) + bswap16(<uint16_t>length)


cdef inline uint64_t difference(uint64_t old_sum, uint64_t new_sum) noexcept nogil:
    """Return what a sum changes by when words that sum to `old_sum` are replaced by words that sum to `new_sum`: ~m +
    m' of RFC 1624.

    It is not folded: the complement is taken from a multiple of 2 ** 16 - 1 that no sum of a few addresses exceeds.
    """
    cdef uint64_t nothing = <uint64_t>0xFFFF << 24
    must(old_sum < nothing)
    return nothing - old_sum + new_sum


cdef inline void update_checksum(uint8_t *field, uint64_t change) noexcept nogil:
    """Apply a `difference` to a checksum. RFC 1624 equation 3: HC' = ~(~HC + ~m + m')."""
    store16(field, <uint16_t>(~fold(<uint64_t><uint16_t>(~load16(field)) + change)))


cdef inline void update_partial_checksum(uint8_t *field, uint64_t change) noexcept nogil:
    """Apply a `difference` to a checksum that the device completes: it holds the plain sum of the pseudo-header, not
    its complement."""
    store16(field, fold(<uint64_t>load16(field) + change))


cdef inline void update_udp_checksum(uint8_t *field, uint64_t change) noexcept nogil:
    """Apply a `difference` to a UDP checksum. Zero means that there is none, and stays zero; a computed zero is sent as
    all ones (RFC 768)."""
    if load16(field) == 0:
        return
    update_checksum(field, change)
    if load16(field) == 0:
        store16(field, 0xFFFF)
