"""A load generator that works without the GIL, and the reader of the time stamps that its frames bear.

A stamped frame carries, STAMP bytes from its start, the nanoseconds of CLOCK_REALTIME just before it was sent. The
kernel writes the same clock's time of arrival into a TPACKET_V2 ring, slot by slot; `read_latencies` compares the two
when all is over, so that nothing runs at the receiving end meanwhile.

`Handover` is what the machine itself takes to let one core know of something on another, without any network.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from cpython cimport array

import array

from fastlb.dataplane.abi cimport (
    POLLIN, TP_STATUS_USER, clock_gettime, errno, eventfd_write, iovec, mmsghdr, poll, pollfd, sendmmsg, sendto,
    timespec,
)
from fastlb.dataplane.checksum cimport difference, update_checksum
from fastlb.dataplane.machine cimport (
    load16, load32, load64, load_acquire_u32, spin_pause, store16, store32, store64, store_release_u32)

cdef extern from "<linux/if_packet.h>" nogil:
    struct tpacket2_hdr:
        uint32_t tp_status
        uint32_t tp_sec
        uint32_t tp_nsec
        unsigned short tp_mac

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_MONOTONIC
        CLOCK_REALTIME
    int nanosleep(const timespec *duration, timespec *rest) noexcept

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *data, size_t length) noexcept


cdef enum:
    BATCH = 32               # frames a system call; also the grain of a paced flood
    STAMP = 42               # behind the Ethernet, IPv4 and UDP headers
    IP_CHECKSUM = 24         # in a frame with TCP over IPv4 without options
    IP_SOURCE = 26
    TCP_SOURCE = 34
    TCP_CHECKSUM = 50
    SCATTERED = 100          # the first byte of addresses
    LEAD_NS = 200 * 1000     # of a sleep, before the time that is waited for: the rest is spun


cdef inline int64_t nanoseconds(int clock) noexcept nogil:
    cdef timespec now
    clock_gettime(clock, &now)
    return now.tv_sec * 1000000000 + now.tv_nsec


cdef inline void wait_until(int64_t due) noexcept nogil:
    """By the monotonic clock. Sleeps as long as there is time for it, and then spins."""
    cdef int64_t left = due - nanoseconds(CLOCK_MONOTONIC)
    cdef timespec duration
    if left > 2 * LEAD_NS:
        duration.tv_sec = (left - LEAD_NS) // 1000000000
        duration.tv_nsec = (left - LEAD_NS) % 1000000000
        nanosleep(&duration, NULL)
    while nanoseconds(CLOCK_MONOTONIC) < due:
        pass


cdef class Load:
    """Sends the same frames round and round by a packet socket.

    ``frames``: bytes, all of one length. ``scattered``: TCP over IPv4, each to be sent from another random address of
    100.0.0.0/8 and port every time, with its checksums. Raises OSError when the kernel refuses one.
    """

    cdef object sender
    cdef mmsghdr *messages
    cdef iovec *vectors
    cdef uint8_t *memory
    cdef uint32_t count
    cdef uint32_t length
    cdef uint32_t following
    cdef int fd
    cdef bint scattered
    cdef uint64_t dice

    def __cinit__(self, sender, frames, bint scattered=False):
        cdef bytes frame
        cdef uint32_t at
        self.sender, self.fd = sender, sender.fileno()
        self.count, self.length = len(frames), len(frames[0])
        self.scattered, self.dice = scattered, 0x9E3779B97F4A7C15
        self.memory = <uint8_t *>calloc(self.count, self.length)
        self.vectors = <iovec *>calloc(self.count, sizeof(iovec))
        self.messages = <mmsghdr *>calloc(self.count, sizeof(mmsghdr))
        if self.memory == NULL or self.vectors == NULL or self.messages == NULL:
            raise MemoryError
        for at, frame in enumerate(frames):
            if len(frame) != <Py_ssize_t>self.length:
                raise ValueError("frames differ in length")
            memcpy(self.frame(at), <const char *>frame, self.length)
            self.vectors[at].iov_base = self.frame(at)
            self.vectors[at].iov_len = self.length
            self.messages[at].msg_hdr.msg_iov = &self.vectors[at]
            self.messages[at].msg_hdr.msg_iovlen = 1

    cdef inline uint8_t *frame(self, uint32_t at) noexcept nogil:
        return self.memory + <size_t>at * self.length

    def flood(self, uint64_t total, double rate=0):
        """Send ``total`` frames, ``rate`` a second or, with 0, as many as can be; the seconds it took."""
        cdef int64_t start = nanoseconds(CLOCK_MONOTONIC)
        cdef uint64_t sent = 0
        cdef int done = 1
        with nogil:
            while sent < total and done > 0:
                if rate:
                    wait_until(start + <int64_t>(sent / rate * 1e9))
                done = self.send_batch(total - sent)
                sent += done
        if done <= 0:
            raise OSError(errno, "the generator cannot send")
        return (nanoseconds(CLOCK_MONOTONIC) - start) * 1e-9

    cdef int send_batch(self, uint64_t most) noexcept nogil:
        """The next few frames; how many, or less than one when the kernel refuses."""
        cdef uint32_t count = min(min(<uint64_t>BATCH, most), <uint64_t>(self.count - self.following))
        cdef uint32_t at
        cdef int sent
        for at in range(count if self.scattered else 0):
            self.scatter(self.frame(self.following + at))
        sent = sendmmsg(self.fd, &self.messages[self.following], count, 0)
        if sent > 0:
            self.following = (self.following + sent) % self.count
        return sent

    cdef void scatter(self, uint8_t *frame) noexcept nogil:
        """Another source: 24 bits of the address, 16 of the port. xorshift64 (Marsaglia, 2003)."""
        cdef uint32_t address
        cdef uint16_t port
        cdef uint64_t addresses, ports
        self.dice ^= self.dice << 13
        self.dice ^= self.dice >> 7
        self.dice ^= self.dice << 17
        address = SCATTERED | <uint32_t>self.dice << 8
        port = <uint16_t>(self.dice >> 40)
        addresses = difference(load32(frame + IP_SOURCE), address)
        ports = difference(load16(frame + TCP_SOURCE), port)
        store32(frame + IP_SOURCE, address)
        store16(frame + TCP_SOURCE, port)
        update_checksum(frame + IP_CHECKSUM, addresses)
        update_checksum(frame + TCP_CHECKSUM, addresses + ports)

    def send_stamped(self, array.array times not None):
        """Send one stamped frame at each of these times, in nanoseconds from now, an array of type "q"."""
        cdef const int64_t *due = <const int64_t *>times.data.as_longlongs
        cdef uint32_t count = len(times)
        cdef int64_t start = nanoseconds(CLOCK_MONOTONIC)
        cdef uint32_t sent = 0
        with nogil:
            while sent < count:
                wait_until(start + due[sent])
                if self.send_one() < 0:
                    break
                sent += 1
        if sent < count:
            raise OSError(errno, "the generator cannot send")

    cdef ssize_t send_one(self) noexcept nogil:
        cdef uint8_t *frame = self.frame(self.following)
        self.following = (self.following + 1) % self.count
        store64(frame + STAMP, nanoseconds(CLOCK_REALTIME))
        return sendto(self.fd, frame, self.length, 0, NULL, 0)

    def __dealloc__(self):
        free(self.messages)
        free(self.vectors)
        free(self.memory)


cdef class Handover:
    """Two threads, one on each core: `post` writes a time stamp, `watch` notes how late it sees that.

    Instead of packets through a balancer: what is left is the machine's own share. ``bell``: an eventfd, on which the
    watcher sleeps in poll(); -1: it spins. ``count``: how many stamps.
    """

    cdef int64_t *stamps
    cdef uint32_t count
    cdef uint32_t posted
    cdef int bell

    def __cinit__(self, uint32_t count, int bell):
        self.count, self.bell = count, bell
        self.stamps = <int64_t *>calloc(count, sizeof(int64_t))
        if self.stamps == NULL:
            raise MemoryError

    def post(self, array.array times not None):
        """At each of these times, in nanoseconds from now, an array of type "q" and length ``count``."""
        cdef const int64_t *due = <const int64_t *>times.data.as_longlongs
        cdef int64_t start = nanoseconds(CLOCK_MONOTONIC)
        cdef uint32_t at
        if <Py_ssize_t>self.count != len(times):
            raise ValueError(f"{len(times)} times for {self.count} stamps")
        with nogil:
            for at in range(self.count):
                wait_until(start + due[at])
                self.stamps[at] = nanoseconds(CLOCK_MONOTONIC)
                store_release_u32(&self.posted, at + 1)
                if self.bell >= 0:
                    eventfd_write(self.bell, 1)

    def watch(self, double seconds):
        """Nanoseconds that each stamp was old when it was seen, an array of type "q"; waits so many seconds at most."""
        cdef array.array found = array.array("q", bytes(self.count * sizeof(int64_t)))
        cdef int64_t *ages = <int64_t *>found.data.as_longlongs
        cdef int64_t end = nanoseconds(CLOCK_MONOTONIC) + <int64_t>(seconds * 1e9)
        cdef uint32_t seen = 0, posted
        cdef int64_t now = 0
        with nogil:
            while seen < self.count and now < end:
                if self.bell >= 0:
                    self.sleep()
                else:
                    spin_pause()
                posted = load_acquire_u32(&self.posted)
                now = nanoseconds(CLOCK_MONOTONIC)
                while seen < posted:
                    ages[seen] = now - self.stamps[seen]
                    seen += 1
        return found[:seen]

    cdef void sleep(self) noexcept nogil:
        cdef pollfd bell
        cdef uint64_t rings
        bell.fd, bell.events = self.bell, POLLIN
        if poll(&bell, 1, 1000) > 0:
            read(self.bell, &rings, sizeof(rings))

    def __dealloc__(self):
        free(self.stamps)


def read_latencies(uintptr_t ring, uint32_t slots, uint32_t slot_size):
    """Nanoseconds from stamp to arrival of every frame in a TPACKET_V2 ring that nobody has read yet, in order."""
    cdef array.array found = array.array("q")
    cdef const tpacket2_hdr *slot
    cdef int64_t arrived, sent
    cdef uint32_t at
    for at in range(slots):
        slot = <const tpacket2_hdr *>(ring + <size_t>at * slot_size)
        if not load_acquire_u32(&slot.tp_status) & TP_STATUS_USER:
            break
        arrived = <int64_t>slot.tp_sec * 1000000000 + slot.tp_nsec
        sent = <int64_t>load64(<const uint8_t *>slot + slot.tp_mac + STAMP)
        found.append(arrived - sent)
    return found
