"""What a configuration may hold, and mostly does not mean: `fastlb check` tells of it, and nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator

from fastlb.config.load import Config


def config_notes(config: Config) -> Iterator[str]:
    """Yield a sentence for each such thing."""
    for service in config.services:
        if service.backends and not any(backend.weight for backend in service.backends):
            yield f"service {service.name}: every backend has weight 0, so that no one takes new flows"
