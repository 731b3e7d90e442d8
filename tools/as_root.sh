#!/bin/sh
# Runs its arguments as root: directly when we are, else through sudo (asking only on a terminal).
#   as_root.sh COMMAND...   run it; exit 1 with one line when there is no way to become root
#   as_root.sh --possible   exit 0 when there is a way
set -eu

can_sudo() { command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; }

am_root=false
[ "$(id -u)" -ne 0 ] || am_root=true

if ! $am_root && ! can_sudo; then
    [ "$1" = --possible ] || echo "This needs root (namespaces, packet sockets, eBPF) and sudo is not usable:" \
        "not run: $*" >&2
    exit 1
fi
[ "$1" != --possible ] || exit 0
if $am_root; then
    exec "$@"
fi
exec sudo env PYTHONDONTWRITEBYTECODE=1 "$@" # leave no file of root's in the user's tree
