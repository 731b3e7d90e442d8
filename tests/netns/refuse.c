/* Preloaded into fastlb: a kernel or device that refuses a part of AF_XDP. REFUSE says which part:
 * socket    no AF_XDP at all
 * metadata  no transmit metadata, as before Linux 6.8
 * bind      the device cannot be bound to */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { FAMILY_XDP = 44, LEVEL_XDP = 283, UMEM_REG = 4, WITH_METADATA = 4 };

static int refused(const char *part) {
    const char *refuse = getenv("REFUSE");
    return refuse && !strcmp(refuse, part);
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
