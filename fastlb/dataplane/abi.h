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
#include <time.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>

#ifndef PACKET_IGNORE_OUTGOING
#define PACKET_IGNORE_OUTGOING 23
#endif
#ifndef SO_ATTACH_BPF
#define SO_ATTACH_BPF 50
#endif

/* Where TPACKET_V3 puts the sockaddr_ll of a frame, and the virtio_net_hdr in front of it (PACKET_VNET_HDR). */
_Static_assert(sizeof(struct tpacket3_hdr) == 48, "tpacket3_hdr is kernel ABI");
_Static_assert(offsetof(struct tpacket3_hdr, tp_status) == 20, "tpacket3_hdr is kernel ABI");
_Static_assert(offsetof(struct tpacket3_hdr, tp_mac) == 24, "tpacket3_hdr is kernel ABI");
_Static_assert(offsetof(struct tpacket_block_desc, hdr.bh1.block_status) == 8, "tpacket_block_desc is kernel ABI");
_Static_assert(sizeof(struct sockaddr_ll) == 20, "sockaddr_ll is kernel ABI");

#endif
