# The Python face of what a snapshot is made of: Services (from the configuration), Routes (from the kernel).

cdef enum:
    MAX_TIMEOUTS = 1 << 16   # kinds of them: Backend.timeouts has 16 bits
    BREATH = 256             # backends, in 1 ms or so, after which other threads of Python have their turn

cdef dict SCHEDULERS = {
    "maglev": BY_MAGLEV, "ketama": BY_KETAMA, "source-hash": BY_SOURCE_HASH, "rr": BY_WRR, "wrr": BY_WRR,
    "random": BY_RANDOM, "lc": BY_LEAST_FLOWS, "wlc": BY_LEAST_FLOWS, "lrt": BY_LEAST_RESPONSE, "p2c": BY_P2C,
}
cdef dict FORWARDS = {
    "nat": FORWARD_NAT, "fullnat": FORWARD_FULLNAT, "dsr": FORWARD_DSR, "ipip": FORWARD_IPIP, "gre": FORWARD_GRE,
    "gue": FORWARD_GUE}
cdef dict DONT_FRAGMENT = {"inner": DF_INNER, "always": DF_ALWAYS, "never": DF_NEVER}
cdef dict PROTOCOLS = {"tcp": PROTO_TCP, "udp": PROTO_UDP}
cdef dict FLOW_POLICIES = {"all": KEEP_ALL, "except_syn": KEEP_EXCEPT_SYN, "none": KEEP_NONE, "to_reset": KEEP_TO_RESET}
cdef dict TIMED_STATES = {
    "tcp_syn": (FLOW_SYN, FLOW_SYN_ACK, FLOW_PICKED_UP), "tcp_established": (FLOW_ESTABLISHED,),
    "tcp_half_closed": (FLOW_FIN_CLIENT, FLOW_FIN_BACKEND), "tcp_closing": (FLOW_CLOSING, FLOW_RESET),
    "udp": (FLOW_UDP_NEW, FLOW_UDP)}
cdef dict HOP_FAULTS = {
    None: 0, "no_route": DROP_NO_ROUTE, "no_neighbour": DROP_NO_NEIGHBOUR, "not_on_link": DROP_NOT_ON_LINK}


cdef uint32_t milliseconds(double seconds) except? 0xFFFFFFFF:
    if not 0 < seconds <= 7 * 86400:
        raise ValueError(f"a timeout is above 0 and at most 7 days, not {seconds} s")
    return <uint32_t>(seconds * 1000)


cdef uint64_t mask_meta(prefix, bits, whole=0) except *:
    """What keys of a shape have in their meta, above port, protocol and family; 0 for all bits of both."""
    return 0 if prefix == whole and bits == 16 else <uint64_t>(prefix + 1) << 32 | <uint64_t>(bits + 1) << 48


cdef void *copied(const void *source, size_t size) except NULL:
    cdef void *memory = zeroed(1, size)
    if source != NULL:
        memcpy(memory, source, size)
    return memory


cdef uint32_t weight_in_load(scheduler, member) except? 0:
    """p2c draws by the weight that slow start leaves, and compares what a backend can carry: else an idle one in slow
    start would lose against every other idle one, and get nothing.
    """
    if scheduler == "lc":
        return member.unweighted
    return member.target_weight if scheduler == "p2c" else member.weight


cdef void breathe() noexcept:
    """Let another thread of Python go on, if one waits: a table of 10,000 backends would hold it up for long."""
    with nogil:
        pass


