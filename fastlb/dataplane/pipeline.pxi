# The Python face of pipeline.pxd and publish.pxd.

cdef enum:
    SCRATCH_HEADROOM = 128
    MAX_FRAME = 65535 + 64
    SCRATCH_SLOT = SCRATCH_HEADROOM + MAX_FRAME
    LOGGED_FLOWS = 1 << 16   # beginnings and ends that wait for the log


cdef class FlowMemory:
    """What the pipelines of all workers share of the flow table: its entries, its key, its counts by shard.

    ``flows``: how many flows the table is meant for, at three quarters of its entries. ``key``: 32 secret bytes; drawn
    at random when not given. ``sources``: the addresses of full NAT, and ``ports`` the range of their ports that is
    taken from, both ends included. ``file``: where to keep the entries so that they outlive this process, as (file
    descriptor, offset of the hot part, offset of the cold part), of the sizes that `flow_layout` gives; zeros, or what
    `take_over` is to be called for. Raises ValueError, OSError, and MemoryError when there is no room.
    """

    def __cinit__(self, uint64_t flows, key=None, sources=(), ports=(1024, 32767), file=None):
        cdef FlowTable *table = &self.table
        key = urandom(32) if key is None else bytes(key)
        if len(key) != 32:
            raise ValueError(f"the flow table's key has 32 bytes, not {len(key)}")
        memcpy(table.key, <const char *>key, 32)
        table.per_shard = buckets_per_shard(flows)
        self.map_entries(file)
        table.flows = <uint64_t *>zeroed(SHARDS, sizeof(uint64_t))
        table.rows = <BackendStats **>zeroed(SHARDS, sizeof(BackendStats *))
        table.row_count = <uint32_t *>zeroed(1, sizeof(uint32_t))
        self.notes = <FragmentNote *>map_zeroed(SETS * WAYS * sizeof(FragmentNote))
        self.limits = <uint64_t *>map_zeroed(LIMIT_SETS * LIMIT_WAYS * sizeof(uint64_t))
        for version in (4, 6):
            of_version = [address for address in sources if address.version == version]
            if of_version:
                self.open_pool(pool_of(table, version), of_version, ports[0], ports[1])

    cdef int map_entries(self, file) except -1:
        cdef uint64_t buckets = <uint64_t>self.table.per_shard * SHARDS
        self.hot_bytes = whole_pages(buckets * sizeof(Bucket))
        self.cold_bytes = whole_pages(buckets * ENTRIES * sizeof(FlowTuple))
        if file is None:
            self.table.buckets = <Bucket *>map_zeroed(self.hot_bytes)
            self.table.tuples = <FlowTuple *>map_zeroed(self.cold_bytes)
            return 0
        fd, hot, cold = file
        self.table.buckets = <Bucket *>map_file(fd, hot, self.hot_bytes)
        self.table.tuples = <FlowTuple *>map_file(fd, cold, self.cold_bytes)
        self.large_pages = make_ready(self.table.buckets, self.hot_bytes)
        self.large_pages &= make_ready(self.table.tuples, self.cold_bytes)
        return 0

    def take_over(self, Services services not None, uint32_t highest, uint32_t now_ms, bint logged=False):
        """Verify the entries that another process has left in the file, and keep those that are worth it.

        ``services``: what holds from now on. ``highest``: of all backend ids that were ever given. ``logged``: the end
        of a flow is logged if its beginning was, and `take_logged` gives that of those that are not kept. Returns how
        many entries were kept, how many belong to no service or backend any more, and how many are damaged. Raises
        ValueError when those are more than MAX_DAMAGED: the walk has ended early, and this memory must not be used.
        Before any pipeline is made.
        """
        cdef FlowTable *table = &self.table
        cdef const ServiceTable *held = &services.table
        cdef TakenOver result
        if table.row_count[0] != 0:
            raise ValueError("pipelines use this memory")
        memset(&result, 0, sizeof(result))
        if logged:
            open_log(&self.ended)
        with nogil:
            take_over(table, held, highest, now_ms, &self.ended if logged else NULL, &result)
        if result.found[<int>DAMAGED] > MAX_DAMAGED:
            raise ValueError(f"more than {<int>MAX_DAMAGED} entries are damaged")
        self.taken_over = True
        return result.found[<int>SOUND], result.found[<int>UNWANTED], result.found[<int>DAMAGED]

    def take_logged(self, uint32_t most):
        """Return up to ``most`` ends of flows that `take_over` did not keep, as `Pipeline.take_logged` does."""
        return taken_from(&self.ended, &self.table, most)

    @property
    def unlogged(self):
        """How many of those had no room in the log."""
        return self.ended.lost

    cdef int open_pool(self, SourcePool *pool, list addresses, int lowest, int highest) except -1:
        if not 0 < lowest <= highest <= 0xFFFF or len(addresses) > MAX_SOURCES:
            raise ValueError(f"source ports {lowest}-{highest} of {len(addresses)} addresses; at most {MAX_SOURCES}")
        pool.addresses = <Addr *>zeroed(len(addresses), sizeof(Addr))
        if not table_init(&pool.positions, len(addresses)):
            raise MemoryError
        for position, address in enumerate(addresses):
            pool.addresses[<uint32_t>position] = addr_from(address)
            table_put(&pool.positions, addr_from(address), key_meta(address.version, 0, 0), position)
        pool.lowest, pool.highest = lowest, highest
        pool.free = <FreePorts *>map_zeroed(PROTOCOL_ROWS * SHARDS * sizeof(FreePorts))
        for queue, start in enumerate(unpack(f"{PROTOCOL_ROWS * SHARDS}I", urandom(PROTOCOL_ROWS * SHARDS * 4))):
            pool.free[<uint32_t>queue].start = start
        pool.ports = <SourcePort *>map_zeroed(pool_bytes(len(addresses)))
        pool.count = len(addresses)
        return 0

    cdef BackendStats *add_row(self) except NULL:
        """Add counters by backend for one more pipeline. They stay as long as this memory, because other workers read
        them."""
        cdef uint32_t row = self.table.row_count[0]
        if row == SHARDS:
            raise ValueError(f"a flow table has at most {SHARDS} pipelines, as it has shards")
        self.table.rows[row] = <BackendStats *>map_zeroed(MAX_BACKENDS * sizeof(BackendStats))
        self.table.row_count[0] = row + 1
        return self.table.rows[row]

    cdef int close_pool(self, SourcePool *pool) except -1:
        unmap(pool.ports, pool_bytes(pool.count))
        unmap(pool.free, PROTOCOL_ROWS * SHARDS * sizeof(FreePorts))
        free(pool.addresses)
        table_free(&pool.positions)
        return 0

    def __dealloc__(self):
        unmap(self.table.buckets, self.hot_bytes)
        unmap(self.table.tuples, self.cold_bytes)
        free(self.table.flows)
        for row in range(self.table.row_count[0] if self.table.row_count != NULL else 0):
            unmap(self.table.rows[<uint32_t>row], MAX_BACKENDS * sizeof(BackendStats))
        free(self.table.rows)
        free(self.table.row_count)
        unmap(self.notes, SETS * WAYS * sizeof(FragmentNote))
        unmap(self.limits, LIMIT_SETS * LIMIT_WAYS * sizeof(uint64_t))
        free(self.ended.events)
        self.close_pool(&self.table.pools[0])
        self.close_pool(&self.table.pools[1])


