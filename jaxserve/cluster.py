"""Which machines serve one model together, from flags and from what Kubernetes, TPU pods and Slurm set by themselves.

Pure functions of what launch reads: the environment, files and Google's metadata server come in as arguments.
"""

import ipaddress
import re
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.config import Cluster, ConfigError

DEFAULT_PORT = 8476
JOIN_TIMEOUT = 600.0  # seconds
SECRET_VARIABLE = "JAXSERVE_DIST_SECRET"
MIN_SECRET = 16  # bytes: whoever listens in on a handshake may try to guess it at leisure
_METADATA_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_PRODUCT_NAME = "/sys/class/dmi/id/product_name"

Metadata = Callable[[str], str | None]  # attribute of this virtual machine -> its value


@dataclass(frozen=True, slots=True)
class Found:
    """What an environment says. source: who set it, for messages."""

    source: str
    num_nodes: int
    rank: int
    host: str
    port: int = DEFAULT_PORT


def find_cluster(
    given: Mapping[str, Any], environ: Mapping[str, str], metadata: Metadata = lambda name: None
) -> Cluster | None:
    """given: nnodes, node_rank, dist_init_addr, dist_secret_file and dist_timeout, those that flags hold; they win
    over the environment. None: this machine serves alone. Raises ConfigError.
    """
    if given.get("nnodes") == 1:
        _refuse_others(given, "--nnodes 1 is one machine")
        return None
    found = detect(environ, metadata)
    if "nnodes" not in given and found is None:
        _refuse_others(given, "--nnodes says how many machines there are")
        return None
    source = "--nnodes" if found is None else found.source
    num_nodes = given.get("nnodes") or (found.num_nodes if found else 1)
    rank = given.get("node_rank", found.rank if found else None)
    if rank is None:
        raise ConfigError(f"--nnodes {num_nodes} needs --node-rank: 0 on the machine that clients reach, then 1, 2, …")
    if not rank < num_nodes:
        raise ConfigError(f"--node-rank {rank}: ranks of {num_nodes} machines are 0 to {num_nodes - 1}")
    if "dist_init_addr" in given:
        host, port = split_address(given["dist_init_addr"])
    elif found is not None:
        host, port = found.host, found.port
    else:
        raise ConfigError(f"--nnodes {num_nodes} needs --dist-init-addr HOST:PORT of rank 0, the same on every machine")
    timeout = given.get("dist_timeout", JOIN_TIMEOUT)
    return Cluster(num_nodes, rank, host, port, _secret(given.get("dist_secret_file"), environ, host, source), timeout)


def detect(environ: Mapping[str, str], metadata: Metadata = lambda name: None) -> Found | None:
    """What Kubernetes' LeaderWorkerSet, a TPU pod or Slurm says of several machines; None: nothing, or one machine."""
    return _leader_worker_set(environ) or _tpu_pod(environ, metadata) or _slurm(environ)


def _refuse_others(given: Mapping[str, Any], why: str) -> None:
    for name in ("node_rank", "dist_init_addr", "dist_secret_file", "dist_timeout"):
        if name in given and (name, given[name]) != ("node_rank", 0):
            raise ConfigError(f"--{name.replace('_', '-')} is given, and {why}")


def _secret(path: str | None, environ: Mapping[str, str], host: str, source: str) -> bytes:
    """Of --dist-secret-file, else of the environment. Raises ConfigError."""
    if path is not None:
        try:
            secret = Path(path).read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"--dist-secret-file {path}: {error.strerror}") from error
        where = f"--dist-secret-file {path}"
    else:
        secret, where = environ.get(SECRET_VARIABLE, "").strip().encode(), SECRET_VARIABLE
    if not secret and path is None and is_loopback(host):
        return b""
    if len(secret) < MIN_SECRET:
        said = f"{where} holds {len(secret)} bytes" if secret or path else f"{source} names several machines"
        raise ConfigError(
            f"{said}; machines that serve together need one secret of at least {MIN_SECRET} bytes in "
            f"--dist-secret-file or {SECRET_VARIABLE}, as openssl rand -hex 32 makes it "
            "(--nnodes 1 serves on this machine alone)"
        )
    return secret


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT, HOST or [IPv6]:PORT. Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([^\s:/\[\]]+))(?::(\d+))?", text)
    port = DEFAULT_PORT if match is None or match[3] is None else int(match[3])
    if match is None or not 1 <= port <= 65534:  # the next port is used too
        raise ConfigError(f"--dist-init-addr {text}: it takes HOST:PORT of rank 0, ports being 1 to 65534")
    return match[1] or match[2], port