cdef class Choices:
    """What new flows of one service choose from: candidates, and the backends that clients stick to.

    ``spec``: as of `Services`. ``before``: those of an earlier plan of the same service, from which only the members at
    ``positions`` differ; None: there are none. Never changed afterwards: snapshots share it as long as the service's
    plan stays the same.
    """

    def __cinit__(self, spec, Choices before=None, positions=None):
        cdef uint32_t at
        self.tables = (spec.table, spec.ring, spec.rotation)
        self.count = len(spec.members)
        self.everyone = <Candidate *>zeroed(self.count, sizeof(Candidate))
        self.candidates = <Candidate *>zeroed(self.count, sizeof(Candidate))
        self.candidate_of = <uint32_t *>zeroed(self.count, sizeof(uint32_t))
        if before is not None:
            memcpy(self.everyone, before.everyone, self.count * sizeof(Candidate))
        for at in range(self.count) if before is None else positions:
            self.set_candidate(&self.everyone[at], spec.scheduler, spec.members[at])
            if at % BREATH == 0:
                breathe()
        self.gather()
        if spec.affinity is None:
            return
        if before is None:
            self.stick(None, sticky_backends_of(spec, None), spec)
        else:
            numbers = {number for position in positions for number in numbers_of(spec.members[position])}
            self.stick(before, sticky_backends_of(spec, numbers), spec)

    cdef int set_candidate(self, Candidate *candidate, scheduler, member) except -1:
        candidate.backend = member.id
        candidate.weight = weight_in_load(scheduler, member) if member.weight > 0 else 0
        candidate.response = <uint32_t>min(member.response * 1e6, 1e9)
        candidate.max_flows = member.max_flows or NO_CAP
        return 0

    cdef void gather(self) noexcept nogil:
        """List those that take new flows."""
        cdef uint32_t at
        for at in range(self.count):
            self.capped |= self.everyone[at].max_flows != NO_CAP
            if self.everyone[at].weight > 0:
                self.candidate_of[at] = self.candidate_count
                self.candidates[self.candidate_count] = self.everyone[at]
                self.candidate_count += 1
                self.weight += self.everyone[at].weight

    cdef int stick(self, Choices before, dict found, spec) except -1:
        """Take over what ``before`` has of sticky backends, but for the numbers that are in ``found``."""
        cdef uint32_t number, at = 0
        cdef uint32_t room = sum([len(takers) for takers, _ in found.values()])
        if before is not None:
            self.sticky_limit = before.sticky_limit
            for number in range(before.sticky_limit):
                room += before.sticky_backends[number].count
        else:
            self.sticky_limit = max([number for member in spec.members for number in numbers_of(member)], default=0) + 1
            if self.sticky_limit > 1 << STICKY_BITS:
                raise ValueError(f"places of an affinity group are 1..{(1 << STICKY_BITS) - 1}")
        self.sticky_backends = <StickyBackend *>zeroed(self.sticky_limit, sizeof(StickyBackend))
        self.takers = <Taker *>zeroed(room, sizeof(Taker))
        for number, (takers, pinned) in found.items():
            at += self.set_takers(number, at, spec.scheduler, takers, pinned)
        if before is not None:
            self.copy_takers(before, bytes(bytearray_of(found, self.sticky_limit)), at)
        return 0

    cdef int set_takers(self, uint32_t number, uint32_t at, scheduler, list takers, bint pinned) except -1:
        """Write the takers of one number, and return how many: those with weight 0 have no part, unless all have it."""
        cdef StickyBackend *sticky = &self.sticky_backends[number]
        cdef Taker *taker
        weights = [weight_in_load(scheduler, member) for member in takers]
        weighted = [(member, weight) for member, weight in zip(takers, weights) if weight or not any(weights)]
        sticky.takers, sticky.count, sticky.pinned = &self.takers[at], len(weighted), pinned
        for place, (member, weight) in enumerate(weighted):
            taker = &sticky.takers[<uint32_t>place]
            taker.backend, taker.max_flows, taker.weight = member.id, member.max_flows or NO_CAP, weight or 1
        return len(weighted)

    cdef int copy_takers(self, Choices before, bytes replaced, uint32_t at) except -1:
        cdef const uint8_t *skip = <const uint8_t *><const char *>replaced
        cdef uint32_t number
        cdef StickyBackend *sticky
        for number in range(before.sticky_limit):
            if skip[number]:
                continue
            sticky = &self.sticky_backends[number]
            sticky[0] = before.sticky_backends[number]
            sticky.takers = &self.takers[at]
            memcpy(sticky.takers, before.sticky_backends[number].takers, sticky.count * sizeof(Taker))
            at += sticky.count
        return 0

    def __dealloc__(self):
        free(self.everyone)
        free(self.candidates)
        free(self.candidate_of)
        free(self.sticky_backends)
        free(self.takers)


cdef object numbers_of(member):
    """The affinity numbers by which a slot may name this member: its own, and those at the same address."""
    others = [number for number, _ in member.same_address]
    return [member.place, *others] if member.place else others


