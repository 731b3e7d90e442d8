"""A server for health checks by TCP: takes every connection to any of its host's addresses, and hangs up.

    acceptor.py PORT       prints "ready" when it listens
"""

from __future__ import annotations

import socket
import sys

BACKLOG = 4096


def main() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", int(sys.argv[1])))
        listener.listen(BACKLOG)
        print("ready", flush=True)
        while True:
            listener.accept()[0].close()


if __name__ == "__main__":
    main()
