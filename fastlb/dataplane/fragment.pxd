"""Fragments: a later one has no ports and follows the first of its datagram.

The first fragment is classified, steered and tracked like any packet; what became of it is noted under the datagram's
addresses, number and protocol. A later one goes the same way. When it meets no note, because its first comes later or
is with another worker at this moment, it is held for a while.

    notes    shared by all workers: SETS sets of WAYS slots of a KiB, fixed; the oldest of a set makes way
    held     of one worker: MAX_HELD places, each for at most HOLD_MS. A place has addresses for the longest frame, and
             pages only as far as frames have reached: all together 1 MiB where the MTU is 1500, 3 MiB where it is
             9000, 17 MiB at most

Invariant: a slot is read and written only between `claim` and `release`, one compare-and-swap apart. Nobody waits for a
claim: a later fragment is held instead, a first takes another slot of its set. No two fragments that cover the same
bytes of a datagram are forwarded: `seen` has a bit for each of its 8-byte units. Nor are two that disagree about where
it ends. A datagram whose fragments have all
passed is forgotten at once, because fast senders use their 16-bit numbers again within seconds (RFC 4963).
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastlb.dataplane.checksum cimport difference, sum_addr, update_checksum
from fastlb.dataplane.flowhash cimport client_mix
from fastlb.dataplane.flowhash cimport fingerprint as flow_fingerprint
from fastlb.dataplane.machine cimport (
    claim, load_acquire_u64, mul_fold, must, store32, store_release_u32, store_release_u64)
from fastlb.dataplane.reasons cimport DROP_FRAGMENT_OVERLAP
from fastlb.dataplane.types cimport FAMILY_4, FRAGMENT_LATER, LEG_NONE, Addr, FlowTuple, Packet
from fastlb.dataplane.wire cimport IP4_CSUM, IP4_DST, IP4_SRC, IP6_DST, IP6_SRC, be_addr4, write_addr6


cdef enum:
    SETS = 1024
    WAYS = 4
    UNITS = 8192             # of eight bytes: the longest datagram
    WORDS = UNITS // 64
    LIFE_MS = 2000           # after the last fragment; they leave their sender back to back
    HOLD_MS = 500            # reordering by queues and workers takes far less; reassembly waits longer (RFC 8200: 60 s)
    MAX_HELD = 256
    HELD_HEADROOM = 128      # for outer headers, a tag and a virtio_net_hdr
    HELD_BYTES = 17 << 12    # whole pages for the longest packet of IPv6, 65,575 bytes, with link header and headroom
    HELD_FRAME = HELD_BYTES - HELD_HEADROOM


cdef struct FragmentNote:
    # What became of a datagram's first fragment.
    uint64_t key             # of the datagram; 0: empty
    uint64_t fingerprint     # of the flow
    Addr client              # of the flow, with its source port: see FlowTuple
    Addr vip
    uint32_t source
    uint32_t claimed
    uint32_t time            # of the last fragment, in milliseconds
    uint32_t backend         # stable id; 0: the first fragment was dropped, or answered
    uint32_t leg             # LEG_NONE: it was left to the host
    uint32_t units           # seen
    uint32_t end             # of the datagram, in bytes; 0: not known
    uint32_t reached         # the highest byte of it that has passed, and one
    uint64_t seen[WORDS]


cdef struct HeldFragment:
    Packet packet
    uint64_t key
    uint32_t since


cdef struct FragmentState:
    # One worker's view: the notes are everybody's, the rest is its own.
    FragmentNote *notes
    HeldFragment *slots
    uint8_t *memory          # HELD_BYTES bytes for each of them
    uint16_t order[MAX_HELD]  # the places; those in use come first
    uint32_t count           # of them
    uint32_t checked_at      # when they were looked through last, in milliseconds
    bint noted               # a first fragment came since then


# --- notes -----------------------------------------------------------------------------------------------------------

cdef inline uint64_t datagram_key(const uint64_t *key, const Packet *p) noexcept nogil:
    """Return the datagram's hash, never 0. It is taken under the flow table's secret key, so that nobody outside can
    aim at a slot."""
    cdef uint64_t mixed = flow_fingerprint(key, client_mix(key, p.src, 0, p.protocol, p.family), p.dst, 0, False)
    mixed = mul_fold(mixed ^ <uint64_t>p.datagram * <uint64_t>0x9E3779B97F4A7C15ULL, key[2] ^ mixed)
    return mixed | (mixed == 0)


cdef inline bint has_expired(const FragmentNote *note, uint32_t now) noexcept nogil:
    return <int32_t>(now - note.time) > LIFE_MS


cdef inline FragmentNote *set_of(FragmentState *state, uint64_t key) noexcept nogil:
    return &state.notes[(key >> 32 & (SETS - 1)) * WAYS]


cdef inline void release(FragmentNote *note) noexcept nogil:
    store_release_u32(&note.claimed, 0)


cdef inline FragmentNote *find_note(FragmentState *state, uint64_t key, uint32_t now) noexcept nogil:
    """Return the datagram's note, claimed; NULL if none lives, or another worker has it."""
    cdef FragmentNote *note = set_of(state, key)
    cdef int _way
    for _way in range(WAYS):
        if load_acquire_u64(&note.key) == key and claim(&note.claimed):
            if note.key == key and not has_expired(note, now):
                return note
            release(note)
        note += 1
    return NULL