cdef dict sticky_backends_of(spec, wanted):
    """{affinity number: (members of the service that take its clients, whether slots go on naming it)}.

    ``wanted``: for these numbers only; None: for all.
    """
    found = {} if wanted is None else {number: ([], False) for number in wanted}
    for member in spec.members:
        if member.place and (wanted is None or member.place in wanted):
            found[member.place] = ([member] if member.sticky else [], False)
    for member in spec.members:
        for number, pinned in member.same_address if member.sticky else ():
            if wanted is None or number in wanted:
                takers, known = found.get(number, ([], pinned))
                found[number] = ([*takers, member], pinned if not takers else known)
    return found


cdef bytearray bytearray_of(numbers, limit):
    """One byte for each number below ``limit``: 1 where it is among ``numbers``."""
    marks = bytearray(limit)
    for number in numbers:
        marks[number] = 1
    return marks


cdef class Services:
    """Services and backends as the data path sees them. Immutable.

    ``specs``: an iterable of objects with ``network`` (the VIP as a prefix), ``port`` (0: several), ``blocks`` (those
    ports, as (port, leading bits) of model/match.py), ``protocol``, ``forward``, ``no_backend``, ``mss`` (bytes; 0:
    leave it, 65535: what fits), ``tunnel`` (as `fastlb.config.Tunnel`), ``scheduler``, ``table`` (MaglevTable or None),
    ``ring`` (KetamaRing or None), ``rotation`` (SmoothWrr or None), ``bounded_load`` (0: not bounded), ``affinity``
    (None, or an object with ``group``, 64 bits that its services share, ``prefix`` and ``timeout`` in seconds),
    ``timeouts`` (its own, or None), ``allow``, ``deny`` (networks of the VIP's version), ``source_limit`` (with rate,
    burst and prefix, or None), ``slot`` (of its counters, 1..65535, stable over reloads) and ``members``: objects with
    ``id`` (1..2**20-1, stable over reloads), ``address``, ``port`` (0: the packet's), ``weight``, ``unweighted`` (in
    place of the weight where that does not count), ``response`` (seconds that health checks take; 0: unknown),
    ``max_flows`` (0: any number), ``place`` (1..2**18-1, its number in the affinity's group; 0: it has left),
    ``same_address`` (other places at its address, and whether each has to stay in the slots that name it), ``sticky``
    (takes clients that stick to it) and ``flow_policy`` (what becomes of its flows: all, except_syn, none, to_reset;
    see types.pxd), in the order of the
    tables' positions. ``timeouts``: seconds by the keys tcp_syn, tcp_established, tcp_half_closed,
    tcp_closing, udp. ``echo``: VIPs answer echo requests. ``new_flows``: at most how many entries all workers make a
    second, and at once; 0: no limit.
    """

    def __cinit__(self, specs=None, *, uint64_t hash_seed=0, timeouts=None, echo=False, new_flows=(0, 0)):
        if specs is None:
            return                                       # `with_changes` fills it
        specs = list(specs)
        self.choices = [None] * len(specs)
        self.allocate(specs)
        self.table.hash_seed = hash_seed
        profiles = self.set_timeouts([timeouts, *(spec.timeouts or timeouts for spec in specs)])
        self.table.new_flow_rate, self.table.new_flow_burst = new_flows
        cdef uint32_t at = 0
        for index, spec in enumerate(specs):
            self.add_service(index, spec, &self.members[at])
            self.table.services[<uint32_t>index].timeouts = profiles[index + 1]
            put_admission(&self.table, &self.table.services[<uint32_t>index], index, spec)
            if spec.affinity is not None:
                self.add_affinity(index, spec)
            self.choose(index, spec, Choices(spec))
            for member in spec.members:
                self.members[at] = member.id
                self.add_backend(index, spec, member, profiles[index + 1])
                at += 1
                if at % BREATH == 0:
                    breathe()
        proven = sum(proves_itself(&self.table.services[<uint32_t>index]) for index in range(len(specs)))
        self.table.mixed = 0 < proven < len(specs)
        if echo:
            self.add_echo(specs)

    def with_changes(self, changes):
        """Return the same services after changes of their backends' states, and of nothing else.

        ``changes``: (position of a service, its spec as of ``specs``, positions of the members that differ). Tables,
        lists and what other services choose from are shared with this object; flat arrays are copied.
        """
        cdef Services changed = Services.__new__(Services)
        cdef uint32_t index
        cdef bint served
        changed.origin = self if self.origin is None else self.origin
        changed.is_changed = True
        changed.copy_arrays(self)
        for at, spec, positions in changes:
            index = at
            served = changed.table.services[index].maglev != NULL
            changed.choose(index, spec, Choices(spec, self.choices[index], positions))
            for position in positions:
                member = spec.members[position]
                changed.table.backends[<uint32_t>member.id].flow_policy = FLOW_POLICIES[member.flow_policy]
            if served != (changed.table.services[index].maglev != NULL):
                changed.answer_echoes(index)
        return changed

    cdef int copy_arrays(self, Services other) except -1:
        cdef uint32_t index
        self.table = other.table
        self.members, self.choices = other.members, list(other.choices)
        self.echoes_of, self.servers_of = other.echoes_of, other.servers_of
        self.affinities, self.table.services, self.table.backends, self.table.answers_echo = NULL, NULL, NULL, NULL
        self.table.services = <Service *>copied(
            other.table.services, other.table.service_count * sizeof(Service))
        self.table.backends = <Backend *>copied(
            other.table.backends, other.table.backend_limit * sizeof(Backend))
        self.table.answers_echo = <uint8_t *>copied(other.table.answers_echo, len(self.servers_of or ()))
        self.affinities = <Affinity *>copied(other.affinities, other.table.service_count * sizeof(Affinity))
        for index in range(self.table.service_count):
            if self.table.services[index].affinity != NULL:
                self.table.services[index].affinity = &self.affinities[index]
        return 0

    cdef int allocate(self, list specs) except -1:
        ids = [member.id for spec in specs for member in spec.members]
        if ids and not 0 < min(ids) <= max(ids) < MAX_BACKENDS:
            raise ValueError(f"backend ids must be in 1..{MAX_BACKENDS - 1}")
        self.table.service_count = len(specs)
        self.table.backend_limit = max(ids, default=0) + 1
        self.table.services = <Service *>zeroed(len(specs), sizeof(Service))
        self.table.backends = <Backend *>zeroed(self.table.backend_limit, sizeof(Backend))
        self.table.sticky_numbers = <uint32_t *>zeroed(self.table.backend_limit, sizeof(uint32_t))
        self.affinities = <Affinity *>zeroed(len(specs), sizeof(Affinity))
        self.members = <uint32_t *>zeroed(len(ids), sizeof(uint32_t))
        replies = {"nat": 0, "fullnat": 0}
        for spec in specs:
            if spec.forward in replies:
                replies[spec.forward] += len(spec.members) * len(spec.blocks)
        blocks = sum(len(spec.blocks) for spec in specs)
        if (not table_init(&self.table.vips, blocks + 2 * len(specs))
                or not table_init(&self.table.replies, 2 * replies["nat"])
                or not table_init(&self.table.fullnat_replies, 2 * replies["fullnat"])
                or not table_init(&self.table.sources, sources_of(specs))):
            raise MemoryError
        self.set_masks(specs)

    cdef int set_masks(self, list specs) except -1:
        """A prefix that is longer is more specific; of one prefix, a smaller block of ports."""
        for version in (4, 6):
            of_version = [spec for spec in specs if spec.network.version == version]
            vips = {(spec.network.prefixlen, bits) for spec in of_version for _, bits in spec.blocks}
            whole = 32 if version == 4 else 128
            replies = {
                (whole, bits) for spec in of_version if spec.forward in ("nat", "fullnat") for _, bits in spec.blocks}
            self.set_mask_list(&self.table.vip_masks[version == 6], version, vips)
            self.set_mask_list(&self.table.reply_masks[version == 6], version, replies)
        return 0

    cdef int set_mask_list(self, MaskList *listed, version, wanted) except -1:
        cdef Mask *shape
        whole = 32 if version == 4 else 128
        ordered = sorted(wanted - {(whole, 16)}, reverse=True)
        listed.masks = <Mask *>zeroed(len(ordered), sizeof(Mask))
        listed.count = len(ordered)
        for at, (prefix, bits) in enumerate(ordered):
            shape = &listed.masks[<uint32_t>at]
            shape.addr = addr_from(ip_network(f"{'0.0.0.0' if version == 4 else '::'}/{prefix}").netmask)
            shape.be_port = be_port_from(0x10000 - (0x10000 >> bits))
            shape.meta = mask_meta(prefix, bits)
        return 0

    cdef int add_echo(self, list specs) except -1:
        """Have each VIP answer echo requests while any of its services has a backend, those of prefixes that hold it as
        well. It is found by a mask of one of its own services."""
        cdef uint64_t shape
        bits_of = {spec.network: spec.blocks[0][1] for spec in reversed(specs)}
        at_network = {}
        for index, spec in enumerate(specs):
            at_network.setdefault(spec.network, []).append(index)
        lengths = {network.prefixlen for network in at_network if network.num_addresses > 1}
        self.servers_of, self.echoes_of = [], [[] for _ in specs]
        self.table.answers_echo = <uint8_t *>zeroed(len(bits_of), sizeof(uint8_t))
        for number, (network, bits) in enumerate(bits_of.items()):
            servers = list(at_network[network])
            for length in lengths:
                if length < network.prefixlen:
                    servers += at_network.get(network.supernet(new_prefix=length), ())
            self.servers_of.append(servers)
            for index in servers:
                self.echoes_of[index].append(number)
            shape = 0 if network.prefixlen == network.max_prefixlen else mask_meta(network.prefixlen, bits)
            table_put(
                &self.table.vips, addr_from(network.network_address), key_meta(network.version, 0, 0) | shape, number)
        for index in range(len(specs)):
            self.answer_echoes(index)
        return 0

    cdef int answer_echoes(self, uint32_t index) except -1:
        """Let the VIPs of this service answer echo requests, or not, as their services have backends now."""
        for number in self.echoes_of[index] if self.echoes_of is not None else ():
            self.table.answers_echo[<uint32_t>number] = any(
                [self.table.services[<uint32_t>server].maglev != NULL for server in self.servers_of[number]])
        return 0

    cdef list set_timeouts(self, list wanted):
        """Each kind once; the position of each that is wanted."""
        cdef uint32_t at, state
        kinds = {}
        positions = [
            kinds.setdefault(tuple(each[key] for key in TIMED_STATES), len(kinds)) for each in wanted]
        if len(kinds) > MAX_TIMEOUTS:
            raise ValueError(f"services have {len(kinds)} kinds of timeouts; at most {MAX_TIMEOUTS} can be told apart")
        self.table.timeouts = <Timeouts *>zeroed(len(kinds), sizeof(Timeouts))
        for at, seconds in enumerate(kinds):
            for states, each in zip(TIMED_STATES.values(), seconds):
                for state in states:
                    self.table.timeouts[at].of_state[state] = milliseconds(each)
        return positions

    cdef int add_service(self, uint32_t index, spec, const uint32_t *members) except -1:
        cdef Service *service = &self.table.services[index]
        service.vip = addr_from(spec.network.network_address)
        service.has_prefix = spec.network.num_addresses > 1
        service.family = spec.network.version
        service.protocol = PROTOCOLS[spec.protocol]
        service.be_port = be_port_from(spec.port)
        service.first_port = spec.blocks[0][0]
        service.last_port = spec.blocks[len(spec.blocks) - 1][0] + (0xFFFF >> spec.blocks[len(spec.blocks) - 1][1])
        service.forward = FORWARDS[spec.forward]
        service.no_backend = NO_BACKEND_RESET if spec.no_backend == "reset" else NO_BACKEND_DROP
        service.members = members
        service.mss = spec.mss
        service.slot = spec.slot
        self.set_tunnel(service, spec.tunnel)
        service.scheduler = SCHEDULERS[spec.scheduler]
        service.bounded_load = round(spec.bounded_load * BOUND_UNIT)
        cdef uint64_t shape
        for port, bits in spec.blocks:
            shape = mask_meta(spec.network.prefixlen, bits, spec.network.max_prefixlen)
            table_put(
                &self.table.vips, service.vip,
                key_meta(service.family, service.protocol, be_port_from(port)) | shape, index)
        shape = mask_meta(spec.network.prefixlen, spec.blocks[0][1]) if service.has_prefix else 0
        table_put(
            &self.table.vips, service.vip, key_meta(service.family, service.protocol | LATER_BIT, 0) | shape, index)

    cdef int choose(self, uint32_t index, spec, Choices choices) except -1:
        """Let a service's flows choose from these, by the tables of its spec."""
        cdef Service *service = &self.table.services[index]
        cdef MaglevTable table = spec.table
        cdef KetamaRing ring = spec.ring
        cdef SmoothWrr rotation = spec.rotation
        self.choices[index] = choices
        service.maglev, service.maglev_size = NULL, 0
        if table is not None:
            service.maglev, service.maglev_size = table.slots, table.size
            service.maglev_inverse = <uint64_t>0xFFFFFFFFFFFFFFFFULL // table.size
        service.ring_size = 0
        if ring is not None:
            service.ring_points, service.ring, service.ring_index = ring.points, ring.positions, ring.index
            service.ring_size, service.ring_shift = ring.size, ring.shift
        service.wrr_size = 0
        if rotation is not None:
            service.wrr, service.wrr_size = rotation.positions, rotation.size
        service.candidates, service.candidate_of = choices.candidates, choices.candidate_of
        service.candidate_count, service.weight = choices.candidate_count, choices.weight
        service.restrained = service.bounded_load != 0 or choices.capped
        self.affinities[index].sticky_backends = choices.sticky_backends
        self.affinities[index].sticky_limit = choices.sticky_limit
        return 0

    cdef int add_affinity(self, uint32_t index, spec) except -1:
        cdef Affinity *by = &self.affinities[index]
        by.mask = addr_from(ip_network(
            f"{'0.0.0.0' if spec.network.version == 4 else '::'}/{spec.affinity.prefix}").netmask)
        by.group = spec.affinity.group
        by.ticks = (milliseconds(spec.affinity.timeout) >> TICK_BITS) + 2    # that much at least, and half a second
        self.table.services[index].affinity = by
        for member in spec.members:
            self.table.sticky_numbers[<uint32_t>member.id] = member.place
        return 0

    cdef int set_tunnel(self, Service *service, tunnel) except -1:
        service.with_key = tunnel.key is not None
        service.be_key = bswap32(tunnel.key or 0)
        service.be_tunnel_port = be_port_from(tunnel.port)
        service.df = DONT_FRAGMENT[tunnel.df]
        service.zero_checksum4 = tunnel.udp_checksum is not True
        service.zero_checksum6 = tunnel.udp_checksum is False
        return 0

    cdef int add_backend(self, uint32_t index, spec, member, uint16_t timeouts) except -1:
        cdef Service *service = &self.table.services[index]
        cdef Backend *backend = &self.table.backends[<uint32_t>member.id]
        backend.addr = addr_from(member.address)
        backend.service = index
        backend.be_port = be_port_from(member.port)
        backend.family = member.address.version
        backend.protocol = service.protocol
        backend.present = 1
        backend.flow_policy = FLOW_POLICIES[member.flow_policy]
        backend.timeouts = timeouts
        whole = member.address.max_prefixlen
        for port, bits in ((member.port, 16),) if member.port else spec.blocks:
            self.add_reply(service, backend, member.id, key_meta(
                backend.family, backend.protocol, be_port_from(port)) | mask_meta(whole, bits, whole))
        if service.forward in (FORWARD_NAT, FORWARD_FULLNAT):
            table_put(
                &self.table.replies if service.forward == FORWARD_NAT else &self.table.fullnat_replies, backend.addr,
                key_meta(backend.family, backend.protocol | LATER_BIT, 0), member.id)
        return 0

    cdef int add_reply(self, const Service *service, Backend *backend, uint32_t number, uint64_t meta) except -1:
        cdef uint32_t first
        if service.forward == FORWARD_FULLNAT:
            table_put(&self.table.fullnat_replies, backend.addr, meta, number)
        elif service.forward == FORWARD_NAT:
            first = find(&self.table.replies, backend.addr, meta)
            if first != MISSING:
                backend.next_reply = first
            table_put(&self.table.replies, backend.addr, meta, number)
        return 0

    def __dealloc__(self):
        free(self.affinities)
        free(self.table.backends)
        free(self.table.answers_echo)
        if not self.is_changed:
            self.free_shared()
        free(self.table.services)

    cdef void free_shared(self) noexcept:
        """Free what those that `with_changes` made have in common with this one, which they keep alive."""
        cdef uint32_t version
        free(self.table.sticky_numbers)
        free_admission(&self.table)
        free(self.table.timeouts)
        free(self.members)
        table_free(&self.table.vips)
        table_free(&self.table.replies)
        table_free(&self.table.fullnat_replies)
        for version in range(2):
            free(self.table.vip_masks[version].masks)
            free(self.table.reply_masks[version].masks)


