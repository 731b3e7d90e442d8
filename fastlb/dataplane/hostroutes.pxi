# The host's routes from the kernel's messages, kept by the prefix in as little room as a million of them may take, and
# what the data path looks up in: intervals.
#
#     RouteStore    what the kernel said, message by message: (prefix, attributes) in order; equal attributes are
#                   written once and told apart by a number, as a table of a million routes has few of them
#     HostRoutes    what it amounts to at one moment; immutable

cdef enum:
    LENGTH_SHIFT = 24        # of Prefixes.meta: the prefix length, above the number of the attributes
    NUMBER_MASK = (1 << 24) - 1
    NO_RANK = 0xFFFFFFFFFFFFFFFFULL

    NLMSG_HEADER = 16        # bytes: length 32, type 16, flags 16, sequence 32, port 32
    ROUTE_HEADER = 28        # with rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags 32
    NLMSG_FAILED = 2
    NLMSG_DONE = 3
    NEW_ROUTE = 24
    DEL_ROUTE = 25
    MAIN_TABLE = 254
    CLONED = 0x200           # RTM_F_CLONED: from the cache, no route
    RTA_DST = 1
    RTA_CACHEINFO = 12       # a route's age, which makes it no other route
    RTA_TABLE = 15
    REPLACES = 0x100         # NLM_F_REPLACE, of a new route: instead of the first one with its metric
    APPENDS = 0x800          # NLM_F_APPEND: behind those with its metric

    STORE_SAME = 0           # what a message changed: nothing,
    STORE_CHANGED = 1        # a prefix,
    STORE_UNSURE = 2         # or one cannot tell from the message alone: the kernel has to be asked


