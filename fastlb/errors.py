"""Every exception that fastlb raises on purpose, in one tree.

``exit_code`` is what the ``fastlb`` command returns when the error reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass


class FastlbError(Exception):
    """Something failed at run time; the message is one clear line."""

    exit_code = 1


class KernelError(FastlbError):
    """The kernel refused a call, or lacks a feature that fastlb needs."""


class ControlError(FastlbError):
    """The control socket of a running fastlb cannot be reached, or it refused a command."""


class FlowFileError(FastlbError):
    """A flow file cannot be had here."""


class FlowFileUsedError(FlowFileError):
    """Another process holds the flow file."""


@dataclass(frozen=True)
class Problem:
    """One fault in a configuration: where it stands, which key, what is wrong and what would be right."""

    where: str  # "fastlb.yaml:12", or "" for a configuration that came as a dict
    path: str  # "services[0].backends[1].port"
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.message) if part)


class ConfigError(FastlbError):
    """The configuration is invalid; ``problems`` lists every fault found, not only the first."""

    exit_code = 2

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))

    @classmethod
    def at(cls, where: str, path: str, message: str) -> ConfigError:
        """Return the error of a single problem."""
        return cls([Problem(where, path, message)])
