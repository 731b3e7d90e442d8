"""The eBPF programs of fastlb: an assembler, the programs written with it, and the maps that they read.

No compiler is needed at run time: programs are assembled here and loaded by bpf(2).
"""