cdef inline uint64_t be64(const uint8_t *at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return bswap64(value)


cdef inline bint is_before(uint64_t hi, uint64_t lo, uint64_t other_hi, uint64_t other_lo) noexcept nogil:
    return hi < other_hi or (hi == other_hi and lo < other_lo)


cdef bint parse_route(const uint8_t *message, uint32_t size, ParsedRoute *route) noexcept nogil:
    """Read a route message. False: it has no route that is kept, being another table's, by TOS, by source, local …"""
    cdef uint32_t at = ROUTE_HEADER, length, kind
    cdef uint32_t flags
    cdef uint16_t head[2]
    if size < ROUTE_HEADER:
        return False
    memcpy(&flags, message + 24, 4)
    kind = message[23]                                   # unicast, or one that refuses: see host_tables.py
    if message[20] != MAIN_TABLE or message[18] or message[19] or flags & CLONED or not (kind == 1 or 6 <= kind <= 9):
        return False
    route.family, route.length = message[16], message[17]
    if not (route.family == 2 and route.length <= 32 or route.family == 10 and route.length <= 128):
        return False
    route.hi = route.lo = 0
    memcpy(route.key, message + 21, 7)                   # protocol, scope, type, flags
    route.key[7] = route.family
    route.key_length = 8
    while at + 4 <= size:
        memcpy(head, message + at, 4)
        length = head[0]
        if length < 4 or at + length > size:
            break
        kind = head[1] & 0x3FFF
        if kind == RTA_DST and length == 8:
            route.hi = be64(message + at) << 32          # the attribute's header and the address
        elif kind == RTA_DST and length == 20:
            route.hi, route.lo = be64(message + at + 4), be64(message + at + 12)
        elif kind != RTA_CACHEINFO and kind != RTA_TABLE:
            if route.key_length + length > KEY_ROOM:
                return False
            memcpy(route.key + route.key_length, message + at, length)
            route.key_length += length
        at += (length + 3) & ~3U
    return True


cdef class Prefixes:
    """Prefixes of one IP version, sorted, each with the number of its attributes; those of one prefix in the kernel's
    order."""

    def __cinit__(self, uint64_t room=1024):
        self.reserve(room)

    cdef int reserve(self, uint64_t room) except -1:
        self.hi = <uint64_t *>grown(self.hi, room * sizeof(uint64_t))
        self.meta = <uint32_t *>grown(self.meta, room * sizeof(uint32_t))
        if self.lo != NULL:
            self.lo = <uint64_t *>grown(self.lo, room * sizeof(uint64_t))
        self.room = room
        return 0

    cdef int need_lo(self) except -1:
        if self.lo == NULL:
            self.lo = <uint64_t *>zeroed(self.room, sizeof(uint64_t))
        return 0

    cdef int append(self, uint64_t hi, uint64_t lo, uint32_t meta) except -1:
        if self.count == self.room:
            self.reserve(self.room + self.room // 4 + 1024)
        if lo or meta >> LENGTH_SHIFT > 64:              # whose end is not that of the first 64 bits
            self.need_lo()
        self.hi[self.count], self.meta[self.count] = hi, meta
        if self.lo != NULL:
            self.lo[self.count] = lo
        self.count += 1
        return 0

    cdef uint64_t lo_of(self, uint64_t at) noexcept nogil:
        return 0 if self.lo == NULL else self.lo[at]

    cdef uint64_t place(self, uint64_t hi, uint64_t lo, uint32_t length, bint behind, uint64_t end) noexcept nogil:
        """Return where a prefix begins, or ends with ``behind``, among the first ``end``."""
        cdef uint64_t first = 0, middle
        cdef uint64_t bound = (<uint64_t>length + behind) << LENGTH_SHIFT
        while first < end:
            middle = (first + end) // 2
            if (is_before(self.hi[middle], self.lo_of(middle), hi, lo)
                    or (self.hi[middle] == hi and self.lo_of(middle) == lo and self.meta[middle] < bound)):
                first = middle + 1
            else:
                end = middle
        return first

    cdef void settle_last(self) noexcept nogil:
        """Put what was appended last into its place. The kernel lists a prefix next to those that it holds."""
        cdef uint64_t last = self.count - 1, at
        cdef uint64_t hi = self.hi[last], lo = self.lo_of(last)
        cdef uint32_t meta = self.meta[last]
        if last == 0 or not self.is_ahead(last - 1, hi, lo, meta):
            return
        at = self.place(hi, lo, meta >> LENGTH_SHIFT, True, last)
        memmove(&self.hi[at + 1], &self.hi[at], (last - at) * sizeof(uint64_t))
        memmove(&self.meta[at + 1], &self.meta[at], (last - at) * sizeof(uint32_t))
        self.hi[at], self.meta[at] = hi, meta
        if self.lo != NULL:
            memmove(&self.lo[at + 1], &self.lo[at], (last - at) * sizeof(uint64_t))
            self.lo[at] = lo

    cdef bint is_ahead(self, uint64_t at, uint64_t hi, uint64_t lo, uint32_t meta) noexcept nogil:
        """Return whether the prefix there belongs behind this one."""
        if self.hi[at] != hi or self.lo_of(at) != lo:
            return is_before(hi, lo, self.hi[at], self.lo_of(at))
        return self.meta[at] >> LENGTH_SHIFT > meta >> LENGTH_SHIFT

    cdef int copy(self, Prefixes other, uint64_t begin, uint64_t end) except -1:
        """Append those of another list, which has as much room."""
        cdef uint64_t count = end - begin
        if self.count + count > self.room:
            self.reserve(self.count + count + 1024)
        if other.lo != NULL:
            self.need_lo()
            memcpy(&self.lo[self.count], &other.lo[begin], count * sizeof(uint64_t))
        elif self.lo != NULL:
            memset(&self.lo[self.count], 0, count * sizeof(uint64_t))
        memcpy(&self.hi[self.count], &other.hi[begin], count * sizeof(uint64_t))
        memcpy(&self.meta[self.count], &other.meta[begin], count * sizeof(uint32_t))
        self.count += count
        return 0

    cdef Prefixes changed(self, list changes):
        """Return a copy in which ``changes`` hold: ((hi, lo, length), numbers of attributes), in order."""
        cdef Prefixes made = Prefixes(self.count + len(changes) + 1024)
        cdef uint64_t at = 0, begin, hi, lo
        cdef uint32_t length
        for (hi, lo, length), numbers in changes:
            begin = self.place(hi, lo, length, False, self.count)
            made.copy(self, at, begin)
            for number in numbers:
                made.append(hi, lo, length << LENGTH_SHIFT | <uint32_t>number)
            at = self.place(hi, lo, length, True, self.count)
        made.copy(self, at, self.count)
        return made

    cdef list numbers(self, uint64_t hi, uint64_t lo, uint32_t length):
        """Return the numbers of the attributes under one prefix."""
        cdef uint64_t at = self.place(hi, lo, length, False, self.count)
        found = []
        while (at < self.count and self.hi[at] == hi and self.lo_of(at) == lo
                and self.meta[at] >> LENGTH_SHIFT == length):
            found.append(self.meta[at] & NUMBER_MASK)
            at += 1
        return found

    def __dealloc__(self):
        free(self.hi)
        free(self.lo)
        free(self.meta)


cdef void *grown(void *memory, size_t size) except NULL:
    cdef void *made = realloc(memory, size if size else 1)
    if made == NULL:
        raise MemoryError
    return made


cdef int make_room(Intervals *table, uint64_t room, bint with_lo) except -1:
    """Make room for intervals: what is not touched costs nothing."""
    if room > 0xFFFFFFFF:
        raise MemoryError
    table.hi = <uint64_t *>grown(table.hi, room * sizeof(uint64_t))
    table.way = <uint32_t *>grown(table.way, room * sizeof(uint32_t))
    if with_lo:
        table.lo = <uint64_t *>grown(table.lo, room * sizeof(uint64_t))
    return 0


cdef void add_boundary(Intervals *table, uint64_t hi, uint64_t lo, uint32_t way) noexcept nogil:
    """Let addresses from here on have this way."""
    cdef uint32_t last = table.count - 1
    if table.count and table.hi[last] == hi and (0 if table.lo == NULL else table.lo[last]) == lo:
        table.way[last] = way
        if last and table.way[last - 1] == way:
            table.count -= 1
        return
    if table.count and table.way[last] == way:
        return
    table.hi[table.count], table.way[table.count] = hi, way
    if table.lo != NULL:
        table.lo[table.count] = lo
    table.count += 1


cdef int index_intervals(Intervals *table) except -1:
    """Note for each beginning of addresses, where there are many, the last interval that begins there or before."""
    cdef uint32_t at = 0, first
    make_room(table, table.count, table.lo != NULL)
    if table.count < INDEX_FROM:
        return 0
    table.index = <uint32_t *>zeroed((1 << INDEX_BITS) + 1, sizeof(uint32_t))
    for first in range(1 << INDEX_BITS):
        while at + 1 < table.count and not begins_behind(table, at + 1, <uint64_t>first << (64 - INDEX_BITS), 0):
            at += 1
        table.index[first] = at
    table.index[1 << INDEX_BITS] = table.count - 1
    return 0


cdef class HostRoutes:
    """Routes by prefix: one for each, the best of those that the kernel has. Immutable; iterating makes them.

    ``ways``: what routes of a number have, for ``make``; a route is ``make(prefix, *way)``. Equal if every address has
    the same way.
    """

    def __cinit__(self):
        self.prefixes4, self.prefixes6, self.ways, self.used = Prefixes(1), Prefixes(1), [], frozenset()

    @staticmethod
    def of(routes, make):
        """Make them of pairs of a network and its way; of equal networks the last one holds."""
        cdef HostRoutes made = HostRoutes.__new__(HostRoutes)
        numbers = {}
        chosen = {network: numbers.setdefault(way, len(numbers)) for network, way in routes}
        keyed = sorted((key_of(network), network.version, number) for network, number in chosen.items())
        for (hi, lo, length), version, number in keyed:
            (<Prefixes>(made.prefixes4 if version == 4 else made.prefixes6)).append(
                hi, lo, <uint32_t>length << LENGTH_SHIFT | <uint32_t>number)
        made.finish(make, list(numbers), [(0, number) for number in range(len(numbers))])
        return made

    cdef int finish(self, make, list ways, list choices) except -1:
        """``choices``: by number of attributes, their rank (the least is the best) and way, or None for no use."""
        cdef size_t at
        self.make, self.ways, self.number_count = make, ways, len(choices)
        self.rank = <uint64_t *>zeroed(len(choices), sizeof(uint64_t))
        self.way = <uint32_t *>zeroed(len(choices), sizeof(uint32_t))
        for at, choice in enumerate(choices):
            self.rank[at] = NO_RANK if choice is None else <uint64_t>choice[0]
            self.way[at] = NO_WAY if choice is None else <uint32_t>choice[1]
        make_room(&self.intervals4, 2 * self.prefixes4.count + 1, self.prefixes4.lo != NULL)
        make_room(&self.intervals6, 2 * self.prefixes6.count + 1, self.prefixes6.lo != NULL)
        with nogil:
            self.divide(self.prefixes4, &self.intervals4)
            self.divide(self.prefixes6, &self.intervals6)
        index_intervals(&self.intervals4)
        index_intervals(&self.intervals6)
        self.note_used()
        return 0

    cdef void divide(self, Prefixes prefixes, Intervals *table) noexcept nogil:
        """Fill in the intervals, in one pass: what encloses a prefix comes before it."""
        cdef Enclosing stack[130]
        cdef Enclosing *top
        cdef uint64_t at = 0, hi, lo, last_hi, last_lo
        cdef uint32_t depth = 0, way, length
        add_boundary(table, 0, 0, NO_WAY)
        while at < prefixes.count:
            hi, lo, length = prefixes.hi[at], prefixes.lo_of(at), prefixes.meta[at] >> LENGTH_SHIFT
            way = self.best(prefixes, &at)
            if way == NO_WAY:
                continue
            while depth and is_before(stack[depth - 1].hi, stack[depth - 1].lo, hi, lo):
                depth -= 1
                self.end_prefix(table, stack, depth)
            last_hi = hi | (~<uint64_t>0 >> length if length < 64 else 0)
            last_lo = lo | (~<uint64_t>0 if length <= 64 else ~<uint64_t>0 >> (length - 64) if length < 128 else 0)
            top = &stack[depth]
            top.hi, top.lo, top.way = last_hi, last_lo, way
            depth += 1
            add_boundary(table, hi, lo, way)
        while depth:
            depth -= 1
            self.end_prefix(table, stack, depth)

    cdef void end_prefix(self, Intervals *table, const Enclosing *stack, uint32_t depth) noexcept nogil:
        """Behind a prefix's last address, what encloses it goes on."""
        cdef uint64_t lo = stack[depth].lo + 1
        cdef uint64_t hi = stack[depth].hi + (lo == 0)
        if hi or lo:
            add_boundary(table, hi, lo, stack[depth - 1].way if depth else NO_WAY)

    cdef uint32_t best(self, Prefixes prefixes, uint64_t *at) noexcept nogil:
        """Return the way of the best route of the prefix there, and go on to the next prefix."""
        cdef uint64_t begin = at[0], rank = NO_RANK
        cdef uint32_t way = NO_WAY, number
        while at[0] < prefixes.count and not prefixes.is_ahead(
                at[0], prefixes.hi[begin], prefixes.lo_of(begin), prefixes.meta[begin]) and (
                prefixes.hi[at[0]] == prefixes.hi[begin] and prefixes.lo_of(at[0]) == prefixes.lo_of(begin)):
            number = prefixes.meta[at[0]] & NUMBER_MASK
            if number < self.number_count and self.rank[number] < rank:
                rank, way = self.rank[number], self.way[number]
            at[0] += 1
        return way

    cdef int note_used(self) except -1:
        cdef bytearray marks = bytearray(len(self.ways))
        cdef uint8_t *mark = marks
        cdef uint32_t at
        for at in range(self.intervals4.count):
            if self.intervals4.way[at] != NO_WAY:
                mark[self.intervals4.way[at]] = 1
        for at in range(self.intervals6.count):
            if self.intervals6.way[at] != NO_WAY:
                mark[self.intervals6.way[at]] = 1
        self.used = frozenset([(at, self.ways[at]) for at in range(len(self.ways)) if mark[at]])
        return 0

    @property
    def ways_in_use(self):
        """The ways that any address has."""
        return frozenset([way for _, way in self.used])

    def find(self, address):
        """Return the route of the longest prefix that holds an address, or None."""
        cdef Prefixes prefixes = self.prefixes4 if address.version == 4 else self.prefixes6
        cdef uint64_t hi, lo, begin, at, masked_hi, masked_lo
        cdef uint32_t length, way
        cdef int bits
        hi, lo, length = key_of_address(address)
        if find_way(&self.intervals4 if address.version == 4 else &self.intervals6, hi, lo) == NO_WAY:
            return None
        for bits in range(length, -1, -1):
            masked_hi = hi & ~(~<uint64_t>0 >> bits) if bits < 64 else hi
            masked_lo = 0 if bits <= 64 else lo & ~(~<uint64_t>0 >> (bits - 64)) if bits < 128 else lo
            begin = at = prefixes.place(masked_hi, masked_lo, bits, False, prefixes.count)
            if (at == prefixes.count or prefixes.hi[at] != masked_hi or prefixes.lo_of(at) != masked_lo
                    or prefixes.meta[at] >> LENGTH_SHIFT != <uint32_t>bits):
                continue
            way = self.best(prefixes, &at)
            if way != NO_WAY:
                return self.made(address.version, begin, prefixes, way)
        return None

    cdef object made(self, version, uint64_t at, Prefixes prefixes, uint32_t way):
        cdef uint64_t hi = prefixes.hi[at]
        number = int(hi) >> 32 if version == 4 else int(hi) << 64 | int(prefixes.lo_of(at))
        address = IPv4Address(number) if version == 4 else IPv6Address(number)
        return self.make(ip_network((address, prefixes.meta[at] >> LENGTH_SHIFT)), *self.ways[way])

    def __iter__(self):
        cdef Prefixes prefixes
        cdef uint64_t at, begin
        cdef uint32_t way
        for version in (4, 6):
            prefixes = self.prefixes4 if version == 4 else self.prefixes6
            at = 0
            while at < prefixes.count:
                begin = at
                way = self.best(prefixes, &at)
                if way != NO_WAY:
                    yield self.made(version, begin, prefixes, way)

    def __len__(self):
        return self.prefixes4.count + self.prefixes6.count

    def __eq__(self, other):
        cdef HostRoutes routes
        if not isinstance(other, HostRoutes):
            return NotImplemented
        routes = other
        return self is routes or (
            self.used == routes.used and same_intervals(&self.intervals4, &routes.intervals4)
            and same_intervals(&self.intervals6, &routes.intervals6))

    __hash__ = None

    def __dealloc__(self):
        free(self.rank)
        free(self.way)
        free_intervals(&self.intervals4)
        free_intervals(&self.intervals6)


cdef void free_intervals(Intervals *table) noexcept:
    free(table.hi)
    free(table.lo)
    free(table.way)
    free(table.index)


cdef bint same_intervals(const Intervals *one, const Intervals *other) noexcept:
    return (
        one.count == other.count and (one.lo == NULL) == (other.lo == NULL)
        and memcmp(one.hi, other.hi, one.count * sizeof(uint64_t)) == 0
        and memcmp(one.way, other.way, one.count * sizeof(uint32_t)) == 0
        and (one.lo == NULL or memcmp(one.lo, other.lo, one.count * sizeof(uint64_t)) == 0))


cdef tuple key_of(network):
    hi, lo, _ = key_of_address(network.network_address)
    return hi, lo, network.prefixlen


cdef tuple key_of_address(address):
    number = int(address)
    return (number << 32, 0, 32) if address.version == 4 else (number >> 64, number & 0xFFFFFFFFFFFFFFFF, 128)


cdef class RouteStore:
    """The main table's routes as the kernel's messages say, kept up by its events.

    ``describe`` makes an object of a route message, for each kind of attributes once: with ``metric``, and with
    ``same``, which is equal for two kinds that differ only in flags that come and go.
    """

    def __cinit__(self, describe):
        self.describe, self.numbers, self.described = describe, {}, []
        self.prefixes4, self.prefixes6 = Prefixes(), Prefixes()
        self.changes4, self.changes6 = {}, {}
        self.route.key_length = 0

    cdef uint32_t number(self, const uint8_t *message, uint32_t size) except? 0xFFFFFFFF:
        """Return the number of the attributes that were parsed last."""
        cdef bytes key
        if (self.route.key_length == self.last_length
                and memcmp(self.route.key, self.last_key, self.last_length) == 0):
            return self.last_number
        key = PyBytes_FromStringAndSize(<char *>self.route.key, self.route.key_length)
        found = self.numbers.get(key)
        if found is None:
            if len(self.described) >= NUMBER_MASK:
                raise MemoryError("more kinds of routes than can be told apart")
            self.described.append(self.describe(PyBytes_FromStringAndSize(<char *>message, size)))
            found = self.numbers[key] = len(self.described) - 1
        memcpy(self.last_key, self.route.key, self.route.key_length)
        self.last_length, self.last_number = self.route.key_length, found
        return self.last_number

    cdef int add(self, Prefixes prefixes, uint32_t number) except -1:
        """Add the route that was parsed last. A dump of IPv6 during which routes change may have one twice."""
        cdef ParsedRoute *route = &self.route
        if route.family != 2 and number in prefixes.numbers(route.hi, route.lo, route.length):
            return 0
        prefixes.append(route.hi, route.lo, route.length << LENGTH_SHIFT | number)
        prefixes.settle_last()
        return 0

    def load(self, const uint8_t[::1] data, int family):
        """Take in a datagram of a dump. Returns None while there is more to come, then the kernel's errno, mostly 0."""
        cdef uint32_t at = 0, size, total = data.shape[0]
        cdef uint16_t kind
        cdef int32_t error
        cdef const uint8_t *message
        while at + NLMSG_HEADER <= total:
            message = &data[at]
            memcpy(&size, message, 4)
            memcpy(&kind, message + 4, 2)
            if size < NLMSG_HEADER or at + size > total:
                break
            at += (size + 3) & ~3U
            if kind == NLMSG_DONE or kind == NLMSG_FAILED:
                memcpy(&error, message + NLMSG_HEADER, 4)
                return -error
            if kind != NEW_ROUTE or not parse_route(message, size, &self.route) or self.route.family != family:
                continue
            self.add(self.prefixes4 if family == 2 else self.prefixes6, self.number(message, size))
        return None

    def apply(self, const uint8_t[::1] data, uint32_t offset, bint late=False):
        """Take in an event, and return what it changes: one of STORE_SAME, STORE_CHANGED, STORE_UNSURE.

        ``late``: it may be older than what was dumped, so that a route that is not there is none to wonder about.
        """
        cdef uint32_t size, number
        cdef uint16_t kind, flags
        cdef const uint8_t *message = &data[offset]
        cdef Prefixes prefixes
        memcpy(&size, message, 4)
        memcpy(&kind, message + 4, 2)
        memcpy(&flags, message + 6, 2)
        if size > data.shape[0] - offset or not parse_route(message, size, &self.route):
            return STORE_SAME
        number = self.number(message, size)
        key = (int(self.route.hi), int(self.route.lo), int(self.route.length))
        pending = self.changes4 if self.route.family == 2 else self.changes6
        known = pending.get(key)
        if known is None:
            prefixes = self.prefixes4 if self.route.family == 2 else self.prefixes6
            known = prefixes.numbers(self.route.hi, self.route.lo, self.route.length)
        after = self.removed(known, number) if kind == DEL_ROUTE else self.added(known, number, flags)
        if after is None:
            return STORE_SAME if late and kind == DEL_ROUTE else STORE_UNSURE
        if after == known:
            return STORE_SAME
        pending[key] = after
        return STORE_CHANGED

    cdef list removed(self, list known, uint32_t number):
        """Return the numbers without this one; None: it is not there."""
        same = self.described[number].same
        for at, each in enumerate(known):
            if self.described[each].same == same:
                return known[:at] + known[at + 1:]
        return None

    cdef list added(self, list known, uint32_t number, uint16_t flags):
        """Return the numbers with this one, where the kernel puts it; None: IPv6 may have joined it to another one."""
        route = self.described[number]
        if any([self.described[each].same == route.same for each in known]):
            return known
        equals = [at for at, each in enumerate(known) if self.described[each].metric == route.metric]
        if not equals:
            return [*known, number]
        if flags & REPLACES and (len(equals) == 1 or self.route.family == 2):
            return [*known[:equals[0]], number, *known[equals[0] + 1:]]
        if self.route.family != 2:
            return None
        at = equals[len(equals) - 1] + 1 if flags & APPENDS else equals[0]
        return [*known[:at], number, *known[at:]]

    def table(self, make, list ways, list choices):
        """Return what the routes amount to. ``choices``: by number, as in ``described``, (rank, index of its way)."""
        cdef HostRoutes made = HostRoutes.__new__(HostRoutes)
        if self.changes4:
            self.prefixes4 = self.prefixes4.changed(sorted(self.changes4.items()))
        if self.changes6:
            self.prefixes6 = self.prefixes6.changed(sorted(self.changes6.items()))
        self.changes4, self.changes6 = {}, {}
        made.prefixes4, made.prefixes6 = self.prefixes4, self.prefixes6
        made.finish(make, ways, choices)
        return made
