/* Preloaded into fastlb, for faults that no test can make a real machine have.
 *
 * REFUSE names what the kernel, or a device, refuses:
 *   socket    no AF_XDP at all
 *   metadata  no transmit metadata, as before Linux 6.8
 *   bind      the device cannot be bound to
 *   ring      no memory for a receive ring
 *   unshare   no network namespace of one's own, as without CAP_SYS_ADMIN
 *
 * FAULTS names a directory. A worker that is about to sleep and finds a file there takes the file away, and:
 *   die-0     worker 0 ends its thread, as if by a fault of its own
 *   hang-0    worker 0 never comes back */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FAMILY_XDP = 44, LEVEL_XDP = 283, UMEM_REG = 4, WITH_METADATA = 4, LEVEL_PACKET = 263, RX_RING = 5 };

static const char WORKER[] = "worker-"; /* and its number: the name of its thread */

static int refused(const char *part) {
    const char *refuse = getenv("REFUSE");
    return refuse && !strcmp(refuse, part);
}

/* Is it the calling thread's turn to have this fault? */
static int befallen(const char *fault) {
    const char *faults = getenv("FAULTS");
    char thread[16] = "", path[4096];
    prctl(PR_GET_NAME, thread);
    if (!faults || strncmp(thread, WORKER, sizeof WORKER - 1))
        return 0;
    snprintf(path, sizeof path, "%s/%s-%s", faults, fault, thread + sizeof WORKER - 1);
    return unlink(path) == 0;
}

int poll(struct pollfd *fds, nfds_t count, int timeout) {
    int (*real)(struct pollfd *, nfds_t, int) = dlsym(RTLD_NEXT, "poll");
    if (befallen("die"))
        syscall(SYS_exit, 0); /* of the thread alone; nothing else of the process hears of it */
    if (befallen("hang"))
        for (;;)
            pause();
    return real(fds, count, timeout);
}

int unshare(int flags) {
    int (*real)(int) = dlsym(RTLD_NEXT, "unshare");
    if (refused("unshare")) {
        errno = EPERM;
        return -1;
    }
    return real(flags);
}

int socket(int family, int type, int protocol) {
    int (*real)(int, int, int) = dlsym(RTLD_NEXT, "socket");
    if (family == FAMILY_XDP && refused("socket")) {
        errno = EAFNOSUPPORT;
        return -1;
    }
    return real(family, type, protocol);
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t length) {
    int (*real)(int, int, int, const void *, socklen_t) = dlsym(RTLD_NEXT, "setsockopt");
    if (level == LEVEL_XDP && name == UMEM_REG && ((const uint32_t *)value)[6] & WITH_METADATA && refused("metadata")) {
        errno = EINVAL;
        return -1;
    }
    if (level == LEVEL_PACKET && name == RX_RING && refused("ring")) {
        errno = ENOMEM;
        return -1;
    }
    return real(fd, level, name, value, length);
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
    if (address->sa_family == FAMILY_XDP && refused("bind")) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return real(fd, address, length);
}
