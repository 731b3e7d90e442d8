"""The step `scheduler` of an explanation: where a new flow would go, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlb.model.modes import SCHEDULERS
from fastlb.observe.explain_backend import MAX_NAMED
from fastlb.observe.explanation import ClientPacket, Step
from fastlb.plan.plan import Member


def explain_scheduler(seen: ClientPacket) -> Step:
    """Return which backend the scheduler, the client's affinity or the hash chooses, and the grounds."""
    scheduled = seen.members.get(seen.found["scheduled"])
    facts = _facts(seen, scheduled)
    if not seen.found["admission"]["scheduled"]:
        by = "its client's affinity" if _affine(seen) else "the flow's hash"
        return Step("scheduler", f"not asked: by {by} -> {seen.backend.key if seen.backend else 'none'}", facts)
    if scheduled is None:
        none = "each backend has the flows that it may have" if seen.found["full"] else "no backend takes new flows"
        return Step("scheduler", f"{seen.plan.scheduler}: {none}", facts)
    return Step("scheduler", _choice(seen, scheduled) + _conflict(seen, scheduled) + _mid_flow(seen), facts)


def _facts(seen: ClientPacket, scheduled: Member | None) -> dict[str, Any]:
    affine, placement = _affine(seen), seen.found["placement"]
    return {
        "scheduler": seen.plan.scheduler,
        "affinity": affine is not None and affine == scheduled,
        "scheduled": scheduled.key if scheduled else None,
        "without_a_syn": seen.key(seen.found["hashed"]),
        **{name: value for name, value in placement.items() if name != "candidates" and value},
        "candidates": [{**each, "backend": seen.key(each["backend"])} for each in placement["candidates"]],
    }


# --- affinity --------------------------------------------------------------------------------------------------------


def _affine(seen: ClientPacket) -> Member | None:
    """Return the backend that the client sticks to, as long as it takes the client's flow."""
    affine = seen.found["affine"]
    return seen.members.get(affine["backend"]) if affine and not affine["full"] else None


def _former(seen: ClientPacket) -> str:
    """Return why what is remembered of the client does not decide; nothing where nothing is."""
    affine = seen.found["affine"]
    if affine is None:
        return ""
    former = seen.key(affine["backend"])
    why = f"{former} has the flows that it may have" if former else "the client's former backend takes none"
    return f"affinity: {why}, so "


# --- the choice ------------------------------------------------------------------------------------------------------


def _choice(seen: ClientPacket, scheduled: Member) -> str:
    affine = _affine(seen)
    if affine is not None:
        left = seen.found["affine"]["left"]
        return f"affinity: the client's last flow went to {affine.key}; remembered for {left:.0f} s more"
    return f"{_former(seen)}{seen.plan.scheduler}: {_grounds(seen)}{_limits(seen)} -> {scheduled.key}"


def _conflict(seen: ClientPacket, scheduled: Member) -> str:
    """Return where the flow goes when the scheduler's choice cannot tell it from another one (nat)."""
    if seen.backend is scheduled:
        return ""
    instead = f"the next by the hash, {seen.backend.key}" if seen.backend else "there is none for it"
    return f"; it already talks to this client port through another VIP, so {instead}"


def _mid_flow(seen: ClientPacket) -> str:
    """Return where a packet in mid-flow goes when that is elsewhere than a SYN."""
    found = seen.found
    if seen.packet.protocol != "tcp" or found["hashed"] == found["scheduled"]:
        return ""
    sticks = found["affine"] is not None and found["affine"]["backend"] == found["hashed"]
    by = "after its client" if sticks else "by hash"
    return f"; a packet that is no SYN goes {by}, to {seen.key(found['hashed'])}"


def _grounds(seen: ClientPacket) -> str:
    """Return by what the service's scheduler goes."""
    placement, scheduler, hashed = seen.found["placement"], seen.plan.scheduler, f"{seen.found['hash']:#018x}"
    slot = f"slot {placement['slot']} of {placement['slots']}"
    if scheduler == "maglev":
        return f"the flow's hash {hashed}, {slot}"
    if scheduler == "source-hash":
        return f"the hash of {seen.packet.src} {hashed}, {slot}"
    if scheduler == "ketama":
        return f"the flow's hash {hashed}, point {placement['point']:#018x}, one of {placement['points']}"
    if scheduler in ("rr", "wrr"):
        return f"turn {placement['turn'] + 1} of {placement['turns']} of this worker, if no other flow comes first"
    if scheduler == "random":
        return f"by lot, the next one of this worker, {_chances(seen)}"
    if scheduler == "p2c":
        return f"the better of two drawn by lot, if no other flow comes first; {_loads(seen)}"
    if placement["candidates"]:
        return f"the least load at this moment, of equals the next in turn; {_loads(seen)}"
    return SCHEDULERS[scheduler].help


def _chances(seen: ClientPacket) -> str:
    members = seen.plan.members
    whole = sum(member.weight for member in members)
    return "by weight " + ", ".join(
        f"{member.key} {member.weight / whole:.1%}" for member in members[:MAX_NAMED] if member.weight
    )


def _loads(seen: ClientPacket) -> str:
    candidates = seen.found["placement"]["candidates"]
    listed = [_load(seen, each) for each in candidates[:MAX_NAMED]]
    more = len(candidates) - len(listed)
    return "; ".join(listed) + (f"; and {more} more" if more else "")


def _load(seen: ClientPacket, candidate: Mapping[str, Any]) -> str:
    response = candidate["response"]
    by = f" x {response * 1000:.2f} ms" if response is not None else ""
    return f"{seen.key(candidate['backend'])} ({candidate['flows']} + 1) / {candidate['weight']}{by}"


def _limits(seen: ClientPacket) -> str:
    """Return the limits by which another backend may be meant than the scheduler's first."""
    bound = f"at most {seen.plan.bounded_load} of its share" if seen.plan.bounded_load else ""
    capped = [member for member in seen.plan.members if member.max_flows]
    caps = ", ".join(f"{member.key} at most {member.max_flows}" for member in capped[:MAX_NAMED])
    limits = "; ".join(each for each in (bound, caps) if each)
    return f", of those with room ({limits})" if limits else ""