def _leader_worker_set(environ: Mapping[str, str]) -> Found | None:
    """Set in every container of a group: https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables/"""
    leader = environ.get("LWS_LEADER_ADDRESS")
    if not leader or "LWS_GROUP_SIZE" not in environ or "LWS_WORKER_INDEX" not in environ:
        return None
    size, index = _number(environ, "LWS_GROUP_SIZE"), _number(environ, "LWS_WORKER_INDEX")
    return Found("LeaderWorkerSet (LWS_GROUP_SIZE)", size, index, leader) if size > 1 else None


def _tpu_pod(environ: Mapping[str, str], metadata: Metadata) -> Found | None:
    """GKE sets variables; on a TPU VM the metadata server knows. One slice: what several would need is not there."""
    names, rank = environ.get("TPU_WORKER_HOSTNAMES"), environ.get("TPU_WORKER_ID")
    source = "the TPU pod (TPU_WORKER_HOSTNAMES)"
    if names is None and not environ.get("TPU_SKIP_MDS_QUERY"):
        names, rank = metadata("worker-network-endpoints"), metadata("agent-worker-number")
        source = "the TPU pod (metadata server)"
    parts = [each.strip().split(":") for each in (names or "").split(",") if each.strip()]
    hosts = [each[2] if len(each) == 3 else each[0] for each in parts]  # three on older machines: name:id:address
    if len(hosts) < 2 or not all(re.fullmatch(r"[\w.-]+", host) for host in hosts):
        return None  # libtpu puts a warning into the variable where it finds no pod
    if int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        raise ConfigError("several TPU slices (MEGASCALE_NUM_SLICES) are not served as one; run a server on each slice")
    if rank is None or not rank.strip().isdigit():
        raise ConfigError(f"{source} names {len(hosts)} machines and not which one this is (TPU_WORKER_ID)")
    return Found(source, len(hosts), int(rank), hosts[0])


def _slurm(environ: Mapping[str, str]) -> Found | None:
    """The variables of a step, so that srun alone counts: in a batch script, or a shell of salloc, there is one
    process."""
    nodes, names = environ.get("SLURM_STEP_NUM_NODES"), environ.get("SLURM_STEP_NODELIST")
    if not nodes or not names or int(nodes) < 2 or "SLURM_PROCID" not in environ:
        return None
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    if tasks != int(nodes):
        raise ConfigError(
            f"Slurm runs {tasks} tasks on {nodes} machines; one process uses all devices of its machine: "
            "srun --ntasks-per-node=1"
        )
    port = 49152 + _number(environ, "SLURM_JOB_ID") % 8000 * 2  # two jobs may share a machine
    return Found("Slurm (SLURM_STEP_NUM_NODES)", tasks, _number(environ, "SLURM_PROCID"), first_host(names), port)


def first_host(names: str) -> str:
    """Of a list as Slurm writes it: "a", "a,b", "node[003-009,12],b", "rack1-node[1-4]-ib"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", names)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST {names!r} names no machine")
    return match[1] + (match[2] or "") + (match[3] or "")


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        raise ConfigError(f"{name} is {text!r}, not a number; --nnodes 1 serves on this machine alone")
    return int(text)


def google_metadata(name: str) -> str | None:
    """An attribute of this virtual machine, where it is one of Google's with TPUs; None elsewhere, asking nobody."""
    with suppress(OSError):
        if any(Path(path).exists() for path in _TPU_DEVICES) and "Google" in Path(_PRODUCT_NAME).read_text():
            request = urllib.request.Request(_METADATA_URL + name, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=2) as reply:
                return reply.read().decode()
    return None
