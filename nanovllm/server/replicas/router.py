"""Where Ray Serve sends a request: to the replica that has its prefix, unless that is busy."""

from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from nanovllm.server.replicas.index import PrefixIndex

MAX_BLOCKS = 2**16


class PrefixRouter(RequestRouter):
    """Goes by the hashes that are the first argument of a call; see PrefixIndex."""

    def initialize_state(self, most_ahead: int = 16, **_: Any) -> None:
        """
        Args:
            most_ahead: requests that a replica may have more than the least loaded one and still
                get those whose prefix it has.
        """
        self.index, self.most_ahead = PrefixIndex(MAX_BLOCKS), most_ahead

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self.index.keep([replica.replica_id.unique_id for replica in replicas])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.index.blocks.pop(replica_id.unique_id, None)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        replicas = {r.replica_id.unique_id: r for r in candidate_replicas}
        if not replicas:
            return []
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(r.replica_id) or 0 for name, r in replicas.items()}
        hashes = pending_request.args[0] if pending_request and pending_request.args else ()
        chosen = self.index.choose(hashes, loads, self.most_ahead)
        self.index.add(chosen, hashes)  # at once, for those that are routed meanwhile
        others = [replica for name, replica in replicas.items() if name != chosen]
        return [[replicas[chosen]], others]
