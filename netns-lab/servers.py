"""The servers of one backend, each on both IP versions, until the process is ended.

    port 80, 8080    HTTP/1.1 with keep-alive, a thread for each connection
                       GET /            the backend's name, and the client's address as the backend sees it
                       GET /bytes/N     N bytes, their SHA-256 in the header X-SHA256
                       POST /upload     the body's SHA-256
    port 5000, 5001  UDP echo, the backend's name in front, from the address that was asked
    port 9           UDP discard (RFC 863): the kernel drops what comes, so a flood costs no process time

Usage: servers.py NAME. Prints "ready" once every port listens.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import socket
import socketserver
import struct
import sys
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO, ClassVar

HTTP_PORTS = (80, 8080)
ECHO_PORTS = (5000, 5001)
DISCARD_PORT = 9
LARGEST_BODY = 1 << 32  # bytes that GET /bytes/N gives at most
STACK = 256 << 10  # bytes for each thread, so that a thousand connections are cheap
PATTERN_SIZE = 16_000_057  # bytes; prime, so that no power-of-two slip of the stream goes unnoticed


def pattern_file() -> BinaryIO:
    """The deterministic bytes, in memory but behind a file descriptor, so that sendfile(2) can send them."""
    file = os.fdopen(os.memfd_create("pattern"), "w+b")
    file.write(random.Random("fastlb").randbytes(PATTERN_SIZE))
    file.flush()
    return file


@lru_cache(maxsize=16)
def pattern_sha256(size: int) -> str:
    """SHA-256 of the first ``size`` bytes of the pattern, repeated without end."""
    pattern = random.Random("fastlb").randbytes(PATTERN_SIZE)
    digest = hashlib.sha256()
    for _ in range(size // PATTERN_SIZE):
        digest.update(pattern)
    digest.update(pattern[: size % PATTERN_SIZE])
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    backend: ClassVar[str]
    pattern: ClassVar[BinaryIO]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes: the second must not wait for an ACK

    def do_GET(self) -> None:
        if self.path == "/":
            client = str(self.client_address[0]).removeprefix("::ffff:")
            self.answer(f"{self.backend}\n{client}\n".encode())
        elif self.path.startswith("/bytes/") and self.path[7:].isdigit():
            self.send_bytes(min(int(self.path[7:]), LARGEST_BODY))
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        if self.path != "/upload":
            self.send_error(404)
            return
        digest = hashlib.sha256()
        left = int(self.headers.get("Content-Length", "0"))
        while left and (chunk := self.rfile.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        self.answer(f"{digest.hexdigest()}\n".encode())

    def answer(self, body: bytes) -> None:
        """Send a short body."""
        self.start_answer(len(body))
        self.wfile.write(body)

    def start_answer(self, size: int, **headers: str) -> None:
        """Send the status line and the headers."""
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("X-Backend", self.backend)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def send_bytes(self, size: int) -> None:
        """Send ``size`` bytes of the pattern without copying them through this process."""
        self.start_answer(size, X_SHA256=pattern_sha256(size))
        while size:
            size -= self.connection.sendfile(self.pattern, 0, min(size, PATTERN_SIZE))

    def log_message(self, *_: object) -> None:
        """A line for each of many thousand requests would say nothing."""


class HttpServer(socketserver.ThreadingTCPServer):
    """TCPServer rather than HTTPServer: the latter looks its own name up in the DNS when it binds."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is its own business."""


def dual_stack_udp(port: int) -> socket.socket:
    """A UDP socket that takes IPv6, and IPv4 as mapped addresses."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    return sock


def open_echo(port: int) -> socket.socket:
    """An echo socket that learns which address each datagram was sent to."""
    sock = dual_stack_udp(port)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    return sock


def serve_echo(sock: socket.socket, backend: bytes) -> None:
    """Echo for ever; the answer's source is the address that was asked, which with dsr is the VIP."""
    size = struct.calcsize("16sI")
    while True:
        data, ancillary, _, client = sock.recvmsg(65535, socket.CMSG_SPACE(size))
        asked = next(value[:16] for _, kind, value in ancillary if kind == socket.IPV6_PKTINFO)
        source = struct.pack("16sI", asked, 0)  # no interface: the routing rules choose it
        reply = [backend, b" ", data]
        sock.sendmsg(reply, [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source)], 0, client)


def open_discard() -> socket.socket:
    """A socket that nobody reads, with the smallest buffer there is."""
    sock = dual_stack_udp(DISCARD_PORT)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    return sock


def main() -> None:
    _, backend = sys.argv
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    threading.stack_size(STACK)
    Handler.backend = backend
    Handler.pattern = pattern_file()
    http = [HttpServer(("::", port), Handler) for port in HTTP_PORTS]
    echo = [open_echo(port) for port in ECHO_PORTS]
    discard = open_discard()
    threads = [threading.Thread(target=server.serve_forever) for server in http]
    threads += [threading.Thread(target=serve_echo, args=(sock, backend.encode())) for sock in echo]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    for thread in threads:
        thread.join()
    discard.close()


if __name__ == "__main__":
    main()
