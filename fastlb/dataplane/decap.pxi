# The Python face of decap.pxd and coalesce.pxd.

TUNNEL_MODES = {"ipip": MODE_IPIP, "gre": MODE_GRE, "gue": MODE_GUE}


cdef class Decapsulator:
    """Takes packets out of their tunnels and writes them to a TUN device, TCP segments as GSO packets.

    ``tun_fd``: of a device with IFF_TUN, IFF_NO_PI and IFF_VNET_HDR, or of anything else that takes one packet behind a
    virtio_net_hdr a write; it stays the caller's. ``modes``: names of TUNNEL_MODES. ``port``: of GUE. ``key``: that GRE
    must have, None: it must have none. Raises ValueError.
    """

    def __init__(self, int tun_fd, *, modes=tuple(TUNNEL_MODES), int port=6080, key=None):
        unknown = set(modes) - set(TUNNEL_MODES)
        if unknown or not modes:
            raise ValueError(f"modes are some of {', '.join(TUNNEL_MODES)}, not {', '.join(modes) or 'none'}")
        if not 0 < port < 65536:
            raise ValueError(f"ports are 1..65535, not {port}")
        if key is not None and not 0 <= key < 1 << 32:
            raise ValueError(f"keys are 0..{(1 << 32) - 1}, not {key}")
        init_coalescer(&self.state.out, tun_fd)
        for mode in modes:
            self.state.modes |= <uint32_t>TUNNEL_MODES[mode]
        self.state.be_port = bswap16(<uint16_t>port)
        self.state.has_key = key is not None
        self.state.be_key = bswap32(<uint32_t>(key or 0))
        self.bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.bell < 0:
            raise OSError(errno, "cannot open an eventfd")

    def process(self, frames, vnet=bytes(VNET_HDR_LEN)):
        """Take these Ethernet frames as if a ring had brought them together, each with the virtio_net_hdr ``vnet``.

        What is inside them is written before this returns. Must not be called while ``run`` runs.
        """
        cdef Packet packet
        cdef Py_buffer view
        cdef list copies = []
        cdef bytes header = bytes(vnet)
        if len(header) != VNET_HDR_LEN:
            raise ValueError(f"a virtio_net_hdr has {VNET_HDR_LEN} bytes, not {len(header)}")
        try:
            for frame in frames:
                PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
                packet.frame = <uint8_t *>malloc(view.len)  # a block of its own: no overrun goes unseen
                if packet.frame != NULL:
                    copies.append(<size_t>packet.frame)
                    memcpy(packet.frame, view.buf, view.len)
                packet.length = <uint32_t>view.len
                PyBuffer_Release(&view)
                if packet.frame == NULL:
                    raise MemoryError
                memcpy(&packet.vnet, <const char *>header, VNET_HDR_LEN)
                take_packet(&self.state, &packet)
        finally:
            write_waiting(&self.state.out)
            for copy in copies:
                free(<void *><size_t>copy)

    def run(self, Ring ring not None):
        """Read a ring without open blocks until ``stop``. Blocks, and lets other Python threads run meanwhile."""
        if ring.ring.open_blocks:
            raise ValueError("this ring's open blocks would be read, which gives segments no time to gather")
        self.ring = ring
        self.state.ring = &ring.ring
        self.state.fds[0].fd = ring.ring.fd
        self.state.fds[1].fd = self.bell
        self.state.fds[0].events = self.state.fds[1].events = POLLIN
        with nogil:
            run_decap(&self.state)

    def stop(self):
        """Ask ``run`` to return: within one block, or at once when it sleeps. May be called from any thread."""
        store_release_u32(&self.state.stopping, 1)
        eventfd_write(self.bell, 1)

    def counters(self):
        """Return what became of every packet: ``packets`` of the ring, each counted once, in ``decapsulated`` or
        ``drops``.

        Of those decapsulated, ``merged`` left in GSO packets; ``writes`` went to the device; ``blocks`` of the ring
        were read. Segments that still wait are in no counter but ``packets``.
        """
        cdef int reason
        drops = {DECAP_REASON_ROWS[reason].name.decode(): self.state.reasons[reason]
                 for reason in range(<int>DECAPSULATED + 1, <int>DECAP_REASONS)}
        drops[DECAP_REASON_ROWS[<int>DECAP_TUN_REFUSED].name.decode()] = self.state.out.refused
        return {
            "packets": self.state.packets,
            "decapsulated": self.state.out.delivered,
            "merged": self.state.out.merged,
            "writes": self.state.out.writes,
            "blocks": self.state.blocks,
            "drops": drops,
        }

    def __dealloc__(self):
        if self.bell > 0:
            close_fd(self.bell)
