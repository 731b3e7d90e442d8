# The Python face of worker.pxd, ring.pxd, transmit.pxd and xsk.pxd.

OFFLOAD_TYPE, OFFLOAD_LINKS = ETHERTYPE_OFFLOAD, MAX_OFFLOADS

cdef class RingMemory:
    """Address space for all rings of a worker, side by side, so that a transmit socket can register them as one.

    ``rings``: how many there will be. ``block_size``: bytes, a power of two of at least 128 KiB, so that the longest
    GSO packet fits. ``blocks``: of each ring.
    """

    def __init__(self, uint32_t rings, uint32_t block_size, uint32_t blocks):
        self.ring_size = <size_t>block_size * blocks
        self.size = self.ring_size * rings
        self.block_size, self.blocks = block_size, blocks
        self.base = <uint8_t *>mmap(
            NULL, self.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.base == MAP_FAILED:
            self.base = NULL
            raise OSError(errno, f"no address space for rings of {self.size} bytes")

    cdef int map_ring(self, RxRing *ring, bint open_blocks) except -1:
        """Map a ring's blocks behind those of the rings before it."""
        cdef uint8_t *at = self.base + self.used
        if self.used + self.ring_size > self.size:
            raise ValueError("this memory was made for fewer rings")
        if mmap(at, self.ring_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE | MAP_FIXED, ring.fd, 0) != at:
            raise OSError(errno, "cannot map the ring")
        init_ring(ring, at, <uint32_t>(self.used // self.block_size), self.block_size, self.blocks, open_blocks)
        self.used += self.ring_size
        return 0

    def close(self):
        """Unmap everything. The worker that uses it must have ended."""
        if self.base != NULL:
            munmap(self.base, self.size)
            self.base = NULL

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.size)


cdef class Ring:
    """A TPACKET_V3 receive ring on one interface, behind a socket filter, mapped into ``memory``.

    ``filter_fd``: a loaded eBPF socket filter. ``timeout_ms``: after which a block that is not full is handed over.
    ``open_blocks``: read frames before that; see ring.pxd for what that rests on. Raises OSError.
    """

    def __init__(
            self, str interface, int filter_fd, RingMemory memory not None, uint32_t timeout_ms,
            bint open_blocks=False):
        self.interface = interface
        self.memory = memory
        self.totals = {"ring_packets": 0, "ring_drops": 0, "ring_freezes": 0}
        self.socket = packet_socket()
        self.ring.ifindex = if_nametoindex(interface)
        self.ring.fd = self.socket.fileno()
        self.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_RESERVE, HEADROOM)
        self.socket.setsockopt(SOL_SOCKET, SO_ATTACH_BPF, filter_fd)
        self.socket.setsockopt(SOL_PACKET, PACKET_RX_RING, pack(
            "7I", memory.block_size, memory.blocks, memory.block_size, memory.blocks, timeout_ms, 0, 0))
        memory.map_ring(&self.ring, open_blocks)
        self.socket.bind((interface, ETH_P_ALL))         # last: no frame enters before the filter is there

    def join(self, int group):
        """Join a PACKET_FANOUT group, whose program chooses the frames from then on, and drop the own filter.

        ``group``: the option's value, as workers/fanout.py gives it. Raises OSError.
        """
        self.socket.setsockopt(SOL_PACKET, PACKET_FANOUT, group)
        self.socket.setsockopt(SOL_SOCKET, SO_DETACH_FILTER, 0)

    def take(self, uint32_t most, size_t room, double seconds):
        """Take up to ``most`` frames with together ``room`` bytes, as a list of (frame, whether its block was still
        open).

        Ends after ``seconds`` without another frame. For a ring that no worker reads.
        """
        cdef uint8_t *copies = <uint8_t *>zeroed(room, 1)
        cdef Taken *taken = <Taken *>zeroed(most, sizeof(Taken))
        cdef uint32_t count, i
        cdef uint8_t *at = copies
        with nogil:
            count = take_frames(&self.ring, taken, most, copies, room, <uint64_t>(seconds * 1e9))
        found = []
        for i in range(count):
            found.append((PyBytes_FromStringAndSize(<char *>at, taken[i].length), taken[i].early))
            at += taken[i].length
        free(copies)
        free(taken)
        return found

    def statistics(self):
        """Return what the kernel counted for this ring since it was opened: packets, drops for want of room,
        freezes."""
        cdef tuple fresh = unpack("3I", self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 12))
        for name, value in zip(self.totals, fresh):
            self.totals[name] += value                   # reading resets the kernel's own
        return dict(self.totals)

    def close(self):
        """Close the socket; the memory stays mapped until it is closed itself."""
        self.socket.close()


