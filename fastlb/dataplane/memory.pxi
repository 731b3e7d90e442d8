# What the other .pxi files share, so it is included first: memory, and addresses and ports as Python has them.

cdef enum:
    LARGE_PAGE = 2 << 20     # bytes; the parts of a flow table's file are whole multiples of it


# --- memory ----------------------------------------------------------------------------------------------------------

cdef void *zeroed(size_t count, size_t size) except NULL:
    """Allocate ``count`` zeroed elements of ``size`` bytes, for `free`; never NULL, also for no elements."""
    cdef void *memory = calloc(count if count else 1, size)
    if memory == NULL:
        raise MemoryError
    return memory


cdef void *map_zeroed(size_t size) except NULL:
    """Map zeroed pages that cost memory only once they are touched, large ones where the kernel gives them."""
    cdef void *memory = mmap(
        NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if memory == MAP_FAILED:
        raise MemoryError(f"the flow table needs {size} bytes")
    madvise(memory, size, MADV_HUGEPAGE)
    return memory


cdef void unmap(void *memory, size_t size) noexcept:
    if memory != NULL:
        munmap(memory, size)


cdef size_t whole_pages(size_t size) noexcept:
    """Round up to whole large pages."""
    return (size + LARGE_PAGE - 1) & ~<size_t>(LARGE_PAGE - 1)


cdef uint8_t *map_file(int fd, int64_t offset, size_t size) except NULL:
    """Map a part of a file, aligned so that large pages can back it."""
    cdef size_t span = size + LARGE_PAGE
    cdef uint8_t *reserved = <uint8_t *>mmap(
        NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef uint8_t *start
    if reserved == MAP_FAILED:
        raise MemoryError(f"no address space for a flow table of {size} bytes")
    start = <uint8_t *>whole_pages(<size_t>reserved)
    if start != reserved:
        munmap(reserved, start - reserved)
    munmap(start + size, reserved + span - (start + size))
    if mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset) != start:
        munmap(start, size)
        raise OSError(errno, "cannot map the flow table's file")
    return start


cdef bint make_ready(void *memory, size_t size) noexcept:
    """Touch every page, so that no packet waits for one; True when large pages back all of them.

    Linux 6.1 gathers a file's small pages into large ones when it is asked to, whatever the policy for others is.
    """
    cdef bint large
    madvise(memory, size, MADV_HUGEPAGE)
    large = madvise(memory, size, MADV_COLLAPSE) == 0
    madvise(memory, size, MADV_POPULATE_WRITE)
    return large


# --- addresses and ports ---------------------------------------------------------------------------------------------

cdef Addr addr_from(address) except *:
    """Convert an ipaddress object, or anything else with its ``packed`` bytes in network order."""
    cdef bytes packed = address.packed
    if len(packed) == 4:
        return read_addr4(<const uint8_t *><char *>packed)
    return read_addr6(<const uint8_t *><char *>packed)


cdef object address_from(Addr addr, uint8_t family):
    """Convert to an ipaddress object."""
    cdef uint8_t packed[16]
    write_addr6(packed, addr)
    if family == FAMILY_4:
        return IPv4Address(PyBytes_FromStringAndSize(<char *>packed + 12, 4))
    return IPv6Address(PyBytes_FromStringAndSize(<char *>packed, 16))


cdef uint16_t be_port_from(port) except? 0xFFFF:
    """Convert to network order. Raises ValueError for what is no port."""
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"port {port} is not in 0..65535")
    return bswap16(<uint16_t>port)
