"""The packet path while it is open: rings, fanout groups, ways out, worker threads and the file of the flow table."""