cdef inline void release_claimed(FragmentState *state) noexcept nogil:
    """Release what dead workers had claimed, and empty it: what they were writing means nothing. Call only while no
    worker runs."""
    cdef int at
    for at in range(SETS * WAYS):
        if state.notes[at].claimed:
            store_release_u64(&state.notes[at].key, 0)
            release(&state.notes[at])


cdef inline uint32_t quiet_for(const FragmentNote *note, uint32_t now) noexcept nogil:
    """Return for how many milliseconds no fragment has come; an empty slot has been quiet for ever."""
    return now - note.time if note.key != 0 else 0xFFFFFFFFU


cdef inline FragmentNote *new_note(FragmentState *state, uint64_t key, uint32_t now) noexcept nogil:
    """Return an emptied slot, claimed: a free one of the set, or the one that has been quiet longest. NULL if others
    have claimed all of them.

    The datagram must have none that lives (`admit_first`).
    """
    cdef FragmentNote *note = set_of(state, key)
    cdef FragmentNote *oldest = NULL
    cdef int _way
    for _way in range(WAYS):
        if claim(&note.claimed):
            if oldest == NULL or quiet_for(note, now) > quiet_for(oldest, now):
                if oldest != NULL:
                    release(oldest)
                oldest = note
            else:
                release(note)
        note += 1
    if oldest != NULL:
        begin(oldest, key, now)
    return oldest


cdef inline void begin(FragmentNote *note, uint64_t key, uint32_t now) noexcept nogil:
    memset(note.seen, 0, sizeof(note.seen))
    note.units = note.end = note.reached = 0
    note.time = now
    store_release_u64(&note.key, key)


cdef inline uint64_t bits(uint32_t first, uint32_t end) noexcept nogil:
    """Return a word with the bits from `first` up to `end` set; `end` is at most 64."""
    return (~<uint64_t>0 >> (64 - (end - first))) << first


cdef inline bint agrees(const FragmentNote *note, const Packet *p, uint32_t reached) noexcept nogil:
    """True if the fragment does not contradict others about where the datagram ends."""
    if p.more:
        return note.end == 0 or reached <= note.end
    return note.end == 0 and reached >= note.reached


