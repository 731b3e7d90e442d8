# The Python face of worker.pxd, ring.pxd and transmit.pxd.

cdef class Ring:
    """A TPACKET_V3 receive ring on one interface, behind a socket filter, mapped into memory.

    ``filter_fd``: a loaded eBPF socket filter. ``block_size``: bytes, a power of two of at least 128 KiB, so that the
    longest super-frame fits. ``timeout_ms``: after which a block that is not full is handed over. Raises OSError.
    """

    def __init__(self, str interface, int filter_fd, uint32_t block_size, uint32_t blocks, uint32_t timeout_ms):
        cdef void *memory
        self.interface = interface
        self.totals = {"ring_packets": 0, "ring_drops": 0, "ring_freezes": 0}
        self.socket = packet_socket()
        self.ring.ifindex = if_nametoindex(interface)
        self.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_RESERVE, HEADROOM)
        self.socket.setsockopt(SOL_SOCKET, SO_ATTACH_BPF, filter_fd)
        self.socket.setsockopt(
            SOL_PACKET, PACKET_RX_RING, pack("7I", block_size, blocks, block_size, blocks, timeout_ms, 0, 0))
        self.size = <size_t>block_size * blocks
        self.ring.fd = self.socket.fileno()
        memory = mmap(NULL, self.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, self.ring.fd, 0)
        if memory == MAP_FAILED:
            raise OSError(errno, f"cannot map the ring of {interface}")
        self.ring.memory = <uint8_t *>memory
        self.ring.block_size = block_size
        self.ring.blocks = blocks
        self.socket.bind((interface, ETH_P_ALL))         # last: no frame enters before the filter is there

    def statistics(self):
        """What the kernel counted for this ring since it was opened: packets, drops for want of room, freezes."""
        cdef tuple fresh = unpack("3I", self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 12))
        for name, value in zip(self.totals, fresh):
            self.totals[name] += value                   # reading resets the kernel's own
        return dict(self.totals)

    def close(self):
        """Unmap the ring and close its socket. The worker that reads it must have ended."""
        if self.ring.memory != NULL:
            munmap(self.ring.memory, self.size)
            self.ring.memory = NULL
        if self.socket is not None:
            self.socket.close()

    def __dealloc__(self):
        if self.ring.memory != NULL:
            munmap(self.ring.memory, self.size)


cdef class Worker:
    """Reads rings, runs a pipeline, transmits. ``run`` blocks without the GIL until ``stop`` is called."""

    def __init__(self, Pipeline pipeline not None, rings):
        cdef Ring ring
        self.pipeline = pipeline
        self.rings = list(rings)
        if not 0 < len(self.rings) <= MAX_RINGS:
            raise ValueError(f"a worker takes 1..{MAX_RINGS} rings, not {len(self.rings)}")
        self.socket = packet_socket()
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
        self.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        tx_init(&self.state.tx, self.socket.fileno(), pipeline.state.reasons)
        self.state.pipe = &pipeline.state
        self.state.publication = &pipeline.publication
        self.state.ring_count = len(self.rings)
        for i, ring in enumerate(self.rings):
            self.state.rings[i] = ring.ring
            self.state.fds[i].fd = ring.ring.fd
            self.state.fds[i].events = POLLIN
        self.state.fds[len(self.rings)].fd = self.bell
        self.state.fds[len(self.rings)].events = POLLIN

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

    def counters(self):
        """Totals of the transmit queue and of the rings."""
        totals = {
            "transmitted": self.state.tx.sent,
            "transmitted_bytes": self.state.tx.sent_bytes,
            "blocks_read": self.state.blocks_read,
        }
        for ring in self.rings:
            for name, value in ring.statistics().items():
                totals[name] = totals.get(name, 0) + value
        return totals

    def close(self):
        """Close the transmit socket; ``run`` must have returned."""
        self.socket.close()
        if self.bell is not None:
            close_fd(self.bell)
            self.bell = None


def packet_socket():
    """A raw packet socket that receives nothing until it is bound."""
    return socket(AF_PACKET, SOCK_RAW, 0)
