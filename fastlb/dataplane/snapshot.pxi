# The Python face of what a snapshot is made of: Services (from the configuration), Routes (from the kernel).

cdef enum:
    MAX_TIMEOUTS = 1 << 16   # kinds of them: Backend.timeouts has 16 bits

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


cdef Addr addr_from(address) except *:
    """From an ipaddress object, or anything with its ``packed`` bytes in network order."""
    cdef bytes packed = address.packed
    if len(packed) == 4:
        return read_addr4(<const uint8_t *><char *>packed)
    return read_addr6(<const uint8_t *><char *>packed)


cdef object address_from(Addr addr, uint8_t family):
    cdef uint8_t packed[16]
    write_addr6(packed, addr)
    if family == FAMILY_4:
        return IPv4Address(PyBytes_FromStringAndSize(<char *>packed + 12, 4))
    return IPv6Address(PyBytes_FromStringAndSize(<char *>packed, 16))


cdef uint16_t be_port_from(port) except? 0xFFFF:
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"port {port} is not in 0..65535")
    return bswap16(<uint16_t>port)


cdef uint32_t milliseconds(double seconds) except? 0xFFFFFFFF:
    if not 0 < seconds <= 7 * 86400:
        raise ValueError(f"a timeout is above 0 and at most 7 days, not {seconds} s")
    return <uint32_t>(seconds * 1000)


cdef uint64_t mask_meta(prefix, bits, whole=0) except *:
    """What keys of a shape have in their meta, above port, protocol and family; 0 for all bits of both."""
    return 0 if prefix == whole and bits == 16 else <uint64_t>(prefix + 1) << 32 | <uint64_t>(bits + 1) << 48


cdef void *zeroed(size_t count, size_t size) except NULL:
    cdef void *memory = calloc(count if count else 1, size)
    if memory == NULL:
        raise MemoryError
    return memory


cdef uint32_t weight_in_load(scheduler, member) except? 0:
    """p2c draws by the weight that slow start leaves, and compares what a backend can carry: else an idle one in slow
    start would lose against every other idle one, and get nothing.
    """
    if scheduler == "lc":
        return member.unweighted
    return member.target_weight if scheduler == "p2c" else member.weight


cdef dict sticky_backends_of(spec):
    """{number of a place: (members of the service that take its clients, whether slots go on naming it)}."""
    places = {member.place: ([member] if member.sticky else [], False) for member in spec.members if member.place}
    for member in spec.members:
        for number, held in member.same_address if member.sticky else ():
            places.setdefault(number, ([], held))[0].append(member)
    return places


cdef void free_sticky_backends(Affinity *by) noexcept:
    cdef uint32_t number
    for number in range(by.sticky_limit):
        free(by.sticky_backends[number].takers)
    free(by.sticky_backends)


