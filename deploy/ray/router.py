"""Ray's request router (ray.serve.request_router), by the beginning of the prompt."""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deploy.ray.prefix import order


class PrefixRouter(RequestRouter):
    """Calls of one prefix go to one replica while it can take them; those without a prefix to the idlest.

    A call's first argument is an ingress.Call.
    """

    def initialize_state(self, spill: int = 16, **kwargs: Any) -> None:
        self.spill = spill

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: Ray takes the first rank that has room, and the idlest in it."""
        call = pending_request.args[0] if pending_request is not None and pending_request.args else None
        prefix = getattr(call, "prefix", None)
        if prefix is None:
            return [candidate_replicas]
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        loads = {}
        for name, each in replicas.items():
            if (load := self.replica_queue_len_cache.get(each.replica_id)) is not None:
                loads[name] = load
        return [[replicas[name]] for name in order(prefix, list(replicas), loads, self.spill)]
