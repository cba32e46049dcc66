"""A fleet of jaxserve servers on Ray Serve: `serve run deploy.ray:app` from the checkout. deploy/ray/README.md."""

from typing import TYPE_CHECKING

from deploy.ray.args import FleetArgs

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: FleetArgs) -> "Application":
    """What `serve run` and `serve deploy` build; `name=value` on the command line, `args:` in a config file."""
    from deploy.ray.fleet import build  # ray is needed here only, so that the rest is tested without it

    return build(args)
