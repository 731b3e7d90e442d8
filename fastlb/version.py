"""The version of fastlb. Imports nothing, so that everything may import it; the metadata is read from here too."""

__version__ = "0.1.0"
