"""The words that every room shares: addresses and prefixes, how tables match packets, what the host has.

Values only. Nothing here decides, opens anything or knows a clock, and nothing here imports another room.
"""
