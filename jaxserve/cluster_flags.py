"""Flags of several machines that serve one model. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

from jaxserve.flag_file import FlagError
from jaxserve.flag_values import Flag, at_least, positive, seconds

CLUSTER_FLAGS = (
    Flag(
        ("--nnodes",),
        "launch.nnodes",
        "machines that serve one model together, each started with the same flags "
        "(default: what LeaderWorkerSet, a TPU pod or srun says, else 1)",
        positive,
    ),
    Flag(
        ("--node-rank",),
        "launch.node_rank",
        "which of them this one is: 0 serves clients, the others compute with it (default: from there too)",
        at_least(0),
    ),
    Flag(
        ("--dist-init-addr",),
        "launch.dist_init_addr",
        "HOST:PORT of rank 0, as the others reach it; PORT + 1 is used too (default: from there, port 8476)",
    ),
    Flag(
        ("--dist-secret-file",),
        "launch.dist_secret_file",
        "file with a secret that all machines know; without one only 127.0.0.1 is served "
        "(default: the variable JAXSERVE_DIST_SECRET)",
    ),
    Flag(
        ("--dist-timeout",),
        "launch.dist_timeout",
        "seconds until all machines must have come together (default: 600)",
        seconds,
    ),
)


def options_of(launch: Mapping[str, Any]) -> dict[str, Any]:
    """Those of them that were given, by the names of jaxserve.cluster."""
    names = [flag.target.removeprefix("launch.") for flag in CLUSTER_FLAGS]
    return {name: launch[name] for name in names if name in launch}


def refuse_several(given: Mapping[str, Any], instead: str) -> None:
    """For commands of one machine. Raises FlagError."""
    for flag in CLUSTER_FLAGS:
        value = given.get(flag.target.removeprefix("launch."))
        if value is not None and (flag.names[0], value) not in (("--nnodes", 1), ("--node-rank", 0)):
            raise FlagError(f"{flag.names[0]} {value} is not for this command: {instead}")
