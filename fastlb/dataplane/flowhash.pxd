"""Three hashes of a flow, each for its own purpose.

flow_hash     XXH3-64 of the tuple in network order under the fleet's seed: every balancer, and anyone else, computes
              the same placement. The algorithm is the one of the xxHash specification (XXH3, lengths 9-16 and 17-128).
fingerprint   under the flow table's secret key: nobody outside can aim at a bucket.
shard         of the client's address and port, in 32-bit arithmetic that an eBPF program repeats.

A fingerprint's upper half picks the bucket. In the NAT modes it comes from the client's side alone, which both legs
of a flow know; in the one-way modes from the whole tuple:

    two-way   | client address, port, protocol : 32 | everything : 32 |
    one-way   |               everything : 64                        |
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fastlb.dataplane.machine cimport bswap64, mul_fold
from fastlb.dataplane.types cimport FAMILY_4, Addr
from fastlb.dataplane.wire cimport be_addr4


cdef enum:
    SHARDS = 64
    SHARD_BITS = 6


# The parts of XXH3's default secret that inputs of 13 and 37 bytes touch, as little-endian words.
cdef extern from *:
    """
    #define FASTLB_XXH3_S0  0xbe4ba423396cfeb8ULL
    #define FASTLB_XXH3_S8  0x1cad21f72c81017cULL
    #define FASTLB_XXH3_S16 0xdb979083e96dd4deULL
    #define FASTLB_XXH3_S24 0x1f67b3b7a4a44072ULL
    #define FASTLB_XXH3_S32 0x78e5c0cc4ee679cbULL
    #define FASTLB_XXH3_S40 0x2172ffcc7dd05a82ULL
    #define FASTLB_XXH3_S48 0x8e2443f7744608b8ULL
    #define FASTLB_XXH3_S56 0x4c263a81e69035e0ULL
    #define FASTLB_XXH3_MIX 0x165667919E3779F9ULL
    #define FASTLB_XXH64_P1 0x9E3779B185EBCA87ULL
    """
    const uint64_t S0 "FASTLB_XXH3_S0"
    const uint64_t S8 "FASTLB_XXH3_S8"
    const uint64_t S16 "FASTLB_XXH3_S16"
    const uint64_t S24 "FASTLB_XXH3_S24"
    const uint64_t S32 "FASTLB_XXH3_S32"
    const uint64_t S40 "FASTLB_XXH3_S40"
    const uint64_t S48 "FASTLB_XXH3_S48"
    const uint64_t S56 "FASTLB_XXH3_S56"
    const uint64_t AVALANCHE "FASTLB_XXH3_MIX"
    const uint64_t PRIME64_1 "FASTLB_XXH64_P1"


cdef inline uint64_t xxh3_avalanche(uint64_t h) noexcept nogil:
    h ^= h >> 37
    h *= AVALANCHE
    return h ^ (h >> 32)


cdef inline uint64_t xxh3_mix16(
        uint64_t first, uint64_t second, uint64_t low, uint64_t high, uint64_t seed) noexcept nogil:
    return mul_fold(first ^ (low + seed), second ^ (high - seed))


cdef inline uint64_t xxh3_13(uint64_t first, uint64_t last, uint64_t seed) noexcept nogil:
    """Return the XXH3-64 of 13 bytes, given as the first eight and the last eight, which overlap."""
    cdef uint64_t low = first ^ ((S24 ^ S32) + seed)
    cdef uint64_t high = last ^ ((S40 ^ S48) - seed)
    return xxh3_avalanche(13 + bswap64(low) + high + mul_fold(low, high))


cdef inline uint64_t xxh3_37(Addr src, Addr dst, uint64_t last, uint64_t seed) noexcept nogil:
    """Return the XXH3-64 of 37 bytes: two addresses and five more, of which `last` has the last eight. The words at 5
    and 21 lie across addresses."""
    cdef uint64_t acc = 37 * PRIME64_1
    acc += xxh3_mix16(dst.hi, dst.lo, S32, S40, seed)
    acc += xxh3_mix16(src.hi >> 40 | src.lo << 24, src.lo >> 40 | dst.hi << 24, S48, S56, seed)
    acc += xxh3_mix16(src.hi, src.lo, S0, S8, seed)
    acc += xxh3_mix16(dst.hi >> 40 | dst.lo << 24, last, S16, S24, seed)
    return xxh3_avalanche(acc)


cdef inline uint64_t flow_hash(
        Addr src, uint16_t be_sport, Addr dst, uint16_t be_dport, uint8_t protocol, uint8_t family, uint64_t seed,
        ) noexcept nogil:
    """Return XXH3-64 over source, destination, source port, destination port and protocol: 13 bytes or 37.

    The words are put together in registers. Written to memory in small pieces and read back as words, they would wait
    until every older store has left the store buffer, those that miss the cache included.
    """
    cdef uint64_t last = dst.lo >> 40 | <uint64_t>be_sport << 24 | <uint64_t>be_dport << 40 | <uint64_t>protocol << 56
    if family == FAMILY_4:
        return xxh3_13(be_addr4(src) | <uint64_t>be_addr4(dst) << 32, last, seed)
    return xxh3_37(src, dst, last, seed)


cdef inline uint64_t client_mix(
        const uint64_t *key, Addr client, uint16_t be_port, uint8_t protocol, uint8_t family) noexcept nogil:
    """Return the hash of the client's side under the table's key. Ports and addresses never share a word that an
    attacker could cancel."""
    cdef uint64_t meta = (<uint64_t>be_port | <uint64_t>protocol << 16 | <uint64_t>family << 24) ^ key[1]
    if family != FAMILY_4:
        meta = mul_fold(client.hi ^ key[2], meta)
    return mul_fold(client.lo ^ key[0], meta)


cdef inline uint64_t fingerprint(
        const uint64_t *key, uint64_t client, Addr local, uint16_t be_port, bint two_way) noexcept nogil:
    """Return the flow's fingerprint; never 0, which marks an empty entry."""
    cdef uint64_t everything = mul_fold(
        client ^ local.lo, (local.hi ^ <uint64_t>be_port * <uint64_t>0x9E3779B97F4A7C15ULL) ^ key[3])
    if two_way:
        everything = (client & <uint64_t>0xFFFFFFFF00000000ULL) | (everything >> 32)
    return everything | (everything == 0)


cdef inline uint32_t shard_of(Addr client, uint16_t be_port) noexcept nogil:
    cdef uint64_t words = client.hi ^ client.lo
    cdef uint32_t mixed = (<uint32_t>words ^ <uint32_t>(words >> 32) ^ be_port) * <uint32_t>0x9E3779B1U
    return mixed >> (32 - SHARD_BITS)