cdef int open_log(FlowLog *log) except -1:
    if log.events == NULL:
        log.events = <FlowEvent *>zeroed(LOGGED_FLOWS, sizeof(FlowEvent))
        log.size = LOGGED_FLOWS
    return 0


cdef list taken_from(FlowLog *log, FlowTable *table, uint32_t most):
    """Take events out of a log: see `Pipeline.take_logged`."""
    cdef FlowEvent *event
    cdef SourcePool *pool
    cdef uint32_t waiting = load_acquire_u32(&log.written) - log.read
    taken = []
    for _ in range(min(waiting, most)):
        event = &log.events[log.read & (log.size - 1)]
        pool = pool_of(table, event.flow.family)
        source, port = None, 0
        if event.flow.source != 0:
            source = address_from(address_of(pool, event.flow.source - 1), event.flow.family)
            port = port_of(event.flow.source - 1)
        taken.append((
            bool(event.began), event.when, event.flow.since, event.flow.protocol,
            address_from(event.flow.client, event.flow.family), bswap16(event.flow.be_cport),
            address_from(event.flow.vip, event.flow.family), bswap16(event.flow.be_vport),
            source, port, event.backend, STATE_NAMES[event.state]))
        store_release_u32(&log.read, log.read + 1)
    return taken


cdef class Pipeline:
    """One worker's counters, its part of the flow table and its published snapshot; or those of an embedding program.

    ``flows``: the memory of a table that is shared with other workers, or how many flows an own one is meant for.
    ``affinity``: likewise, the memory of a shared affinity table, or how many clients an own one has room for.
    ``key``: of an own flow table; see `FlowMemory`. ``shards``: those that this pipeline owns, at least one; packets of
    others are dropped as ``wrong_worker``. No shard may have two owners while they run.
    """

    def __cinit__(self, flows=1_000_000, key=None, shards=range(SHARDS), affinity=65536):
        cdef int slot
        self.memory_of_flows = flows if isinstance(flows, FlowMemory) else FlowMemory(flows, key)
        self.memory_of_affinity = affinity if isinstance(affinity, AffinityMemory) else AffinityMemory(affinity)
        self.state.affinity = self.memory_of_affinity.table
        self.state.flows = self.memory_of_flows.table
        self.state.fragments.notes = self.memory_of_flows.notes
        self.state.limits = self.memory_of_flows.limits
        self.state.by_service = <ReasonCounts *>map_zeroed(MAX_SERVICES * sizeof(ReasonCounts))
        self.state.flows.events = <ServiceEvents *>map_zeroed(MAX_SERVICES * sizeof(ServiceEvents))
        map_held_slots(&self.state.fragments)
        self.flow_capacity = <uint64_t>self.state.flows.per_shard * SHARDS * ENTRIES
        self.own(shards)
        self.state.flows.stats = self.memory_of_flows.add_row()
        if self.memory_of_flows.taken_over:
            count_owned(&self.state.flows)
        self.state.schedulers.cursors = <Cursor *>map_zeroed(CURSORS * sizeof(Cursor))
        self.state.schedulers.responses = <Response *>map_zeroed(MAX_BACKENDS * sizeof(Response))
        self.state.schedulers.random_state = unpack("Q", urandom(8))[0] | 1
        for slot in range(BATCH):
            self.scratch[slot] = <uint8_t *>malloc(SCRATCH_SLOT)
            if self.scratch[slot] == NULL:
                raise MemoryError
        self.snapshots = []

    cdef int own(self, shards) except -1:
        cdef FlowTable *table = &self.state.flows
        for shard in shards:
            if not 0 <= shard < SHARDS:
                raise ValueError(f"shards are 0..{SHARDS - 1}, not {shard}")
            table.owned |= <uint64_t>1 << <int>shard
        if table.owned == 0:
            raise ValueError("a pipeline owns at least one shard")
        table.owned_shards = (<object>table.owned).bit_count()
        table.sweep_shard = owned_after(table, SHARDS - 1)
        start, = unpack("H", urandom(2))
        self.state.outer_number = owned_after(table, start // NUMBERS) * NUMBERS + start % NUMBERS
        return 0

    def __dealloc__(self):
        cdef int slot
        unmap(self.state.flows.events, MAX_SERVICES * sizeof(ServiceEvents))
        unmap(self.state.by_service, MAX_SERVICES * sizeof(ReasonCounts))
        unmap(self.state.schedulers.cursors, CURSORS * sizeof(Cursor))
        unmap(self.state.schedulers.responses, MAX_BACKENDS * sizeof(Response))
        free(self.state.flows.log.events)
        unmap(self.state.fragments.slots, MAX_HELD * sizeof(HeldFragment))
        unmap(self.state.fragments.memory, MAX_HELD * HELD_BYTES)
        for slot in range(BATCH):
            free(self.scratch[slot])

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def publish(self, Services services not None, Routes routes not None):
        """Make these what the next batch sees. Older snapshots are freed when the worker has passed them."""
        self.generation += 1
        cdef PublishedSnapshot snapshot = PublishedSnapshot(services, routes, self.generation)
        self.snapshots.append(snapshot)
        publish(&self.publication, &snapshot.value)
        self.reclaim()

    def reclaim(self):
        """Free the snapshots that can no longer be in use. Returns how many are still kept."""
        cdef uint64_t generation = reader_generation(&self.publication) if self.running else self.generation
        while len(self.snapshots) > 1 and (<PublishedSnapshot>self.snapshots[0]).value.generation < generation:
            del self.snapshots[0]
        return len(self.snapshots)

    def release_fragments(self):
        """Release what a worker that died had claimed of the memory for fragments.

        Raises RuntimeError while a worker runs.
        """
        if self.running:
            raise RuntimeError("a worker runs")
        release_claimed(&self.state.fragments)

    def renew(self, backends, services=()):
        """Forget flows and counters of these backend ids, which pass to other backends, and of these slots of counters,
        which pass to other services.

        While a worker runs, its sweep has long forgotten the flows, and only the counters start again.
        """
        cdef FlowTable *table = &self.state.flows
        cdef FlowEntry *entry
        cdef uint64_t at
        cdef uint32_t shard
        renewed = frozenset(backends)
        for at in range(self.flow_capacity if renewed and not self.running else 0):
            entry = &table.buckets[at // ENTRIES].entries[at % ENTRIES]
            shard = <uint32_t>(at // ENTRIES // table.per_shard)
            if owns(table, shard) and entry.fingerprint != 0 and backend_of(entry) in renewed:
                forget(table, shard, entry)
        for backend in renewed:
            memset(&table.stats[<uint32_t>backend], 0, sizeof(BackendStats))
            memset(&self.state.schedulers.responses[<uint32_t>backend], 0, sizeof(Response))
        for slot in services:
            memset(&self.state.by_service[<uint16_t>slot], 0, sizeof(ReasonCounts))
            memset(&self.state.flows.events[<uint16_t>slot], 0, sizeof(ServiceEvents))

    # --- packets -----------------------------------------------------------------------------------------------------

    def process(self, frames, uint32_t now_ms, uint32_t ifindex=0, offloads=()):
        """Run frames (bytes-like, not modified) through the pipeline in their order, in batches as a worker does.

        ``offloads``: each frame's virtio_net_hdr, 10 bytes, as a device gives it; none: plain frames.
        Returns a list of (verdict, reason, frames that would be sent, backend id, interface index). Raises
        RuntimeError while a worker runs this pipeline or before the first ``publish``, and TypeError or ValueError for
        what is no frame; then none has been processed.
        """
        cdef const Snapshot *snap
        cdef int count = 0
        if self.running:
            raise RuntimeError("a worker runs this pipeline; it cannot also be called directly")
        if not self.snapshots:
            raise RuntimeError("publish services and routes first")
        frames = list(frames)
        check_frames(frames)
        if offloads and [len(each) for each in offloads] != [VNET_HDR_LEN] * len(frames):
            raise ValueError(f"offloads are {VNET_HDR_LEN} bytes for each of {len(frames)} frames")
        snap = pick_up(&self.publication)
        self.now_ms = now_ms
        results = []
        for at, frame in enumerate(frames):
            self.load(count, frame, ifindex)
            if offloads:
                memcpy(&self.packets[count].vnet, <const char *>(<bytes>offloads[at]), VNET_HDR_LEN)
            count += 1
            if count == BATCH:
                self.run(snap, count, now_ms, results)
                count = 0
        self.run(snap, count, now_ms, results)
        self.settle(snap, now_ms, results)
        sweep_tables(&self.state, snap, now_ms)
        return results

    cdef int load(self, int at, frame, uint32_t ifindex) except -1:
        """Copy a frame to where the pipeline may rewrite it, with headroom in front as in a ring.

        It ends where its memory ends, so that AddressSanitizer sees a read past the frame (``make asan``).
        """
        cdef Packet *packet = &self.packets[at]
        cdef Py_buffer view
        memset(packet, 0, sizeof(Packet))
        packet.ifindex = ifindex
        PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
        packet.length = <uint32_t>view.len
        packet.frame = self.scratch[at] + SCRATCH_SLOT - view.len
        memcpy(packet.frame, view.buf, view.len)
        PyBuffer_Release(&view)
        return 0

    cdef int run(self, const Snapshot *snap, int count, uint32_t now_ms, list results) except -1:
        cdef Packet *packet
        cdef int i
        self.state.now_us = <uint64_t>now_ms * 1000
        run_batch(&self.state, snap, self.packets, count, now_ms)
        for i in range(count):
            packet = &self.packets[i]
            out = frames_of(packet) if packet.reason <= VIA_REJECT else []
            reason = (<bytes>reason_name(packet.reason)).decode()
            results.append((verdict_of(packet.reason), reason, out, packet.backend, packet.out_ifindex))
        return 0

    cdef int settle(self, const Snapshot *snap, uint32_t now_ms, list results) except -1:
        """Forward or drop the fragments that have waited; they leave after the last of the frames."""
        cdef Packet *packet
        cdef uint32_t at = 0
        if not must_check_held(&self.state, now_ms):
            return 0
        packet = next_settled(&self.state, snap, &at, now_ms)
        while packet != NULL:
            if packet.reason <= VIA_REJECT and results:
                results[len(results) - 1][2].extend(frames_of(packet))
            free_slot(&self.state.fragments, at)
            packet = next_settled(&self.state, snap, &at, now_ms)
        return 0

    # --- what can be seen --------------------------------------------------------------------------------------------

    def counters(self):
        """Return every reason and every total by name."""
        cdef FlowTable *table = &self.state.flows
        cdef int i
        named = {}
        for i in range(<int>REASONS):
            named[(<bytes>reason_name(i)).decode()] = self.state.reasons[i]
        named["held"] = self.state.fragments.count         # those at this moment
        totals = {
            "packets": self.state.packets,
            "bytes": self.state.bytes,
            "forwarded": self.state.forwarded,
            "forwarded_bytes": self.state.forwarded_bytes,
            "flows_evicted": table.evicted,
            "flows_untracked": table.untracked,
            "flows_expired": table.expired,
            "flow_log_lost": table.log.lost,
            "affine": self.state.affinity.placed,
        }
        return totals | named

    def backend_stats(self, uint32_t backend):
        """Return the counters of one backend id."""
        if backend >= MAX_BACKENDS:
            raise ValueError(f"backend ids end at {MAX_BACKENDS - 1}, got {backend}")
        return self.state.flows.stats[backend]

    def service_counters(self, slot):
        """Return every reason but ``conntrack`` and ``scheduled``, by name, of the service that has this slot."""
        cdef const ReasonCounts *counts
        cdef int i
        if not 0 <= slot < MAX_SERVICES:
            raise ValueError(f"slots of services are 0..{MAX_SERVICES - 1}, not {slot}")
        counts = &self.state.by_service[<uint32_t>slot]
        return {(<bytes>reason_name(i)).decode(): counts.by_reason[i] for i in range(VIA_SCHEDULER + 1, <int>REASONS)}

    def service_events(self, slot):
        """Return what befell new flows of the service that has this slot, by name."""
        cdef const ServiceEvents *events
        if not 0 <= slot < MAX_SERVICES:
            raise ValueError(f"slots of services are 0..{MAX_SERVICES - 1}, not {slot}")
        events = &self.state.flows.events[<uint32_t>slot]
        return {
            "affine": events.affine, "affine_moved": events.affine_moved, "load_moved": events.load_moved,
            "conflict_moved": events.conflict_moved, "flows_evicted": events.evicted,
            "flows_untracked": events.untracked}

    def response_time(self, uint32_t backend):
        """Return the Peak-EWMA of the backend's handshakes as this worker saw them, in seconds; None before the
        first."""
        if backend >= MAX_BACKENDS:
            raise ValueError(f"backend ids end at {MAX_BACKENDS - 1}, got {backend}")
        cdef float cost = self.state.schedulers.responses[backend].cost
        return cost / 1e6 if cost > 0 else None

    def forget_response(self, uint32_t backend):
        """Forget how slow or silent a backend was, because it works again. If the worker writes at this moment, it
        wins."""
        if backend >= MAX_BACKENDS:
            raise ValueError(f"backend ids end at {MAX_BACKENDS - 1}, got {backend}")
        memset(&self.state.schedulers.responses[backend], 0, sizeof(Response))

    def take_unresolved(self):
        """Return the clients on our own links whose MAC was missing since the last call: a set of (interface index,
        address)."""
        cdef uint32_t i
        found = set()
        for i in range(load_acquire_u32(&self.state.unresolved_count)):
            found.add((
                self.state.unresolved[i].ifindex,
                address_from(self.state.unresolved[i].addr, self.state.unresolved[i].family)))
        store_release_u32(&self.state.unresolved_count, 0)
        return found

    def log_flows(self):
        """Keep the beginnings and ends of flows in the NAT modes for `take_logged`, before a worker runs."""
        if self.running:
            raise RuntimeError("a worker runs this pipeline")
        open_log(&self.state.flows.log)

    def take_logged(self, uint32_t most):
        """Up to ``most`` beginnings and ends, oldest first, as (began, milliseconds, milliseconds of the beginning,
        protocol, client, port, vip, port, source or None, port, backend id, state)."""
        return taken_from(&self.state.flows.log, &self.state.flows, most)

    def forget_flows(self, uint64_t bucket, uint32_t count):
        """End the flows of this pipeline's shards in ``count`` buckets of the table from ``bucket`` on, as if their
        time was over, while no worker runs. The next bucket; None at the end of the table."""
        cdef FlowTable *table = &self.state.flows
        cdef uint64_t end = min(bucket + count, <uint64_t>table.per_shard * SHARDS)
        cdef uint64_t at
        cdef uint32_t shard
        cdef int i
        if self.running:
            raise RuntimeError("a worker runs this pipeline")
        for at in range(bucket, end):
            shard = <uint32_t>(at // table.per_shard)
            for i in range(ENTRIES if owns(table, shard) else 0):
                if table.buckets[at].entries[i].fingerprint != 0:
                    forget(table, shard, &table.buckets[at].entries[i])
        return end if end < <uint64_t>table.per_shard * SHARDS else None

    def source_ports(self):
        """Return how many source ports of full NAT are taken: a list of (IP version, protocol, taken, all)."""
        cdef SourcePool *pool
        cdef uint32_t shard
        found = []
        for version in (4, 6):
            pool = pool_of(&self.state.flows, version)
            if pool.count == 0:
                continue
            for protocol in (PROTO_TCP, PROTO_UDP):
                taken = sum(free_ports(pool, protocol, shard).taken for shard in range(SHARDS))
                found.append((version, protocol, taken, pool.count * (pool.highest - pool.lowest + 1)))
        return found

    def flow_count(self):
        """Count the entries of the whole table, also those that have expired and were not yet swept."""
        return sum(self.state.flows.flows[shard] for shard in range(SHARDS))

    def memory(self):
        """Return the bytes of the hot and the cold part of the whole flow table: (hot, cold)."""
        cdef uint64_t buckets = <uint64_t>self.state.flows.per_shard * SHARDS
        return buckets * sizeof(Bucket), buckets * ENTRIES * sizeof(FlowTuple)

    def affinity_slots(self):
        """Return (those that hold at this moment, all), of all workers together."""
        return self.memory_of_affinity.in_use(self.clock()), self.memory_of_affinity.size

    cdef uint32_t clock(self) noexcept:
        """Return the milliseconds of the worker's clock, or those of the last `process`."""
        return clock_ms() if self.running else self.now_ms


assert_equal(sizeof(FlowEntry), 16)
assert_equal(sizeof(FlowTuple), 48)
assert_equal(sizeof(Backend), 32)
assert_equal(sizeof(Timeouts), 64)
assert_equal(sizeof(SourcePort), 32)
assert_equal(sizeof(FreePorts), 64)
assert_equal(sizeof(Bucket), 64)                         # a cache line
assert_equal(sizeof(VnetHdr), VNET_HDR_LEN)


cdef size_t pool_bytes(size_t addresses) noexcept:
    return (PROTOCOL_ROWS * addresses << ROW_BITS) * sizeof(SourcePort)


cdef list frames_of(const Packet *packet):
    """Return what leaves: the frame as it is, or the frames that it is cut into."""
    cdef uint8_t headers[MAX_HEADERS]
    cdef const uint8_t *payload
    cdef Cutter cutter
    cdef uint32_t length
    if packet.segment_size == 0:
        return [PyBytes_FromStringAndSize(<char *>packet.frame, packet.length)]
    start_cutting(&cutter, packet)
    frames = []
    while True:
        length = next_frame(&cutter, headers, &payload)
        if length == 0:
            return frames
        frames.append(
            PyBytes_FromStringAndSize(<char *>headers, cutter.headers)
            + PyBytes_FromStringAndSize(<char *>payload, length))


cdef int check_frames(list frames) except -1:
    cdef Py_buffer view
    for frame in frames:
        PyObject_GetBuffer(frame, &view, PyBUF_SIMPLE)
        PyBuffer_Release(&view)
        if view.len > MAX_FRAME:
            raise ValueError(f"a frame has at most {MAX_FRAME} bytes, not {view.len}")
    return 0


cdef int map_held_slots(FragmentState *fragments) except -1:
    """Map the memory in which fragments wait. The pages are small ones: a large one would back thirty slots for the
    sake of the first."""
    cdef int at
    fragments.slots = <HeldFragment *>map_zeroed(MAX_HELD * sizeof(HeldFragment))
    fragments.memory = <uint8_t *>map_zeroed(MAX_HELD * HELD_BYTES)
    madvise(fragments.memory, MAX_HELD * HELD_BYTES, MADV_NOHUGEPAGE)
    for at in range(MAX_HELD):
        fragments.order[at] = at
    return 0


def flow_hash_of(src, sport, dst, dport, uint8_t protocol, uint64_t seed):
    """Return the fleet's flow hash; addresses are ipaddress objects of one version."""
    if src.version != dst.version:
        raise ValueError(f"source {src} and destination {dst} are of different IP versions")
    return flow_hash(
        addr_from(src), be_port_from(sport), addr_from(dst), be_port_from(dport), protocol, src.version, seed)
