/* What Cython cannot say: atomics with an order, prefetch, unaligned access, 64x64->128 multiplication,
 * branch hints, assertions, and compile-time checks of layouts that the kernel or a cache line dictates. */
#ifndef FASTLB_MACHINE_H
#define FASTLB_MACHINE_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define fastlb_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define fastlb_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
static inline int fastlb_claim(uint32_t *p) {
    uint32_t unclaimed = 0;
    return __atomic_compare_exchange_n(p, &unclaimed, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}
static inline int fastlb_compare_and_swap_u64(uint64_t *p, uint64_t seen, uint64_t wanted) {
    return __atomic_compare_exchange_n(p, &seen, wanted, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
/* Keeps the compiler to the order in which stores are written: a process that is killed has done the first of them. */
#define fastlb_in_order() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define fastlb_store_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define fastlb_load_fence() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#if defined(__x86_64__)
#define fastlb_spin_pause() __builtin_ia32_pause()
#else
#define fastlb_spin_pause() __asm__ volatile("yield")
#endif
/* The empty statement keeps the call alive: GCC takes a function that only prefetches for one without any effect. */
static inline void fastlb_prefetch(const void *p) {
    __asm__ volatile("" : : "r"(p));
    __builtin_prefetch(p, 1, 3);
}
/* The position of the lowest bit that is set; there must be one. */
static inline uint32_t fastlb_lowest_bit(uint32_t bits) { return (uint32_t)__builtin_ctz(bits); }
#define fastlb_likely(x) __builtin_expect(!!(x), 1)
#define fastlb_unlikely(x) __builtin_expect(!!(x), 0)

#ifdef NDEBUG
#define fastlb_must(condition) ((void)(condition)) /* still "used", and has no effect that would be left */
#else
#define fastlb_must(condition) assert(condition)
#endif

#define FASTLB_ASSERT_EQUAL(a, b) _Static_assert((a) == (b), #a " must be " #b)

static inline uint16_t fastlb_load16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static inline uint32_t fastlb_load32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint64_t fastlb_load64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline void fastlb_store16(void *p, uint16_t v) { memcpy(p, &v, 2); }
static inline void fastlb_store32(void *p, uint32_t v) { memcpy(p, &v, 4); }
static inline void fastlb_store64(void *p, uint64_t v) { memcpy(p, &v, 8); }

/* The low and the high half of a 128-bit product, folded: the mixing step of XXH3 and of the flow table. */
static inline uint64_t fastlb_mul_fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}
static inline uint64_t fastlb_mul_high(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastlb supports little-endian machines only (x86-64, aarch64)"
#endif

#endif
