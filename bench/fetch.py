"""The client's side of transfer.py: fetches a file over HTTP and prints how many seconds it took.

    fetch.py HOST:PORT BYTES
"""

from __future__ import annotations

import http.client
import sys
import time

CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte


def fetch(host: str, size: int) -> float:
    """Seconds that ``size`` bytes take. They are thrown away: hashing would be a third of the time."""
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT)
    connection.request("GET", f"/bytes/{size}")
    answer = connection.getresponse()
    start, got, buffer = time.monotonic(), 0, bytearray(CHUNK)  # the server is ready to send by now
    while count := answer.readinto(buffer):
        got += count
    seconds = time.monotonic() - start
    if got != size:
        raise OSError(f"{got} bytes instead of {size}")
    return seconds


if __name__ == "__main__":
    print(fetch(sys.argv[1], int(sys.argv[2])))
