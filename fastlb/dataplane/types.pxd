"""The structures that stages hand to each other. No behaviour lives here.

Names carry byte order: ``be_*`` is as on the wire, everything else is in host order.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef struct Addr:
    # 16 bytes as on the wire. IPv4: twelve zero bytes, then the address, so that IPv4 lives in `lo` alone.
    uint64_t hi
    uint64_t lo


cdef struct FlowTuple:
    # A flow from the client's point of view.
    Addr client
    Addr vip
    uint16_t be_cport
    uint16_t be_vport
    uint8_t protocol
    uint8_t family
    uint16_t began           # the beginning in ticks (schedule.pxd), 15 bits; LOGGED_BIT: it is in the flow log
    uint32_t source          # fullnat: its source port, as from take_port (sourceport.pxd); 0: none
    uint32_t since           # milliseconds


cdef struct Key:
    # What the lookup tables are keyed by. meta: be_port | protocol << 16 | family << 24 | prefix length << 32.
    Addr addr
    uint64_t meta


cdef struct Slot:
    Key key
    uint32_t value
    uint32_t used


cdef struct Table:
    # Open addressing with linear probing, at most a quarter full; written once, then read by every worker.
    Slot *slots
    uint64_t mask


cdef struct Mask:
    # Which bits of address and port some entries of a table look at (tuple space search). Their keys have `meta`.
    Addr addr
    uint64_t meta
    uint16_t be_port


cdef struct MaskList:
    # The masks of one IP version that a table has beside whole addresses and ports, the most specific first.
    Mask *masks
    uint32_t count


cdef packed struct VnetHdr:
    # struct virtio_net_hdr: how the frame that follows uses checksum offload and segmentation offload.
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len
    uint16_t gso_size
    uint16_t csum_start
    uint16_t csum_offset


cdef enum:
    VNET_NEEDS_CSUM = 1
    VNET_HDR_LEN = 10
    GSO_TCP4 = 1             # VIRTIO_NET_HDR_GSO_*
    GSO_TCP6 = 4
    GSO_UDP = 5
    GSO_ECN = 0x80           # beside them
    BATCH = 32               # frames in flight between two stages: enough to hide a cache miss, all in L1
    FAMILY_4 = 4
    FAMILY_6 = 6
    PROTO_TCP = 6
    PROTO_UDP = 17
    LATER_BIT = 0x80         # in the protocol of a key: for fragments without ports
    NO_HOP = 0xFFFFFFFFU
    CLAMP_TO_PATH = 0xFFFF


cdef enum Forward:
    FORWARD_NAT = 0
    FORWARD_FULLNAT = 1      # up to here: both legs pass, and are translated
    FORWARD_DSR = 2
    FORWARD_IPIP = 3         # from here on: a packet is wrapped into another
    FORWARD_GRE = 4
    FORWARD_GUE = 5


cdef enum DontFragment:
    # The flag of an outer IPv4 header.
    DF_INNER = 0             # as the inner packet; set for IPv6, which no router fragments
    DF_ALWAYS = 1
    DF_NEVER = 2


cdef enum:
    LOGGED_BIT = 1 << 15     # of FlowTuple.began


cdef enum Leg:
    LEG_NONE = 0
    LEG_CLIENT = 1           # from a client to a VIP
    LEG_REPLY = 2            # from a backend to a client (nat, fullnat)
    LEG_ECHO = 3             # an echo request to a VIP


cdef enum Fragment:
    FRAGMENT_NONE = 0
    FRAGMENT_FIRST = 1       # with the ports
    FRAGMENT_LATER = 2


cdef enum OnNoBackend:
    NO_BACKEND_DROP = 0
    NO_BACKEND_RESET = 1


cdef enum FlowPolicy:
    # What becomes of the flows that a backend has.
    KEEP_NONE = 0            # each is placed anew with its next packet from the client; so are flows of an unknown id
    KEEP_ALL = 1
    KEEP_EXCEPT_SYN = 2      # the backend may be dead: a SYN on one of its flows starts a new flow elsewhere
    KEEP_TO_RESET = 3        # each is answered with RST at its next packet from the client


cdef struct Backend:
    # In half a cache line; what every packet of a known flow reads is together.
    Addr addr
    uint32_t service         # index into Services.services
    uint32_t next_reply      # the next backend id with the same address, port and protocol; 0 ends the list
    uint16_t be_port         # 0: the packet's own port stays
    uint8_t family
    uint8_t protocol
    uint8_t present          # 0: this id belongs to no backend of this configuration
    uint8_t flow_policy      # see FlowPolicy
    uint16_t timeouts        # index into ServiceTable.timeouts


cdef struct Timeouts:
    # Milliseconds by flow state.
    uint32_t of_state[16]


cdef struct Candidate:
    # A backend that takes new flows.
    uint32_t backend         # its id
    uint32_t weight
    uint32_t response        # us, as health checks see it; 0: unknown
    uint32_t max_flows       # flows that it may have; NO_CAP: any number


cdef struct Taker:
    # A backend that takes clients who stick to a StickyBackend.
    uint32_t backend         # its id
    uint32_t max_flows       # flows that it may have, as of Candidate
    double weight            # among those of its address


cdef struct StickyBackend:
    # What a backend of an affinity group is to one service: its own backend, or those that it has at the same address.
    Taker *takers
    uint32_t count           # 0: none takes its clients
    bint pinned              # another service tells by it which of several it is, so a slot still names it


cdef struct Affinity:
    # How the clients of a service stick to backends (affinity.pxd).
    Addr mask                # of a client's address
    uint64_t group           # the same for all services that share their clients
    StickyBackend *sticky_backends  # by number
    uint32_t sticky_limit
    uint32_t ticks           # the timeout


cdef enum Gate:
    # What the packets of a service's clients must pass (admission.pxd).
    GATE_LISTS = 1           # every packet
    GATE_LIMIT = 2           # the first of a flow


cdef struct Admission:
    # Whom a service lets in. Immutable.
    uint8_t lengths[129]     # of the prefixes in its lists, longest first
    uint8_t length_count
    uint8_t only_allowed     # who is in no list is denied
    uint8_t limit_prefix     # bits of an address that make a source
    uint64_t limit_interval  # between new flows of a source in the long run, in ticks of admission.pxd
    uint64_t limit_burst     # in ticks too: how far ahead of that a source may be


cdef struct Service:
    Addr vip
    const uint16_t *maglev   # maglev_size slots, each a position in members; NULL without a backend
    const uint32_t *members  # backend ids in the order of their keys
    uint64_t maglev_inverse  # (2 ** 64 - 1) // maglev_size
    uint32_t maglev_size
    uint16_t be_port         # 0: several, from `first_port` to `last_port`
    uint16_t first_port
    uint16_t last_port
    uint8_t has_prefix       # the VIP is the first address of a prefix
    uint8_t family
    uint8_t protocol
    uint8_t forward
    uint8_t no_backend
    uint8_t with_key         # gre: there is one
    uint8_t df               # ipip, gre, gue: see DontFragment
    uint32_t be_key
    uint16_t be_tunnel_port  # gue: where backends listen
    uint8_t zero_checksum4   # gue: no outer UDP checksum over IPv4
    uint8_t zero_checksum6   # and over IPv6 (RFC 6935)
    uint8_t scheduler        # see Scheduler
    uint8_t ring_shift       # the hash's upper bits are the index
    uint8_t gates            # see Gate
    const uint64_t *ring_points      # ketama: ring_size hashes, ascending
    const uint16_t *ring             # the position in members of each
    const uint32_t *ring_index       # the first point that is not below the index's part of the hashes
    uint32_t ring_size
    uint32_t wrr_size
    const uint16_t *wrr      # positions in members, in turn
    Candidate *candidates
    const uint32_t *candidate_of     # by position in members
    uint32_t candidate_count
    uint32_t bounded_load    # hundredths; 0: not bounded
    uint64_t weight          # of all candidates
    const Affinity *affinity     # NULL: none
    bint restrained          # the load is bounded, or a candidate has a cap
    uint16_t mss             # clamp TCP's MSS to this; 0: not at all, CLAMP_TO_PATH: to what fits
    uint16_t slot            # of its counters: the same after a reload
    uint16_t timeouts        # as its backends have it
    const Admission *admission  # NULL without a gate


cdef struct ServiceTable:
    # The immutable half of a snapshot that comes from the configuration.
    Table vips               # (VIP, port, protocol) -> index into services
    Table replies            # nat: (backend, port, protocol) -> the first backend id with it
    Table fullnat_replies    # fullnat: (backend, port, protocol)
    Table sources            # (service, prefix) -> whether it is allowed, of services with lists
    MaskList vip_masks[2]    # IPv4, IPv6
    MaskList reply_masks[2]  # of replies and fullnat_replies
    Service *services
    Backend *backends        # by stable id; [0] is never present
    uint32_t *sticky_numbers  # by stable id: its number in its affinity group
    uint8_t *answers_echo    # by the number of a VIP, which `vips` has: one of its services has a backend
    uint32_t service_count
    uint32_t backend_limit   # one above the largest id
    uint64_t hash_seed
    Timeouts *timeouts       # [0]: those of services without their own
    uint64_t new_flow_rate   # entries a second, by all workers; 0: no limit
    uint64_t new_flow_burst
    bint mixed               # flows of some services can prove themselves, those of others cannot (reserve.pxd)


cdef struct Hop:
    # A neighbour that frames can be sent to.
    uint8_t dst_mac[6]
    uint8_t src_mac[6]
    uint32_t ifindex
    uint32_t mtu             # of the layer-3 packet
    uint32_t fault           # 0, or the drop reason that explains why nothing can be sent there


cdef struct Intervals:
    # The routes of one IP version by intervals of addresses; hostroutes.pxd draws it.
    uint64_t *hi
    uint64_t *lo             # NULL: all are 0
    uint32_t *way
    uint32_t *index          # by an address's first bits; NULL: there are few intervals
    uint32_t count


cdef struct LinkRoute:
    # A way that prefixes of the host's routing table have.
    uint32_t hop             # through a gateway: index into hops; NO_HOP: each destination is its own next hop
    uint32_t ifindex


cdef struct Source:
    # Where packets of a tunnel come from: the bits behind the prefix differ by flow.
    Addr addr
    uint32_t length
    uint32_t known           # 0: no address of the backend's family


cdef struct RouteTable:
    # The immutable half of a snapshot that comes from the kernel.
    Hop *hops
    LinkRoute *routes        # by way
    const Intervals *ways4   # the intervals belong to HostRoutes
    const Intervals *ways6
    Table neighbours         # (address, 0, 0; meta carries the interface) -> index into hops
    uint32_t *backend_hop    # by backend id
    Source *backend_source   # by backend id
    uint32_t backend_limit


cdef struct Snapshot:
    # What one batch sees: picked up once, never changed, freed when every reader has passed it.
    ServiceTable *services
    RouteTable *routes
    uint64_t generation


cdef struct Packet:
    # One frame on its way through the stages. `frame` moves when a header grows or a tag goes.
    uint8_t *frame
    uint32_t length
    uint32_t ifindex         # where it came in
    uint32_t out_ifindex     # where it leaves
    VnetHdr vnet             # its offloads; all zero for a plain frame. Transmit writes it back in front of the frame
    uint16_t l3              # offset of the IP header from frame
    uint16_t l4              # offset of the TCP or UDP header; of the ICMP header
    uint16_t quoted          # offset of the IP header that an ICMP error quotes; 0: not an ICMP error
    uint16_t quoted_l4       # and of the TCP or UDP header behind it
    uint16_t be_sport
    uint16_t be_dport
    uint16_t vlan_tci        # a tag that the kernel took out of the frame
    uint16_t vlan_tpid       # 0: there was none
    uint8_t family
    uint8_t protocol
    uint8_t asked            # the protocol in keys of tables: the packet's, of a later fragment with LATER_BIT
    uint8_t fragment         # see Fragment
    uint8_t more             # fragments behind this one
    uint16_t offset          # of a fragment within its datagram, and how many bytes of it it has
    uint32_t payload
    uint32_t datagram        # the number that its fragments share
    uint8_t tcp_flags
    uint8_t leg
    uint8_t fault            # 0, or why this packet must be dropped if it is ours
    uint8_t reason
    uint16_t l4_header       # bytes
    uint32_t l3_length       # IP header and payload, without Ethernet padding
    uint32_t segment_size    # 0: leaves as one frame; else bytes of payload in each segment (segments.pxd)
    uint32_t fragment_size   # 0: those leave whole; else the bytes of each fragment that they leave in
    uint16_t outer           # bytes of the tunnel's headers, in front of l3; 0: there is none
    bint summed              # the tunnel's UDP header has a checksum
    uint32_t service         # index, on the client leg
    uint32_t backend         # stable id; 0: none chosen yet
    uint32_t source          # fullnat: the flow's source port, as from take_port; 0: none
    void *entry              # where `prefetch_rest` saw the flow's entry, or room for it; NULL: not known
    Addr src                 # with an ICMP error: of the answer to what it quotes
    Addr dst
    Addr sender              # of an ICMP error
    uint64_t fingerprint     # of the flow; on the reply leg only the upper half is known
    uint64_t placement       # the hash by which it gets its backend (schedule.pxd); 0: not computed yet
    uint32_t shard


cdef struct ServiceEvents:
    # What befell the new and the half-open flows of one service.
    uint64_t affine          # new flows that went where their client's last one had gone
    uint64_t affine_moved    # new flows that could not, so that their client was placed anew
    uint64_t load_moved      # new flows whose first choice had no room
    uint64_t conflict_moved  # nat: new flows whose backend already talks to the client's port
    uint64_t evicted         # half-open flows given up for newer ones
    uint64_t untracked       # flows without an entry, because no other gave way


cdef struct BackendStats:
    uint64_t packets         # from clients
    uint64_t bytes
    uint64_t reply_packets
    uint64_t reply_bytes
    uint64_t new_flows
    uint64_t answered_flows  # of TCP
    int64_t active_flows
