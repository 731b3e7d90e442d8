"""The one extension module: every stage of the data path, so that the compiler sees a packet's whole journey.

Only cimports and assembly live here. The stages are fastlb/dataplane/*.pxd, in the order in which a packet meets
them; a .pxi is the Python face of the .pxd of the same name.
"""

from ipaddress import IPv4Address, IPv6Address, ip_network
from os import close as close_fd
from os import urandom
from socket import if_nametoindex, socket
from struct import pack, unpack

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

from fastlb.dataplane.abi cimport (
    AF_PACKET, AF_XDP, EBUSY, EFD_CLOEXEC, EFD_NONBLOCK, ENOBUFS, ETH_P_ALL, MADV_COLLAPSE, MADV_HUGEPAGE,
    MADV_NOHUGEPAGE, MADV_POPULATE_WRITE, MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_POPULATE,
    MAP_PRIVATE, MAP_SHARED, PACKET_FANOUT, PACKET_IGNORE_OUTGOING, PACKET_RESERVE, PACKET_RX_RING, PACKET_STATISTICS,
    PACKET_VERSION, PACKET_VNET_HDR, POLLIN, PROT_NONE, PROT_READ, PROT_WRITE, SOCK_CLOEXEC, SOCK_RAW, SOL_PACKET,
    SOL_SOCKET, SOL_XDP, SO_ATTACH_BPF, SO_DETACH_FILTER, SO_SNDBUFFORCE, TPACKET_V3, UMEM_TX_METADATA, UMEM_UNALIGNED,
    XDP_COPY, XDP_MMAP_OFFSETS, XDP_PGOFF_TX_RING, XDP_SHARED_UMEM, XDP_TX_RING, XDP_UMEM_COMPLETION_RING,
    XDP_UMEM_FILL_RING, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_REG, XDP_USE_NEED_WAKEUP, bind_socket, errno, eventfd,
    eventfd_write, getsockopt, madvise, mmap, munmap, open_socket, setsockopt, sockaddr_ll, sockaddr_xdp, tpacket3_hdr,
    tpacket_block_desc, umem_reg, xdp_desc, xdp_mmap_offsets, xdp_ring_offset)
from fastlb.dataplane.admission cimport (
    LIMIT_SETS, LIMIT_WAYS, MAX_BURST, SET_SHIFT, TAG_MASK, TICKS, TIME_BITS, FlowBudget, may_go_by_hash,
    may_make_entry, slot_of_source, source_key, source_meta, ticks_mask, until_full)
from fastlb.dataplane.affinity cimport (
    STICKY_BITS, TICK_BITS, WAYS_OF_AFFINITY, Client, client_of, is_free, live_slot, sticky_in, taker_of,
    takes_one_more, tick_of, ticks_left)
from fastlb.dataplane.coalesce cimport init_coalescer, write_waiting
from fastlb.dataplane.conntrack cimport (
    BACKEND_BITS, CHECK_BITS, ENTRIES, FLOW_CLOSING, FLOW_ESTABLISHED, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT,
    FLOW_PICKED_UP, FLOW_RESET, FLOW_STATES, FLOW_SYN, FLOW_SYN_ACK, FLOW_UDP, FLOW_UDP_NEW, MAX_BACKENDS, Bucket,
    FlowEntry, FlowTable, backend_of, conflict_with, find_flow, find_reply, forget, gives_way, has_expired, is_over,
    owned_after, owns, pool_of, state_of, tuple_of)
from fastlb.dataplane.decap cimport MODE_GRE, MODE_GUE, MODE_IPIP, run_decap, take_packet
from fastlb.dataplane.flowhash cimport SHARDS, flow_hash, shard_of
from fastlb.dataplane.flowlog cimport FlowEvent, FlowLog
from fastlb.dataplane.fragment cimport (
    HELD_BYTES, MAX_HELD, SETS, WAYS, FragmentNote, FragmentState, HeldFragment, free_slot, release_claimed)
from fastlb.dataplane.hostroutes cimport (
    INDEX_BITS, INDEX_FROM, KEY_ROOM, NO_WAY, Enclosing, ParsedRoute, begins_behind, find_way)
from fastlb.dataplane.inspect cimport FlowCopy, copy_entry, count_flows, next_flow
from fastlb.dataplane.lookup cimport MISSING, find, key_meta, table_free, table_init, table_put
from fastlb.dataplane.machine cimport (
    assert_equal, bswap16, bswap32, bswap64, load_acquire_u32, load_acquire_u64, spin_pause, store_release_u32)
