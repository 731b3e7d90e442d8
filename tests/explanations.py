"""Explanations for the tests of `fastlb trace`: of an embedded balancer, and of a bare pipeline."""

from __future__ import annotations

from typing import Any

from fastlb import Datapath
from fastlb.observe.explanation import Context, Explanation, parse_tuple
from fastlb.observe.trace import explain
from fastlb.plan.backends import BackendStates
from fastlb.plan.plan import plan_services
from fastlb.plan.tables import services_table
from tests.balancers import CLIENT, VIP, Balancer


def says(dp: Datapath, stage: str, dport: int = 80, protocol: str = "tcp", dst: str = VIP[4]) -> str:
    steps = dp.trace(CLIENT[4], 40000, dst, dport, protocol).steps
    return next(step.says for step in steps if step.stage == stage)


def explained(settings: Any, standings: BackendStates, **more: Any) -> Explanation:
    """Of a balancer whose backends stand so."""
    balancer = Balancer(settings)
    balancer.plans = plan_services(settings, balancer.ids, 0.0, standings)
    balancer.pipeline.publish(services_table(settings, balancer.plans), balancer.routes())
    context = Context(balancer.plans, settings.services, standings, **more)
    return explain(balancer.pipeline, parse_tuple("10.1.0.2:40000", "203.0.113.10:80/tcp"), context, 0)


def backend_says(told: Explanation) -> str:
    return next(step.says for step in told.steps if step.stage == "backend")
