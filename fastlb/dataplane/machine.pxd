"""The machine's own operations, from machine.h: atomics, prefetch, unaligned access, wide multiplication."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t


cdef extern from "machine.h" nogil:
    # Loads and stores of memory that another thread or the kernel writes. They work on integers and pointers.
    uint16_t load_acquire_u16 "fastlb_load_acquire"(const uint16_t *p) noexcept
    uint64_t load_acquire_u64 "fastlb_load_acquire"(const uint64_t *p) noexcept
    bint claim "fastlb_claim"(uint32_t *p) noexcept  # 0 becomes 1; False when it was 1
    bint compare_and_swap_u64 "fastlb_compare_and_swap_u64"(uint64_t *p, uint64_t seen, uint64_t wanted) noexcept
    uint32_t load_acquire_u32 "fastlb_load_acquire"(const uint32_t *p) noexcept
    void *load_acquire_ptr "fastlb_load_acquire"(void **p) noexcept
    void store_release_u64 "fastlb_store_release"(uint64_t *p, uint64_t value) noexcept
    void store_release_u32 "fastlb_store_release"(uint32_t *p, uint32_t value) noexcept
    void store_release_ptr "fastlb_store_release"(void **p, void *value) noexcept

    void in_order "fastlb_in_order"() noexcept           # to somebody who finds the memory of a killed process
    void store_fence "fastlb_store_fence"() noexcept     # every store before it is seen before any load after it
    void load_fence "fastlb_load_fence"() noexcept       # every load before it is done before any load after it
    void spin_pause "fastlb_spin_pause"() noexcept       # tells the core that this loop waits for another one

    void prefetch "fastlb_prefetch"(const void *p) noexcept
    bint likely "fastlb_likely"(bint condition) noexcept
    bint unlikely "fastlb_unlikely"(bint condition) noexcept

    # What the code around it guarantees, whatever comes in from outside: it ends the program in every build profile but
    # release, where it costs nothing: the condition has no effect and no atomic load, so nothing of it is left.
    void must "fastlb_must"(bint condition) noexcept

    # At compile time; both sides must be constants to the C compiler.
    void assert_equal "FASTLB_ASSERT_EQUAL"(size_t a, size_t b) noexcept

    # Packets are not aligned; these may read and write anywhere. Values are as in memory (no byte swap).
    uint16_t load16 "fastlb_load16"(const void *p) noexcept
    uint32_t load32 "fastlb_load32"(const void *p) noexcept
    uint64_t load64 "fastlb_load64"(const void *p) noexcept
    void store16 "fastlb_store16"(void *p, uint16_t value) noexcept
    void store32 "fastlb_store32"(void *p, uint32_t value) noexcept
    void store64 "fastlb_store64"(void *p, uint64_t value) noexcept

    uint32_t lowest_bit "fastlb_lowest_bit"(uint32_t bits) noexcept     # its position; `bits` is not 0
    uint64_t mul_high "fastlb_mul_high"(uint64_t a, uint64_t b) noexcept        # the upper half of the product
    uint64_t mul_fold "fastlb_mul_fold"(uint64_t a, uint64_t b) noexcept

    uint16_t bswap16 "__builtin_bswap16"(uint16_t value) noexcept
    uint32_t bswap32 "__builtin_bswap32"(uint32_t value) noexcept
    uint64_t bswap64 "__builtin_bswap64"(uint64_t value) noexcept
