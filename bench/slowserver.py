"""A server that takes its time: one request after the other, and those that come meanwhile wait in line.

    slowserver.py NAME PORT MILLISECONDS

It reads an HTTP request, sleeps, answers with its name and closes. So it serves 1000 / MILLISECONDS requests a second,
and its load is the length of its line. Prints "ready" once it listens.
"""

from __future__ import annotations

import socket
import sys
import time
from contextlib import suppress

LINE = 4096  # connections that may wait
LONGEST_REQUEST = 4096  # bytes
PATIENCE = 1.0  # seconds for a request to come


def serve(name: str, port: int, seconds: float) -> None:
    """For ever."""
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(name)}\r\nConnection: close\r\n\r\n{name}".encode()
    with socket.create_server(("0.0.0.0", port), backlog=LINE) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # a client that goes away is its own business
                connection.settimeout(PATIENCE)
                connection.recv(LONGEST_REQUEST)
                if seconds:
                    time.sleep(seconds)
                connection.sendall(answer)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000)