cdef struct Taken:
    uint32_t length
    bint early


cdef uint32_t take_frames(
        RxRing *ring, Taken *taken, uint32_t most, uint8_t *copies, size_t room, uint64_t patience_ns) noexcept nogil:
    """Copy frames out of a ring, one behind the other. Returns how many."""
    cdef uint64_t deadline = clock_ns() + patience_ns
    cdef tpacket3_hdr *slot
    cdef Packet packet
    cdef uint32_t count = 0
    cdef bint closed
    while count < most and clock_ns() < deadline:
        if not has_frames(ring):
            spin_pause()
            continue
        closed = is_closed(ring)
        slot = next_slot(ring, closed)
        if slot == NULL:
            hold_block(ring)
            kernel_may_refill(ring)
            continue
        if take_frame(ring, slot, &packet) == 0:
            if packet.length > room:
                break
            memcpy(copies, packet.frame, packet.length)
            copies += packet.length
            room -= packet.length
            taken[count].length, taken[count].early = packet.length, not closed
            count += 1
            deadline = clock_ns() + patience_ns
        advance(ring, slot, closed)
    return count


cdef class Worker:
    """Reads rings, runs a pipeline, transmits. ``run`` blocks without the GIL until ``stop`` is called.

    ``bells``: descriptors of doorbell sockets, at most one for each ring; they stay the caller's. ``asleep``: the word
    that their program looks at, as a writable buffer of four bytes; needed with bells. ``spin_us``: how long, in
    microseconds, a worker that finds nothing looks for further frames before it sleeps.
    """

    def __init__(self, Pipeline pipeline not None, rings, bells=(), asleep=None, uint32_t spin_us=0):
        cdef Ring ring
        self.pipeline = pipeline
        self.rings = list(rings)
        if not 0 < len(self.rings) <= MAX_RINGS:
            raise ValueError(f"a worker takes 1..{MAX_RINGS} rings, not {len(self.rings)}")
        self.socket = packet_socket()
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
        self.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        init_messages(&self.state.out.messages, self.socket.fileno(), pipeline.state.reasons)
        self.memory = (<Ring>self.rings[0]).memory
        self.state.out.memory = self.memory.base
        self.state.out.block_shift = self.memory.block_size.bit_length() - 1
        self.state.out.reasons = pipeline.state.reasons
        self.state.pipe = &pipeline.state
        self.state.publication = &pipeline.publication
        self.state.ring_count = len(self.rings)
        for i, ring in enumerate(self.rings):
            self.state.rings[i] = ring.ring
        self.listen_to([(<Ring>each).ring.fd for each in self.rings], list(bells), asleep)
        self.state.spin_ns = <uint64_t>spin_us * 1000

    cdef int listen_to(self, list rings, list bells, asleep) except -1:
        """Set what ends a sleep."""
        if len(bells) > len(rings):
            raise ValueError(f"{len(bells)} doorbells for {len(rings)} rings")
        if bells and asleep is None:
            raise ValueError("doorbells need the word that their program looks at")
        for at, fd in enumerate([*rings, self.bell, *bells]):
            self.state.fds[<int>at].fd = fd
            self.state.fds[<int>at].events = POLLIN
            self.state.fd_count += 1
        if asleep is not None:
            PyObject_GetBuffer(asleep, &self.asleep, PyBUF_WRITABLE)
            if self.asleep.len != sizeof(uint32_t):
                raise ValueError(f"the word of a doorbell has 4 bytes, not {self.asleep.len}")
            self.state.asleep = <uint32_t *>self.asleep.buf
        return 0

    def run(self):
        """Work until stopped. Needs a published snapshot; one thread only."""
        if not self.pipeline.snapshots:
            raise RuntimeError("publish services and routes first")
        pick_up(&self.pipeline.publication)
        self.pipeline.running = True
        try:
            with nogil:
                run_worker(&self.state)
        finally:
            self.pipeline.running = False
            self.stopped = True

    def stop(self):
        """Ask ``run`` to return: within one block, or at once when it sleeps. From any thread."""
        store_release_u32(&self.state.stopping, 1)
        eventfd_write(self.bell, 1)

    # --- AF_XDP ----------------------------------------------------------------------------------------------------

    def open_xsk(self, uint32_t ifindex, uint32_t queue=0):
        """Send on this interface by AF_XDP from now on. Raises OSError when kernel or device refuse; nothing changes.

        Also after a socket on this interface failed. From the thread that owns the worker, which may be running.
        """
        cdef Xsk *xsk = self.slot_of(ifindex)
        if xsk == NULL:
            raise OSError(ENOBUFS, f"more than {MAX_XSKS} interfaces to send on")
        if load_acquire_u32(&xsk.state) == XSK_READY:
            return
        release_xsk(xsk)
        self.open_in(xsk, ifindex, queue)
        store_release_u32(&xsk.state, XSK_READY)

    cdef int open_in(self, Xsk *xsk, uint32_t ifindex, uint32_t queue) except -1:
        """Open a socket over the memory that another socket has registered, or register it anew."""
        cdef const Xsk *other = self.any_xsk()
        if other != NULL:
            try:
                return open_xsk(xsk, self.memory, ifindex, queue, other.with_metadata, other.fd)
            except OSError as error:
                if error.errno == EBUSY:
                    raise                                # else it may have ended just now, with its registration
        try:
            return open_xsk(xsk, self.memory, ifindex, queue, True, -1)
        except OSError as error:
            if error.errno == EBUSY:
                raise
            return open_xsk(xsk, self.memory, ifindex, queue, False, -1)  # a kernel before 6.8

    cdef const Xsk *any_xsk(self) noexcept:
        cdef int i
        for i in range(MAX_XSKS):
            if load_acquire_u32(&self.state.out.xsks[i].state) == XSK_READY:
                return &self.state.out.xsks[i]
        return NULL

    def close_xsk(self, uint32_t ifindex):
        """Clear up after a socket that ended, which frees the interface's queue soon after. One that has not ended is
        closed by the worker within its next round, and then needs another call."""
        cdef Xsk *xsk
        cdef int i
        for i in range(MAX_XSKS):
            xsk = &self.state.out.xsks[i]
            if xsk.ifindex == ifindex:
                if load_acquire_u32(&xsk.state) == XSK_READY:
                    store_release_u32(&xsk.unwanted, 1)
                else:
                    release_xsk(xsk)

    cdef Xsk *slot_of(self, uint32_t ifindex) noexcept:
        cdef int i
        for i in range(MAX_XSKS):
            if self.state.out.xsks[i].ifindex == ifindex:
                return &self.state.out.xsks[i]
        for i in range(MAX_XSKS):                        # one that was never used, or whose interface may be gone
            if load_acquire_u32(&self.state.out.xsks[i].state) != XSK_READY:
                return &self.state.out.xsks[i]
        return NULL

    def xsks(self):
        """Return the interfaces that have, or had, an AF_XDP socket: {interface index: None, or the errno that ended
        it}.

        0 stands for a link that no longer completed what was sent.
        """
        cdef const Xsk *xsk
        cdef int i
        found = {}
        for i in range(MAX_XSKS):
            xsk = &self.state.out.xsks[i]
            if xsk.ifindex:
                found[xsk.ifindex] = None if load_acquire_u32(&xsk.state) == XSK_READY else xsk.error
        return found

    # --- tunnel offload --------------------------------------------------------------------------------------------

    def offload_tunnels(self, links):
        """Do not cut GSO packets in tunnels that leave by these interfaces, because the egress of each has the program
        of tunnel_offload.py. May be called while the worker runs, from the thread that owns it.

        ``links``: interface indices, which replace those of the last call. Raises ValueError for more than
        OFFLOAD_LINKS.
        """
        cdef list wanted = sorted(links)
        cdef int i
        if len(wanted) > MAX_OFFLOADS:
            raise ValueError(f"tunnels are offloaded on at most {MAX_OFFLOADS} interfaces, not {len(wanted)}")
        for i in range(MAX_OFFLOADS):
            store_release_u32(&self.state.out.offloads[i], wanted[i] if i < len(wanted) else 0)

    def counters(self):
        """Totals of the transmit queue and of the rings."""
        totals = {
            "transmitted": self.state.out.messages.sent + self.state.out.posted,
            "transmitted_bytes": self.state.out.messages.sent_bytes + self.state.out.posted_bytes,
            "transmitted_xdp": self.state.out.posted,
            "tunnels_offloaded": self.state.out.offloaded,
            "blocks_read": self.state.blocks_read,
            "read_early": self.state.early,
            "sleeps": self.state.sleeps,
        }
        for ring in self.rings:
            for name, value in ring.statistics().items():
                totals[name] = totals.get(name, 0) + value
        return totals

    @property
    def rounds(self):
        """How often the loop has gone round: a worker that is alive does so at least ten times a second."""
        return load_acquire_u64(&self.state.rounds)

    def close(self):
        """Close the transmit sockets; ``run`` must have returned, or its thread have died."""
        cdef int i
        self.pipeline.running = False
        for i in range(MAX_XSKS):
            if self.state.out.xsks[i].state == XSK_READY:
                close_fd(self.state.out.xsks[i].fd)
            release_xsk(&self.state.out.xsks[i])
        self.socket.close()
        if self.bell is not None:
            close_fd(self.bell)
            self.bell = None
        self.state.asleep = NULL
        PyBuffer_Release(&self.asleep)

    def __dealloc__(self):
        PyBuffer_Release(&self.asleep)