cdef class Services:
    """Services and backends as the data path sees them. Immutable.

    ``specs``: an iterable of objects with ``network`` (the VIP as a prefix), ``port`` (0: several), ``blocks`` (those
    ports, as (port, leading bits) of shapes.py), ``protocol``, ``forward``, ``no_backend``, ``mss`` (bytes; 0: leave
    it, 65535: what fits), ``tunnel`` (as `fastlb.config.Tunnel`), ``scheduler``, ``table`` (MaglevTable or None),
    ``ring`` (KetamaRing or None), ``rotation`` (SmoothWrr or None), ``bounded_load`` (0: not bounded), ``affinity``
    (None, or an object with ``group``, 64 bits that its services share, ``prefix`` and ``timeout`` in seconds),
    ``timeouts`` (its own, or None), ``allow``, ``deny`` (networks of the VIP's version), ``source_limit`` (with rate,
    burst and prefix, or None), ``slot`` (of its counters, 1..65535, stable over reloads) and ``members``: objects with
    ``id`` (1..2**20-1, stable over reloads), ``address``, ``port`` (0: the packet's), ``weight``, ``unweighted`` (in place of
    the weight where that does not count), ``response`` (seconds that health checks take; 0: unknown), ``max_flows`` (0:
    any number), ``place`` (1..2**18-1, its number in the affinity's group; 0: it has left), ``same_address`` (other places at
    its address, and whether each has to stay in the slots that name it), ``sticky`` (takes clients that stick to it)
    and ``flow_policy`` (what becomes of its flows: all, except_syn, none, to_reset; see types.pxd), in the order of the
    tables' positions. ``timeouts``: seconds by the keys tcp_syn, tcp_established, tcp_half_closed,
    tcp_closing, udp. ``echo``: VIPs answer echo requests. ``new_flows``: at most how many entries all workers make a
    second, and at once; 0: no limit.
    """

    def __cinit__(self, specs, *, uint64_t hash_seed, timeouts, echo=False, new_flows=(0, 0)):
        specs = list(specs)
        self.tables = [(spec.table, spec.ring, spec.rotation) for spec in specs]
        self.allocate(specs)
        self.table.hash_seed = hash_seed
        profiles = self.set_timeouts([timeouts, *(spec.timeouts or timeouts for spec in specs)])
        self.table.new_flow_rate, self.table.new_flow_burst = new_flows
        cdef uint32_t at = 0
        for index, spec in enumerate(specs):
            self.add_service(index, spec, &self.members[at])
            self.table.services[<uint32_t>index].timeouts = profiles[index + 1]
            put_admission(&self.table, &self.table.services[<uint32_t>index], index, spec)
            self.add_candidates(&self.table.services[<uint32_t>index], spec, at)
            if spec.affinity is not None:
                self.add_affinity(index, spec)
            for member in spec.members:
                self.members[at] = member.id
                self.add_backend(index, spec, member, profiles[index + 1])
                at += 1
        proven = sum(proves_itself(&self.table.services[<uint32_t>index]) for index in range(len(specs)))
        self.table.mixed = 0 < proven < len(specs)
        if echo:
            self.add_echo(specs)

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
        self.candidate_of = <uint32_t *>zeroed(len(ids), sizeof(uint32_t))
        self.candidates = <Candidate *>zeroed(len(ids), sizeof(Candidate))
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
        """For each VIP, whether any of its services has a backend, those of prefixes that hold it as well; found by a
        shape of one of its own."""
        cdef uint64_t shape
        bits_of = {spec.network: spec.blocks[0][1] for spec in reversed(specs)}
        served = {spec.network for spec in specs if spec.table is not None}
        lengths = {network.prefixlen for network in served if network.num_addresses > 1}
        for network, bits in bits_of.items():
            has_backend = network in served or any(
                network.supernet(new_prefix=length) in served for length in lengths if length < network.prefixlen)
            shape = 0 if network.prefixlen == network.max_prefixlen else mask_meta(network.prefixlen, bits)
            table_put(
                &self.table.vips, addr_from(network.network_address), key_meta(network.version, 0, 0) | shape,
                has_backend)
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
        cdef MaglevTable table = spec.table
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
        if table is not None:
            service.maglev = table.slots
            service.maglev_size = table.size
            service.maglev_inverse = <uint64_t>0xFFFFFFFFFFFFFFFFULL // table.size
        cdef uint64_t shape
        for port, bits in spec.blocks:
            shape = mask_meta(spec.network.prefixlen, bits, spec.network.max_prefixlen)
            table_put(
                &self.table.vips, service.vip,
                key_meta(service.family, service.protocol, be_port_from(port)) | shape, index)
        shape = mask_meta(spec.network.prefixlen, spec.blocks[0][1]) if service.has_prefix else 0
        table_put(
            &self.table.vips, service.vip, key_meta(service.family, service.protocol | LATER_BIT, 0) | shape, index)

    cdef int add_candidates(self, Service *service, spec, uint32_t at) except -1:
        """What the scheduler needs; ``at``: where the service's members begin."""
        cdef KetamaRing ring = spec.ring
        cdef SmoothWrr rotation = spec.rotation
        cdef Candidate *candidate
        service.scheduler = SCHEDULERS[spec.scheduler]
        if ring is not None:
            service.ring_points, service.ring, service.ring_index = ring.points, ring.positions, ring.index
            service.ring_size, service.ring_shift = ring.size, ring.shift
        if rotation is not None:
            service.wrr, service.wrr_size = rotation.positions, rotation.size
        service.candidates = &self.candidates[at]
        service.candidate_of = &self.candidate_of[at]
        for position, member in enumerate(spec.members):
            if member.weight > 0:
                self.candidate_of[at + <uint32_t>position] = service.candidate_count
                candidate = &service.candidates[service.candidate_count]
                candidate.backend = member.id
                candidate.weight = weight_in_load(spec.scheduler, member)
                candidate.response = <uint32_t>min(member.response * 1e6, 1e9)
                candidate.max_flows = member.max_flows or NO_CAP
                service.weight += candidate.weight
                service.candidate_count += 1
        service.bounded_load = round(spec.bounded_load * BOUND_UNIT)
        service.restrained = service.bounded_load != 0 or any(member.max_flows for member in spec.members)
        return 0

    cdef int add_affinity(self, uint32_t index, spec) except -1:
        cdef Affinity *by = &self.affinities[index]
        places = sticky_backends_of(spec)
        if not all(0 <= number < 1 << STICKY_BITS for number in places):
            raise ValueError(f"places of an affinity group are 1..{(1 << STICKY_BITS) - 1}")
        by.mask = addr_from(ip_network(
            f"{'0.0.0.0' if spec.network.version == 4 else '::'}/{spec.affinity.prefix}").netmask)
        by.group = spec.affinity.group
        by.ticks = (milliseconds(spec.affinity.timeout) >> TICK_BITS) + 2    # that much at least, and half a second
        by.sticky_limit = max(places, default=0) + 1
        by.sticky_backends = <StickyBackend *>zeroed(by.sticky_limit, sizeof(StickyBackend))
        self.table.services[index].affinity = by
        for member in spec.members:
            self.table.sticky_numbers[<uint32_t>member.id] = member.place
        for number, (takers, held) in places.items():
            self.set_sticky_backend(&by.sticky_backends[<uint32_t>number], spec.scheduler, takers, held)
        return 0

    cdef int set_sticky_backend(self, StickyBackend *place, scheduler, list takers, bint held) except -1:
        """Of several takers those with weight 0 have no part, unless all have it."""
        cdef Taker *taker
        weights = [weight_in_load(scheduler, member) for member in takers]
        weighted = [(member, weight) for member, weight in zip(takers, weights) if weight or not any(weights)]
        place.takers = <Taker *>zeroed(len(weighted), sizeof(Taker))
        place.count, place.pinned = len(weighted), held
        for at, (member, weight) in enumerate(weighted):
            taker = &place.takers[<uint32_t>at]
            taker.backend, taker.max_flows, taker.weight = member.id, member.max_flows or NO_CAP, weight or 1
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
        if self.affinities != NULL:
            for index in range(self.table.service_count):
                free_sticky_backends(&self.affinities[<uint32_t>index])
        free(self.affinities)
        free(self.table.sticky_numbers)
        free_admission(&self.table)
        free(self.table.services)
        free(self.table.backends)
        free(self.table.timeouts)
        free(self.members)
        free(self.candidate_of)
        free(self.candidates)
        table_free(&self.table.vips)
        table_free(&self.table.replies)
        table_free(&self.table.fullnat_replies)
        for version in range(2):
            free(self.table.vip_masks[<uint32_t>version].masks)
            free(self.table.reply_masks[<uint32_t>version].masks)


