"""The words that every room shares: addresses and prefixes, how tables match packets, modes, what a host has.

Values only: nothing here decides or opens anything, and nothing here imports another room.
"""