def packet_socket():
    """Return a raw packet socket that receives nothing until it is bound."""
    return socket(AF_PACKET, SOCK_RAW, 0)


assert_equal(sizeof(tpacket_block_desc), BLOCK_HEADER)
assert_equal(sizeof(tpacket3_hdr) + sizeof(sockaddr_ll), SLOT_HEADER)


cdef int open_xsk(
        Xsk *xsk, RingMemory memory, uint32_t ifindex, uint32_t queue, bint with_metadata, int shared) except -1:
    """Open a transmit-only AF_XDP socket over the rings; on an error the slot stays empty.

    ``shared``: an open socket that has registered them, with metadata or without; -1: this one registers them.
    """
    cdef int fd = open_socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0)
    if fd < 0:
        raise OSError(errno, "this kernel has no AF_XDP")
    try:
        if shared < 0:
            register_umem(fd, memory, with_metadata)
        size_rings(fd)
        map_xsk(xsk, fd)
        xsk.blocks = <uint32_t>(memory.size // memory.block_size)
        xsk.outstanding = <uint32_t *>zeroed(xsk.blocks, sizeof(uint32_t))
        bind_xsk(fd, ifindex, queue, shared)
    except BaseException:
        close_fd(fd)
        release_xsk(xsk)
        raise
    xsk.fd = fd
    xsk.ifindex = ifindex
    xsk.with_metadata = with_metadata
    return 0


cdef int option(int fd, int name, void *value, uint32_t length, str what) except -1:
    if setsockopt(fd, SOL_XDP, name, value, length):
        raise OSError(errno, f"AF_XDP: {what}")
    return 0


cdef int register_umem(int fd, RingMemory memory, bint with_metadata) except -1:
    cdef umem_reg umem
    memset(&umem, 0, sizeof(umem))
    umem.addr = <uint64_t>memory.base
    umem.len = memory.used
    umem.chunk_size = XSK_CHUNK
    umem.flags = UMEM_UNALIGNED
    if with_metadata:
        umem.flags |= UMEM_TX_METADATA
        umem.tx_metadata_len = XSK_METADATA
    option(fd, XDP_UMEM_REG, &umem, sizeof(umem), "cannot register the rings")
    return 0


cdef int size_rings(int fd) except -1:
    cdef int size = XSK_RING
    cdef int room = XSK_RING * XSK_CHUNK
    option(fd, XDP_UMEM_FILL_RING, &size, sizeof(size), "no fill ring")
    option(fd, XDP_UMEM_COMPLETION_RING, &size, sizeof(size), "no completion ring")
    option(fd, XDP_TX_RING, &size, sizeof(size), "no transmit ring")
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room))  # else the kernel copies a few hundred at most
    return 0


