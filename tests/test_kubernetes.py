"""deploy/kubernetes against schemas: Kubernetes' own for what is built in, and for custom resources the part of their
definitions that these files may use, so that a field that is not there is an error too."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jaxserve.cluster import DEFAULT_PORT, SECRET_VARIABLE, detect
from jaxserve.flags import parse

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
DOCUMENTS = [(path.stem, document) for path in FILES for document in yaml.safe_load_all(path.read_text())]
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()  # preStop.sleep is on by default since 1.30
BUILT_IN = ("v1", "apps/v1", "policy/v1")
# Paths that the server writes, as deploy/docker says; the root is read-only.
WRITTEN = {"/cache", "/data", "/tmp"}


def closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


TEXT, NUMBER = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1, "maximum": 65535}
LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
METADATA = closed("name", name=TEXT, labels=LABELS, annotations={"type": "object"})
MATCH_LABELS = closed("matchLabels", matchLabels=LABELS)
POD = {"type": "object", "required": ["metadata", "spec"]}  # checked as a Deployment's


def listed(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": of}


def resource(group: str, spec: dict[str, Any]) -> dict[str, Any]:
    return closed("apiVersion kind metadata spec", apiVersion={"const": group}, kind=TEXT, metadata=METADATA, spec=spec)


# Names, types and choices as in the openAPIV3Schema of each definition: leaderworkerset.x-k8s.io v0.6,
# inference.networking.k8s.io v1.0, gateway.networking.k8s.io v1.2, monitoring.coreos.com of Prometheus operator 0.80.
CUSTOM = {
    "LeaderWorkerSet": resource(
        "leaderworkerset.x-k8s.io/v1",
        closed(
            "leaderWorkerTemplate",
            replicas={"type": "integer", "minimum": 0},
            startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
            rolloutStrategy={"type": "object"},
            networkConfig=closed("subdomainPolicy", subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
            leaderWorkerTemplate=closed(
                "workerTemplate",
                size={"type": "integer", "minimum": 1},
                restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
                leaderTemplate=POD,
                workerTemplate=POD,
            ),
        ),
    ),
    "InferencePool": resource(
        "inference.networking.k8s.io/v1",
        closed(
            "selector targetPorts endpointPickerRef",
            selector=MATCH_LABELS,
            targetPorts={**listed(closed("number", number=NUMBER)), "maxItems": 8},
            endpointPickerRef=closed(
                "name port",
                group=TEXT,
                kind=TEXT,
                name=TEXT,
                port=closed("number", number=NUMBER),
                failureMode={"enum": ["FailOpen", "FailClose"]},
            ),
        ),
    ),
    "Gateway": resource(
        "gateway.networking.k8s.io/v1",
        closed(
            "gatewayClassName listeners",
            gatewayClassName=TEXT,
            listeners=listed(
                closed(
                    "name port protocol",
                    name=TEXT,
                    port=NUMBER,
                    protocol={"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
                    hostname=TEXT,
                    tls={"type": "object"},
                )
            ),
        ),
    ),
    "HTTPRoute": resource(
        "gateway.networking.k8s.io/v1",
        closed(
            "parentRefs rules",
            parentRefs=listed(closed("name", name=TEXT, namespace=TEXT, sectionName=TEXT)),
            hostnames=listed(TEXT),
            rules=listed(
                closed(
                    "backendRefs",
                    matches=listed(
                        closed(
                            "path",
                            path=closed(
                                "type value",
                                type={"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                                value={"type": "string", "pattern": "^/"},
                            ),
                        )
                    ),
                    backendRefs=listed(closed("name", group=TEXT, kind=TEXT, name=TEXT, port=NUMBER)),
                    timeouts=closed("request", request={"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}),
                )
            ),
        ),
    ),
    "PodMonitor": resource(
        "monitoring.coreos.com/v1",
        closed(
            "selector podMetricsEndpoints",
            selector=MATCH_LABELS,
            podMetricsEndpoints=listed(
                closed("port", port=TEXT, path=TEXT, interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"})
            ),
        ),
    ),
}


def check(document: dict[str, Any], version: str) -> None:
    """Raises a ValidationError of either library."""
    if document["apiVersion"] in BUILT_IN:
        kubernetes_validate.validate(document, version, strict=True)
        return
    jsonschema.validate(document, CUSTOM[document["kind"]])
    for _, template in templates(document):
        labels = template["metadata"]["labels"]
        as_deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "a"},
            "spec": {"selector": {"matchLabels": labels}, "template": template},
        }
        kubernetes_validate.validate(as_deployment, version, strict=True)


def templates(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The pods of a workload, by role."""
    if document["kind"] == "Deployment":
        return [("leader", document["spec"]["template"])]
    if document["kind"] == "LeaderWorkerSet":
        group = document["spec"]["leaderWorkerTemplate"]
        return [("leader", group["leaderTemplate"]), ("worker", group["workerTemplate"])]
    return []