cdef inline int account(FragmentNote *note, const Packet *p, uint32_t now) noexcept nogil:
    """Count a fragment's bytes as passed. Returns 0, or the drop reason if some of them had passed before, or it
    contradicts others.

    Bounded by the words of `seen`.
    """
    cdef uint32_t first = p.offset // 8
    cdef uint32_t reached = <uint32_t>p.offset + p.payload
    cdef uint32_t end = (reached + 7) // 8
    cdef uint32_t at = first
    cdef uint32_t stop
    must(first < end <= UNITS)
    if not agrees(note, p, reached):
        return DROP_FRAGMENT_OVERLAP
    while at < end:
        stop = min(end, (at // 64 + 1) * 64)
        if note.seen[at // 64] & bits(at % 64, stop - at // 64 * 64):
            return DROP_FRAGMENT_OVERLAP
        at = stop
    at = first
    while at < end:
        stop = min(end, (at // 64 + 1) * 64)
        note.seen[at // 64] |= bits(at % 64, stop - at // 64 * 64)
        at = stop
    note.units += end - first
    note.time = now
    note.reached = max(note.reached, reached)
    if not p.more:
        note.end = reached
    return 0


cdef inline void finish(FragmentNote *note) noexcept nogil:
    """Release the note; if its datagram has passed whole, it is empty then."""
    if note.end != 0 and note.units >= (note.end + 7) // 8:
        store_release_u64(&note.key, 0)
    release(note)


cdef inline int admit_first(FragmentState *state, uint64_t key, uint32_t now) noexcept nogil:
    """Return 0, or the drop reason of a first fragment whose datagram has had one already. A note of the host's is
    forgotten: its number is used again."""
    cdef FragmentNote *note = find_note(state, key, now)
    cdef int reason = DROP_FRAGMENT_OVERLAP
    if note == NULL:
        return 0
    if note.leg == LEG_NONE:
        store_release_u64(&note.key, 0)
        reason = 0
    release(note)
    return reason


cdef inline void note_first(
        FragmentState *state, uint64_t key, const Packet *p, uint32_t leg, uint32_t backend, const FlowTuple *flow,
        uint32_t now) noexcept nogil:
    """Note what became of a first fragment: of which flow it is, or by backend 0 that it was not forwarded."""
    cdef FragmentNote *note = new_note(state, key, now)
    if note == NULL:
        return
    note.leg, note.backend = leg, backend
    note.client, note.vip = flow.client, flow.vip
    note.source, note.fingerprint = p.source, p.fingerprint
    account(note, p, now)
    finish(note)
    state.noted = True


cdef inline void note_passed(FragmentState *state, uint64_t key, const Packet *p, uint32_t now) noexcept nogil:
    """Note that a first fragment is the host's, and so are those that follow. An older note with its number is over."""
    cdef FragmentNote *note = find_note(state, key, now)
    if note == NULL:
        note = new_note(state, key, now)
    else:
        begin(note, key, now)
    if note == NULL:
        return
    note.leg, note.backend = LEG_NONE, 0
    account(note, p, now)
    finish(note)
    state.noted = True


# --- held ------------------------------------------------------------------------------------------------------------

cdef inline bint hold(FragmentState *state, const Packet *p, uint64_t key, uint32_t now) noexcept nogil:
    """Copy a fragment to a slot of its own. Returns False if none is free, or the frame is longer than any packet."""
    cdef uint32_t at
    cdef HeldFragment *held
    if state.count == MAX_HELD or p.length > HELD_FRAME:
        return False
    at = state.order[state.count]
    held = &state.slots[at]
    state.count += 1
    held.packet = p[0]
    held.packet.frame = state.memory + at * HELD_BYTES + HELD_HEADROOM
    memcpy(held.packet.frame, p.frame, p.length)
    held.key = key
    held.since = now
    return True


cdef inline HeldFragment *held_at(FragmentState *state, uint32_t at) noexcept nogil:
    must(at < state.count)
    return &state.slots[state.order[at]]


cdef inline bint waited(const HeldFragment *held, uint32_t now) noexcept nogil:
    """True if the fragment has waited long enough."""
    return <int32_t>(now - held.since) > HOLD_MS


cdef inline void free_slot(FragmentState *state, uint32_t at) noexcept nogil:
    """Free the slot at this position; the last one in use takes its position."""
    must(at < state.count)
    state.count -= 1
    state.order[at], state.order[state.count] = state.order[state.count], state.order[at]


# --- the way of the first --------------------------------------------------------------------------------------------

cdef inline void readdress(Packet *p, Addr src, Addr dst) noexcept nogil:
    """Give a later fragment the addresses with which the first one left. The transport checksum is in the first."""
    cdef uint8_t *ip = p.frame + p.l3
    must(p.fragment == FRAGMENT_LATER)
    if p.family == FAMILY_4:
        update_checksum(
            ip + IP4_CSUM, difference(sum_addr(p.src) + sum_addr(p.dst), sum_addr(src) + sum_addr(dst)))
        store32(ip + IP4_SRC, be_addr4(src))
        store32(ip + IP4_DST, be_addr4(dst))
    else:
        write_addr6(ip + IP6_SRC, src)
        write_addr6(ip + IP6_DST, dst)
