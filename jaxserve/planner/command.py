"""`jaxserve plan`, after its command line was read."""

import json
import logging
import sys

from jaxserve.config import ConfigError
from jaxserve.plan_flags import PlanJob
from jaxserve.planner.plan import compare, make_plan
from jaxserve.planner.report import describe, table


def run(job: PlanJob) -> int:
    """Prints the plan; 0 it fits, 1 it does not, 2 what the user can mend."""
    logging.getLogger("jaxserve").setLevel(logging.ERROR)
    for warning in job.options.warnings:
        print(f"jaxserve plan: {warning}", file=sys.stderr)
    asked = {"context": job.context, "users": job.users, "engine": job.options.engine}
    try:
        if len(job.topologies) == 1:
            plan = make_plan(job.options.model, job.topologies[0], compile_steps=job.compile_steps, **asked)
            print(json.dumps(plan.to_json(), indent=1) if job.as_json else describe(plan))
            return 0 if plan.fits else 1
        plans = compare(job.options.model, job.topologies or None, **asked)
        print(json.dumps([plan.to_json() for plan in plans], indent=1) if job.as_json else table(plans))
        return 0 if any(plan.fits for plan in plans) else 1
    except ConfigError as error:
        print(f"jaxserve plan: error: {error}", file=sys.stderr)
        return 2