from fastlb.dataplane.maglev cimport MAX_MEMBERS, Permutation, permute, populate
from fastlb.dataplane.mode cimport is_tunnel, outer_length
from fastlb.dataplane.pipeline cimport is_turned_away, must_check_held, next_settled, run_batch, sweep_tables
from fastlb.dataplane.publish cimport pick_up, publish, reader_generation
from fastlb.dataplane.reasons cimport (
    DECAPSULATED, DECAP_REASONS, DECAP_REASON_ROWS, DECAP_TUN_REFUSED, DROP_NOT_ON_LINK, DROP_NO_NEIGHBOUR,
    DROP_NO_ROUTE, DROP_NO_TUNNEL_SOURCE, REASONS, REASON_ROWS, VIA_REJECT, VIA_SCHEDULER, ReasonRow, reason_name,
    verdict_of)
from fastlb.dataplane.reserve cimport entry_to_replace, only_reserve_left, proves_itself
from fastlb.dataplane.ring cimport (
    BLOCK_HEADER, HEADROOM, SLOT_HEADER, RxRing, advance, has_frames, hold_block, init_ring, is_closed,
    kernel_may_refill, next_slot, take_frame)
from fastlb.dataplane.route cimport hop_to_backend, neighbour_meta
from fastlb.dataplane.schedule cimport (
    BOUND_UNIT, BY_KETAMA, BY_LEAST_FLOWS, BY_LEAST_RESPONSE, BY_MAGLEV, BY_P2C, BY_RANDOM, BY_SOURCE_HASH, BY_WRR,
    CURSORS, NO_CAP, Cursor, Response, SchedulerState, active_flows, cursor_of, goes_by_load, goes_by_response,
    goes_in_turn, has_ring, has_room, hash_of_flow, hashed_candidate, load_of, response_of, ring_point,
    scheduled_backend)
from fastlb.dataplane.segments cimport MAX_HEADERS, Cutter, next_frame, start_cutting
from fastlb.dataplane.sendmmsg cimport init_messages
from fastlb.dataplane.service cimport classify
from fastlb.dataplane.sourceport cimport (
    MAX_SOURCES, PROTOCOL_ROWS, ROW_BITS, FreePorts, SourcePool, SourcePort, address_of, free_ports, port_of,
    ports_per_address)
from fastlb.dataplane.state cimport MAX_SERVICES, NUMBERS, ReasonCounts
from fastlb.dataplane.takeover cimport DAMAGED, MAX_DAMAGED, SOUND, UNWANTED, TakenOver, count_owned, take_over
from fastlb.dataplane.track cimport (
    MAX_ALTERNATIVES, backend_in_midflow, entry_of_port, explains, is_found_again, needs_entry, set_flow_of_reply)
from fastlb.dataplane.transmit cimport MAX_OFFLOADS, MAX_XSKS
from fastlb.dataplane.types cimport (
    BATCH, DF_ALWAYS, DF_INNER, DF_NEVER, FAMILY_4, FORWARD_DSR, FORWARD_FULLNAT, FORWARD_GRE, FORWARD_GUE,
    FORWARD_IPIP, FORWARD_NAT, GATE_LIMIT, GATE_LISTS, KEEP_ALL, KEEP_EXCEPT_SYN, KEEP_NONE, KEEP_TO_RESET, LATER_BIT,
    LEG_CLIENT, LEG_REPLY, NO_BACKEND_DROP, NO_BACKEND_RESET, NO_HOP, PROTO_TCP, PROTO_UDP, VNET_HDR_LEN, Addr,
    Admission, Affinity, Backend, BackendStats, Candidate, FlowTuple, Hop, Intervals, LinkRoute, Mask, MaskList,
    Packet, Service, ServiceEvents, ServiceTable, Snapshot, Source, StickyBackend, Taker, Timeouts, VnetHdr)
from fastlb.dataplane.wire cimport ETHERTYPE_OFFLOAD, read_addr4, read_addr6, write_addr6
from fastlb.dataplane.worker cimport MAX_RINGS, clock_ms, clock_ns, run_worker
from fastlb.dataplane.xsk cimport XSK_CHUNK, XSK_METADATA, XSK_READY, XSK_RING, Xsk, XskRing

include "dataplane/memory.pxi"
include "dataplane/reasons.pxi"
include "dataplane/counters.pxi"
include "dataplane/maglev.pxi"
include "dataplane/schedule.pxi"
include "dataplane/admission.pxi"
include "dataplane/hostroutes.pxi"
include "dataplane/snapshot.pxi"
include "dataplane/takeover.pxi"
include "dataplane/affinity.pxi"
include "dataplane/pipeline.pxi"
include "dataplane/inspect.pxi"
include "dataplane/worker.pxi"
include "dataplane/decap.pxi"