PODS = [(stem, role, pod) for stem, document in DOCUMENTS for role, pod in templates(document)]
SERVING = [pod["metadata"]["labels"] for _, role, pod in PODS if role == "leader"]
KINDS = [f"{stem}-{document['kind']}" for stem, document in DOCUMENTS]
ROLES = [f"{stem}-{role}" for stem, role, _ in PODS]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize(("stem", "document"), DOCUMENTS, ids=KINDS)
def test_every_manifest_fits_its_schema(stem: str, document: dict[str, Any], version: str):
    check(document, version)


@pytest.mark.parametrize(("stem", "document"), DOCUMENTS, ids=KINDS)
def test_a_field_that_does_not_exist_is_seen(stem: str, document: dict[str, Any]):
    wrong = copy.deepcopy(document)
    wrong["spec"]["replicaz"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(wrong, NEWEST)
    for role, pod in templates(wrong):
        del wrong["spec"]["replicaz"]
        pod["spec"]["containers"][0]["startupprobe"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            check(wrong, NEWEST)
        assert role == "leader"
        break


@pytest.mark.parametrize(("stem", "role", "pod"), PODS, ids=ROLES)
def test_the_flags_and_the_image_are_ours(stem: str, role: str, pod: dict[str, Any]):
    container = pod["spec"]["containers"][0]
    assert container["args"][0] == "serve"
    options = parse(container["args"][1:])
    assert (options.server.host, options.server.port) == ("0.0.0.0", 30000)
    target = container["image"].rpartition(":")[2]
    assert f"AS {target}\n" in (FOLDER.parent / "docker" / "Dockerfile").read_text()
    names = {entry["name"] for entry in container["env"]}
    assert names <= {"JAXSERVE_API_KEY", SECRET_VARIABLE, "HF_TOKEN"}
    assert ("JAXSERVE_API_KEY" in names) == (role == "leader")
    assert (SECRET_VARIABLE in names) == stem.startswith("lws")
    for entry in container["env"]:
        assert entry["valueFrom"]["secretKeyRef"]["name"] == "jaxserve", "a secret stands in no manifest"


@pytest.mark.parametrize(("stem", "role", "pod"), PODS, ids=ROLES)
def test_probes_ask_health_of_who_answers_it(stem: str, role: str, pod: dict[str, Any]):
    container = pod["spec"]["containers"][0]
    probes = [container.get(f"{name}Probe") for name in ("startup", "readiness", "liveness")]
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    if role == "worker":
        assert probes == [None] * 3 and not ports, "a follower has no HTTP"
        return
    assert {(each["httpGet"]["path"], each["httpGet"]["port"]) for each in probes} == {("/health", "http")}
    assert ports["http"] == 30000
    startup = probes[0]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800, "a first start fetches and compiles"
    drain = container["lifecycle"]["preStop"]["sleep"]["seconds"] + 30 + 10  # --shutdown-timeout, the engine's end
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain


@pytest.mark.parametrize(("stem", "role", "pod"), PODS, ids=ROLES)
def test_pods_run_as_the_image_does_and_write_where_it_may(stem: str, role: str, pod: dict[str, Any]):
    container = pod["spec"]["containers"][0]
    assert pod["spec"]["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) - {"/dev/shm"} == WRITTEN
    assert set(mounts.values()) == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_what_selects_pods_selects_some_that_serve_and_no_follower():
    followers = [pod["metadata"]["labels"] for _, role, pod in PODS if role == "worker"]
    selectors = []
    for _, document in DOCUMENTS:
        if document["kind"] in ("Service", "InferencePool", "PodMonitor", "PodDisruptionBudget"):
            selector = document["spec"]["selector"]
            selectors.append(selector.get("matchLabels", selector))
    assert len(selectors) >= 6
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in SERVING), selector
        assert not any(selector.items() <= labels.items() for labels in followers), selector


def test_a_group_is_found_by_what_leader_worker_set_says():
    for stem, document in DOCUMENTS:
        if document["kind"] != "LeaderWorkerSet":
            continue
        size = document["spec"]["leaderWorkerTemplate"]["size"]
        said = {"LWS_LEADER_ADDRESS": "a.b", "LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": "1"}
        found = detect(said)
        assert found is not None and (found.num_nodes, found.rank, found.port) == (size, 1, DEFAULT_PORT)
        leader = document["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in leader["ports"]}
        assert (ports["dist"], ports["plans"]) == (DEFAULT_PORT, DEFAULT_PORT + 1), stem