cdef class Routes:
    """Next hops as the data path sees them. Immutable.

    ``hops``: (destination MAC, source MAC, interface index, MTU, fault) with fault None, "no_route", "no_neighbour"
    or "not_on_link"; ``prefixes``: (network, interface index, hop position or None for on-link); ``neighbours``:
    {(interface index, address): hop position}; ``backends``: {backend id: hop position}; ``sources``: {backend id:
    network}, where a tunnel's packets to it come from.
    """

    def __cinit__(self, hops, prefixes, neighbours, backends, sources=None):
        self.allocate(len(hops) + 1, len(prefixes), len(neighbours), max(backends, default=0) + 1)
        # Position 0 stands for "no route"; a caller's position n is n + 1 here.
        self.table.hops[0].fault = DROP_NO_ROUTE
        for index, hop in enumerate(hops, 1):
            self.set_hop(&self.table.hops[index], hop)
        for index, (network, ifindex, position) in enumerate(prefixes):
            self.add_prefix(index, network, ifindex, position)
        for (ifindex, address), position in neighbours.items():
            table_put(
                &self.table.neighbours, addr_from(address), neighbour_meta(address.version, ifindex), position + 1)
        for backend, position in backends.items():
            self.table.backend_hop[<uint32_t>backend] = position + 1
        for backend, network in (sources or {}).items():
            self.set_source(backend, network)
        self.set_lengths(prefixes)

    cdef int allocate(self, size_t hops, size_t prefixes, size_t neighbours, uint32_t backend_limit) except -1:
        self.table.hops = <Hop *>zeroed(hops, sizeof(Hop))
        self.table.routes = <LinkRoute *>zeroed(prefixes, sizeof(LinkRoute))
        self.table.backend_hop = <uint32_t *>zeroed(backend_limit, sizeof(uint32_t))
        self.table.backend_source = <Source *>zeroed(backend_limit, sizeof(Source))
        self.table.backend_limit = backend_limit
        if not table_init(&self.table.prefixes, prefixes) or not table_init(&self.table.neighbours, neighbours):
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

    cdef int add_prefix(self, uint32_t index, network, uint32_t ifindex, position) except -1:
        cdef LinkRoute *route = &self.table.routes[index]
        route.ifindex = ifindex
        route.hop = NO_HOP if position is None else position + 1
        table_put(
            &self.table.prefixes, addr_from(network.network_address),
            prefix_meta(network.version, network.prefixlen), index)

    cdef int set_lengths(self, prefixes) except -1:
        for length in sorted({network.prefixlen for network, _, _ in prefixes if network.version == 4}, reverse=True):
            self.table.lengths4[self.table.count4] = length
            self.table.count4 += 1
        for length in sorted({network.prefixlen for network, _, _ in prefixes if network.version == 6}, reverse=True):
            self.table.lengths6[self.table.count6] = length
            self.table.count6 += 1

    def __dealloc__(self):
        free(self.table.hops)
        free(self.table.routes)
        free(self.table.backend_hop)
        free(self.table.backend_source)
        table_free(&self.table.prefixes)
        table_free(&self.table.neighbours)


cdef class PublishedSnapshot:
    """Services and routes together, as one generation; keeps both alive."""

    def __cinit__(self, Services services, Routes routes, uint64_t generation):
        self.services = services
        self.routes = routes
        self.value.services = &services.table
        self.value.routes = &routes.table
        self.value.generation = generation
