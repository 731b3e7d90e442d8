/* Kernel structures and constants as the data path uses them, with the layouts that it relies on asserted.
 * Constants that older headers lack are declared here with the kernel's values. */
#ifndef FASTLB_ABI_H
#define FASTLB_ABI_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_xdp.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef PACKET_IGNORE_OUTGOING
#define PACKET_IGNORE_OUTGOING 23
#endif
#ifndef SO_ATTACH_BPF
#define SO_ATTACH_BPF 50
#endif

#ifndef AF_XDP
#define AF_XDP 44
#endif
#ifndef SOL_XDP
#define SOL_XDP 283
#endif

/* The address of bind(2) is a transparent union, which Cython cannot pass. */
static inline int fastlb_bind(int fd, const void *address, socklen_t length) {
    return bind(fd, (const struct sockaddr *)address, length);
}

/* AF_XDP with transmit metadata (Linux 6.8), which many distributions' headers do not know yet. */
struct fastlb_umem_reg {
    uint64_t addr;
    uint64_t len;
    uint32_t chunk_size;
    uint32_t headroom;
    uint32_t flags;
    uint32_t tx_metadata_len;
};
struct fastlb_tx_metadata {
    uint64_t flags;
    uint16_t csum_start;
    uint16_t csum_offset;
    uint32_t unused;
    uint64_t launch_time;
};
enum {
    FASTLB_UMEM_UNALIGNED = 1,      /* XDP_UMEM_UNALIGNED_CHUNK_FLAG */
    FASTLB_UMEM_TX_METADATA = 4,    /* XDP_UMEM_TX_METADATA_LEN */
    FASTLB_TX_METADATA = 2,         /* XDP_TX_METADATA, in a descriptor's options */
    FASTLB_TXMD_CHECKSUM = 2,       /* XDP_TXMD_FLAGS_CHECKSUM */
};
_Static_assert(sizeof(struct fastlb_umem_reg) == 32, "struct xdp_umem_reg is kernel ABI");
_Static_assert(sizeof(struct fastlb_tx_metadata) == 24, "struct xsk_tx_metadata is kernel ABI");
_Static_assert(sizeof(struct xdp_desc) == 16, "struct xdp_desc is kernel ABI");

/* Where TPACKET_V3 puts the sockaddr_ll of a frame, and the virtio_net_hdr in front of it (PACKET_VNET_HDR). */
_Static_assert(sizeof(struct tpacket3_hdr) == 48, "tpacket3_hdr is kernel ABI");
_Static_assert(offsetof(struct tpacket3_hdr, tp_status) == 20, "tpacket3_hdr is kernel ABI");
_Static_assert(offsetof(struct tpacket3_hdr, tp_mac) == 24, "tpacket3_hdr is kernel ABI");
_Static_assert(offsetof(struct tpacket_block_desc, hdr.bh1.block_status) == 8, "tpacket_block_desc is kernel ABI");
_Static_assert(sizeof(struct sockaddr_ll) == 20, "sockaddr_ll is kernel ABI");

#endif
