"""The `fastlb` command: main.py finds the command, and each command is a file with `add` and `run`."""
