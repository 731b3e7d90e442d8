"""Kernel structures and system calls of the data path, from abi.h."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "abi.h" nogil:
    enum:
        AF_PACKET
        ETH_P_ALL
        TP_STATUS_KERNEL
        TP_STATUS_USER
        TP_STATUS_VLAN_VALID
        TP_STATUS_VLAN_TPID_VALID
        MSG_DONTWAIT
        POLLERR
        POLLIN
        SO_ERROR
        EINTR
        EAGAIN
        EBUSY
        ENOBUFS
        EMSGSIZE
        ENETDOWN
        ENXIO
        ENODEV
        EFD_NONBLOCK
        EFD_CLOEXEC
        CLOCK_MONOTONIC
        CLOCK_MONOTONIC_COARSE
        PROT_READ
        PROT_NONE
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_POPULATE
        MADV_HUGEPAGE
        MADV_NOHUGEPAGE
        MADV_COLLAPSE
        MADV_POPULATE_WRITE
        SOL_PACKET
        SOL_SOCKET
        SO_ATTACH_BPF
        SO_DETACH_FILTER
        SO_SNDBUFFORCE
        PACKET_FANOUT
        PACKET_IGNORE_OUTGOING
        PACKET_RESERVE
        PACKET_RX_RING
        PACKET_STATISTICS
        PACKET_VERSION
        PACKET_VNET_HDR
        TPACKET_V3
        AF_XDP
        SOL_XDP
        SOCK_CLOEXEC
        SOCK_RAW
        XDP_COPY
        XDP_SHARED_UMEM
        XDP_USE_NEED_WAKEUP
        XDP_MMAP_OFFSETS
        XDP_TX_RING
        XDP_UMEM_REG
        XDP_UMEM_FILL_RING
        XDP_UMEM_COMPLETION_RING
        XDP_PGOFF_TX_RING
        XDP_UMEM_PGOFF_COMPLETION_RING
        MAP_FIXED
        UMEM_UNALIGNED "FASTLB_UMEM_UNALIGNED"
        UMEM_TX_METADATA "FASTLB_UMEM_TX_METADATA"
        DESC_TX_METADATA "FASTLB_TX_METADATA"
        TXMD_CHECKSUM "FASTLB_TXMD_CHECKSUM"

    struct xdp_desc:
        uint64_t addr
        uint32_t len
        uint32_t options

    struct xdp_ring_offset:
        uint64_t producer
        uint64_t consumer
        uint64_t desc
        uint64_t flags

    struct xdp_mmap_offsets:
        xdp_ring_offset rx
        xdp_ring_offset tx
        xdp_ring_offset fr
        xdp_ring_offset cr

    struct sockaddr_xdp:
        uint16_t sxdp_family
        uint16_t sxdp_flags
        uint32_t sxdp_ifindex
        uint32_t sxdp_queue_id
        uint32_t sxdp_shared_umem_fd

    struct umem_reg "fastlb_umem_reg":
        uint64_t addr
        uint64_t len
        uint32_t chunk_size
        uint32_t headroom
        uint32_t flags
        uint32_t tx_metadata_len

    struct tx_metadata "fastlb_tx_metadata":
        uint64_t flags
        uint16_t csum_start
        uint16_t csum_offset

    struct tpacket_hdr_v1:
        uint32_t block_status
        uint32_t num_pkts
        uint32_t offset_to_first_pkt
        uint32_t blk_len

    union tpacket_bd_header_u:
        tpacket_hdr_v1 bh1

    struct tpacket_block_desc:
        tpacket_bd_header_u hdr

    struct tpacket_hdr_variant1:
        uint32_t tp_vlan_tci
        uint16_t tp_vlan_tpid

    struct tpacket3_hdr:
        uint32_t tp_next_offset
        uint32_t tp_snaplen
        uint32_t tp_len
        uint32_t tp_status
        uint16_t tp_mac
        tpacket_hdr_variant1 hv1

    struct sockaddr_ll:
        uint16_t sll_family
        uint16_t sll_protocol
        int sll_ifindex
        uint8_t sll_halen

    struct iovec:
        void *iov_base
        size_t iov_len

    struct msghdr:
        void *msg_name
        uint32_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen

    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    struct pollfd:
        int fd
        short events
        short revents

    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec

    int errno
    void *MAP_FAILED
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags) noexcept
    int getsockopt(int fd, int level, int option, void *value, unsigned int *length) noexcept
    int poll(pollfd *fds, unsigned long count, int timeout_ms) noexcept
    int clock_gettime(int clock, timespec *now) noexcept
    void *mmap(void *at, size_t length, int protection, int flags, int fd, int64_t offset) noexcept
    int munmap(void *at, size_t length) noexcept
    int eventfd(unsigned int count, int flags) noexcept
    int eventfd_write(int fd, uint64_t value) noexcept
    int open_socket "socket"(int family, int kind, int protocol) noexcept
    int bind_socket "fastlb_bind"(int fd, void *address, uint32_t length) noexcept
    int setsockopt(int fd, int level, int option, void *value, uint32_t length) noexcept
    ssize_t sendto(int fd, void *data, size_t length, int flags, void *address, uint32_t size) noexcept
    int close_descriptor "close"(int fd) noexcept
    ssize_t recv(int fd, void *data, size_t length, int flags) noexcept
    int madvise(void *at, size_t length, int advice) noexcept
    ssize_t writev(int fd, iovec *parts, int count) noexcept
