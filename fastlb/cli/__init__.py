"""The `fastlb` command."""
