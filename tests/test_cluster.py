"""Which machines serve together: flags, and what Kubernetes, TPU pods and Slurm say."""

from pathlib import Path
from typing import Any

import pytest

from jaxserve.cluster import Found, detect, find_cluster, first_host, google_metadata, is_loopback, split_address
from jaxserve.config import ConfigError
from jaxserve.flags import FlagError, parse
from jaxserve.plan_flags import parse as parse_plan

SECRET = {"JAXSERVE_DIST_SECRET": "0123456789abcdef"}
LWS = {"LWS_LEADER_ADDRESS": "llm-0.llm.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc", "TPU_WORKER_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "8001",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "gpu[004-005,9],big1",
    "SLURM_PROCID": "2",
}


def test_one_machine_is_the_default_and_the_neutral_flags_say_so_too():
    for line in ("", "--nnodes 1", "--nnodes 1 --node-rank 0", "--node-rank 0"):
        assert find_cluster(parse(line.split()).cluster, {}) is None
    assert find_cluster({"nnodes": 1}, LWS | GKE | SLURM) is None, "flags win over what surrounds the process"


def test_flags_alone_say_everything(tmp_path: Path):
    path = tmp_path / "secret"
    path.write_text("a secret of twenty-one\n")
    line = f"--nnodes 3 --node-rank 2 --dist-init-addr 10.0.0.1:5000 --dist-secret-file {path} --dist-timeout 30"
    options = parse(line.split())
    cluster = find_cluster(options.cluster, {})
    assert cluster is not None
    assert (cluster.num_nodes, cluster.rank, cluster.host, cluster.port) == (3, 2, "10.0.0.1", 5000)
    assert (cluster.secret, cluster.join_timeout) == (b"a secret of twenty-one", 30.0)
    assert "secret of" not in repr(cluster), "a secret is not logged"
    assert "cluster" not in options.engine and not {"nnodes", "node_rank"} & set(options.engine)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--nnodes 2", "needs --node-rank"),
        ("--nnodes 2 --node-rank 0", "needs --dist-init-addr"),
        ("--nnodes 2 --node-rank 2 --dist-init-addr h:1", "0 to 1"),
        ("--node-rank 1", "--nnodes says how many"),
        ("--dist-init-addr h:1", "--nnodes says how many"),
        ("--nnodes 1 --dist-init-addr h:1", "one machine"),
        ("--nnodes 2 --node-rank 0 --dist-init-addr h:65535", "1 to 65534"),
        ("--nnodes 2 --node-rank 0 --dist-init-addr h:x", "HOST:PORT"),
        ("--nnodes 2 --node-rank 0 --dist-init-addr :80", "HOST:PORT"),
        ("--nnodes 2 --node-rank 0 --dist-init-addr 10.0.0.1", "one secret of at least 16 bytes"),
        ("--nnodes 2 --node-rank 0 --dist-init-addr h --dist-secret-file /nowhere/at/all", "No such file"),
    ],
)
def test_what_is_missing_or_wrong_is_named(line: str, words: str):
    with pytest.raises(ConfigError, match=words):
        find_cluster(parse(line.split()).cluster, {})


def test_a_secret_is_needed_unless_nothing_leaves_the_machine(tmp_path: Path):
    given: dict[str, Any] = {"nnodes": 2, "node_rank": 0}
    for host in ("127.0.0.1:7000", "localhost", "[::1]:7000"):
        assert find_cluster({**given, "dist_init_addr": host}, {}).secret == b""  # ty: ignore[unresolved-attribute]
    with pytest.raises(ConfigError, match="holds 5 bytes"):
        find_cluster({**given, "dist_init_addr": "127.0.0.1"}, {"JAXSERVE_DIST_SECRET": "short"})
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="holds 0 bytes"):
        find_cluster({**given, "dist_init_addr": "127.0.0.1", "dist_secret_file": str(tmp_path / "empty")}, {})
    with pytest.raises(ConfigError, match=r"Slurm .*names several machines.*--nnodes 1"):
        find_cluster({}, SLURM)
    assert not is_loopback("10.0.0.1") and not is_loopback("127.0.0.1.example.org")


