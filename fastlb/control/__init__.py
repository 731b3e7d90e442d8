"""The control socket, by which a running fastlb is looked at and told what to do.

server.py answers with what commands.py knows, which sees the balancer by the protocols of balancer.py; client.py asks;
slices.py keeps large answers from holding up the event loop.
"""
