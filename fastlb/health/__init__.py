"""Health checks: connections to the backends beside the packets' path, and a file for each type of check."""