cdef class Routes:
    """Next hops as the data path sees them. Immutable.

    ``hops``: (destination MAC, source MAC, interface index, MTU, fault) with fault None, "no_route", "no_neighbour"
    or "not_on_link"; ``prefixes``: (network, interface index, hop position or None for on-link), or `HostRoutes` and
    (interface index, hop position or None) of each of its ways; ``neighbours``: {(interface index, address): hop
    position}; ``backends``: {backend id: hop position}; ``sources``: {backend id: network}, where a tunnel's packets to
    it come from.
    """

    def __cinit__(self, hops, prefixes, neighbours, backends, sources=None):
        if not isinstance(prefixes, tuple) or not prefixes or not isinstance(prefixes[0], HostRoutes):
            host = HostRoutes.of([(network, (ifindex, position)) for network, ifindex, position in prefixes], None)
            prefixes = host, host.ways
        self.host, ways = prefixes
        self.table.ways4, self.table.ways6 = &self.host.intervals4, &self.host.intervals6
        self.allocate(len(hops) + 1, len(ways), len(neighbours), max(backends, default=0) + 1)
        # Position 0 stands for "no route"; a caller's position n is n + 1 here.
        self.table.hops[0].fault = DROP_NO_ROUTE
        for index, hop in enumerate(hops, 1):
            self.set_hop(&self.table.hops[index], hop)
        for index, (ifindex, position) in enumerate(ways):
            self.table.routes[<uint32_t>index].ifindex = ifindex
            self.table.routes[<uint32_t>index].hop = NO_HOP if position is None else position + 1
        for (ifindex, address), position in neighbours.items():
            table_put(
                &self.table.neighbours, addr_from(address), neighbour_meta(address.version, ifindex), position + 1)
        for backend, position in backends.items():
            self.table.backend_hop[<uint32_t>backend] = position + 1
        for backend, network in (sources or {}).items():
            self.set_source(backend, network)

    cdef int allocate(self, size_t hops, size_t ways, size_t neighbours, uint32_t backend_limit) except -1:
        self.table.hops = <Hop *>zeroed(hops, sizeof(Hop))
        self.table.routes = <LinkRoute *>zeroed(ways, sizeof(LinkRoute))
        self.table.backend_hop = <uint32_t *>zeroed(backend_limit, sizeof(uint32_t))
        self.table.backend_source = <Source *>zeroed(backend_limit, sizeof(Source))
        self.table.backend_limit = backend_limit
        if not table_init(&self.table.neighbours, neighbours):
            raise MemoryError

    cdef int set_hop(self, Hop *hop, tuple described) except -1:
        cdef bytes dst_mac, src_mac
        dst_mac, src_mac, hop.ifindex, hop.mtu, fault = described
        dst_mac, src_mac = dst_mac.ljust(6, b"\0"), src_mac.ljust(6, b"\0")
        memcpy(hop.dst_mac, <const char *>dst_mac, 6)
        memcpy(hop.src_mac, <const char *>src_mac, 6)
        hop.fault = HOP_FAULTS[fault]
        return 0

    cdef int set_source(self, uint32_t backend, network) except -1:
        if backend >= self.table.backend_limit:
            raise ValueError(f"backend {backend} has a source and no hop")
        self.table.backend_source[backend].addr = addr_from(network.network_address)
        self.table.backend_source[backend].length = network.prefixlen
        self.table.backend_source[backend].known = True
        return 0

    def __dealloc__(self):
        free(self.table.hops)
        free(self.table.routes)
        free(self.table.backend_hop)
        free(self.table.backend_source)
        table_free(&self.table.neighbours)


cdef class PublishedSnapshot:
    """Services and routes together, as one generation; keeps both alive."""

    def __cinit__(self, Services services, Routes routes, uint64_t generation):
        self.services = services
        self.routes = routes
        self.value.services = &services.table
        self.value.routes = &routes.table
        self.value.generation = generation
