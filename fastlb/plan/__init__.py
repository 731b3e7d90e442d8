"""Pure decisions: from a configuration, the states of backends and the kernel's tables to what the data path holds.

Nothing here opens a socket, reads a clock or logs. Time comes in as a number of seconds on the monotonic clock.
"""
