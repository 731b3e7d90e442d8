"""What may be written in a configuration, what it means, and everything that is wrong with what was written."""
