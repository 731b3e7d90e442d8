"""Everything that fastlb asks of the running kernel but packets: its tables by netlink, addresses, the guard, cores."""