cdef int map_xsk(Xsk *xsk, int fd) except -1:
    cdef xdp_mmap_offsets offsets
    cdef uint32_t length = sizeof(offsets)
    if getsockopt(fd, SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &length):
        raise OSError(errno, "AF_XDP: no ring offsets")
    map_xsk_ring(&xsk.tx, fd, &offsets.tx, sizeof(xdp_desc), XDP_PGOFF_TX_RING)
    map_xsk_ring(&xsk.completions, fd, &offsets.cr, sizeof(uint64_t), XDP_UMEM_PGOFF_COMPLETION_RING)
    xsk.producer = 0
    xsk.in_flight = 0
    return 0


cdef int map_xsk_ring(XskRing *ring, int fd, const xdp_ring_offset *offset, size_t entry, int64_t page) except -1:
    cdef uint8_t *memory
    ring.length = offset.desc + XSK_RING * entry
    memory = <uint8_t *>mmap(NULL, ring.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, page)
    if memory == MAP_FAILED:
        raise OSError(errno, "AF_XDP: cannot map a ring")
    ring.memory = memory
    ring.producer = <uint32_t *>(memory + offset.producer)
    ring.consumer = <uint32_t *>(memory + offset.consumer)
    ring.entries = memory + offset.desc
    return 0


cdef int bind_xsk(int fd, uint32_t ifindex, uint32_t queue, int shared) except -1:
    cdef sockaddr_xdp address
    memset(&address, 0, sizeof(address))
    address.sxdp_family = AF_XDP
    if shared < 0:
        address.sxdp_flags = XDP_COPY | XDP_USE_NEED_WAKEUP
    else:
        address.sxdp_flags = XDP_SHARED_UMEM             # the other flags come with it
        address.sxdp_shared_umem_fd = <uint32_t>shared
    address.sxdp_ifindex = ifindex
    address.sxdp_queue_id = queue
    if bind_socket(fd, &address, sizeof(address)):
        raise OSError(errno, f"AF_XDP: cannot bind to queue {queue}")
    return 0


cdef void release_xsk(Xsk *xsk) noexcept:
    """Unmap what a closed socket left, and empty its slot."""
    if xsk.tx.memory != NULL:
        munmap(xsk.tx.memory, xsk.tx.length)
    if xsk.completions.memory != NULL:
        munmap(xsk.completions.memory, xsk.completions.length)
    free(xsk.outstanding)
    memset(xsk, 0, sizeof(Xsk))