def test_leader_worker_set_says_who_is_who():
    assert detect(LWS) == Found("LeaderWorkerSet (LWS_GROUP_SIZE)", 4, 2, "llm-0.llm.default", 8476)
    assert detect(LWS | GKE).num_nodes == 4, "a group on TPUs has both"  # ty: ignore[unresolved-attribute]
    assert detect(LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}) is None
    with pytest.raises(ConfigError, match="LWS_WORKER_INDEX is 'x'"):
        detect(LWS | {"LWS_WORKER_INDEX": "x"})
    cluster = find_cluster({"node_rank": 3, "dist_init_addr": "[fd00::1]:99"}, LWS | SECRET)
    assert cluster is not None and (cluster.num_nodes, cluster.rank, cluster.host, cluster.port) == (
        4,
        3,
        "fd00::1",
        99,
    )


def test_a_tpu_pod_says_it_in_variables_or_by_its_metadata_server():
    assert detect(GKE) == Found("the TPU pod (TPU_WORKER_HOSTNAMES)", 2, 1, "tpu-0.svc", 8476)
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    nowhere = "WARNING: could not determine TPU worker hostnames or IP addresses, please set env var"
    assert detect({"TPU_WORKER_HOSTNAMES": nowhere, "TPU_WORKER_ID": "0"}) is None, "libtpu's, where there is no pod"
    asked: list[str] = []

    def metadata(endpoints: str | None, number: str | None) -> Any:
        def answer(name: str) -> str | None:
            asked.append(name)
            return {"worker-network-endpoints": endpoints, "agent-worker-number": number}[name]

        return answer

    old = "a:unknown:10.0.0.5,b:unknown:10.0.0.6"
    assert detect({}, metadata(old, "1")) == Found("the TPU pod (metadata server)", 2, 1, "10.0.0.5", 8476)
    assert detect({}, metadata("one,two,three", "2\n")).host == "one"  # ty: ignore[unresolved-attribute]
    assert detect({}, metadata("alone", "0")) is None and detect({}, metadata(None, None)) is None
    asked.clear()
    assert detect({"TPU_SKIP_MDS_QUERY": "1"}, metadata(old, "1")) is None and not asked
    with pytest.raises(ConfigError, match="which one this is"):
        detect({}, metadata(old, None))
    with pytest.raises(ConfigError, match="MEGASCALE_NUM_SLICES"):
        detect(GKE | {"MEGASCALE_NUM_SLICES": "2"})
    assert google_metadata("agent-worker-number") is None, "asked only where there is a TPU"


def test_slurm_says_it_to_the_tasks_of_srun_only():
    found = detect(SLURM)
    assert found == Found("Slurm (SLURM_STEP_NUM_NODES)", 3, 2, "gpu004", 49154)
    batch_script = {"SLURM_JOB_ID": "8001", "SLURM_NNODES": "3", "SLURM_NTASKS": "3", "SLURM_PROCID": "0"}
    assert detect(batch_script) is None
    assert detect(SLURM | {"SLURM_STEP_NUM_NODES": "1"}) is None
    with pytest.raises(ConfigError, match="ntasks-per-node=1"):
        detect(SLURM | {"SLURM_STEP_NUM_TASKS": "24"})
    assert [first_host(names) for names in ("a", "a,b", "n[3-9,12],b", "r1-n[07]-ib,x", "n-[1]")] == [
        *("a", "a", "n3", "r1-n07-ib", "n-1")
    ]


def test_an_address_has_a_host_and_perhaps_a_port():
    assert split_address("h") == ("h", 8476) and split_address("h.x:1") == ("h.x", 1)
    assert split_address("[::1]:7") == ("::1", 7) and split_address("[::1]") == ("::1", 8476)


def test_commands_of_one_machine_refuse_several():
    from jaxserve.batch_flags import parse as parse_batch

    files = ["-i", "a", "-o", "b"]
    with pytest.raises(FlagError, match=r"--nnodes 2 is not for this command"):
        parse_batch([*files, "--nnodes", "2"])
    with pytest.raises(FlagError, match=r"--node-rank 1 is not for this command"):
        parse_plan(["--node-rank", "1"])
    assert parse_batch([*files, "--nnodes", "1", "--node-rank", "0"]).options.cluster == {"nnodes": 1, "node_rank": 0}
