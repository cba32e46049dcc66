"""What `serve run deploy.ray:app` takes, as `name=value`."""

import shlex

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FleetArgs(BaseModel):
    """All have defaults; strings from a command line are converted, unknown names refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="as --model (default: the server's own default)")
    flags: str = Field("", description='other flags of the server, as on its command line: "--dtype bfloat16"')
    python: str | None = Field(None, description="interpreter that has jaxserve (default: Ray's own, or .venv's)")

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)
    target_load: float = Field(0.8, gt=0, description="running and waiting sequences, as a share of the rows there are")
    upscale_delay_s: float = Field(30.0, ge=0)
    downscale_delay_s: float = Field(600.0, ge=0)
    metrics_interval_s: float = Field(5.0, gt=0, description="between two looks at an engine's queue")
    look_back_period_s: float = Field(30.0, gt=0, description="over which the queue is averaged")

    num_cpus: float = Field(1.0, ge=0, description="of a replica, as Ray counts them")
    num_gpus: float = Field(0.0, ge=0, description="of a replica; Ray shows it these alone")
    num_tpus: int = Field(0, ge=0, description="of a replica: Ray's resource TPU")
    max_ongoing_requests: int = Field(512, ge=1, description="in one replica; further ones wait at the ingress")
    max_queued_requests: int = Field(-1, ge=-1, description="at the ingress before others get 503; -1: no limit")
    spill: int = Field(16, ge=1, description="requests above the idlest replica at which a prefix goes to its next one")
    ingress_replicas: int = Field(1, ge=1)
    drain_s: float = Field(40.0, ge=0, description="that open requests get when a replica is taken away")

    @model_validator(mode="after")
    def check(self) -> "FleetArgs":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}")
        for taken in ("--port", "--host", "--model", "--ssl-certfile", "--file-storage-path"):
            if self.flag(taken) is not None:
                raise ValueError(f"{taken} belongs to the fleet and not into flags=; see deploy/ray/README.md")
        return self

    def flag(self, name: str) -> str | None:
        """The value that flags gives a flag; None where it is not there."""
        parts = shlex.split(self.flags)
        for index, part in enumerate(parts):
            given, equals, value = part.partition("=")
            if given.replace("_", "-") == name:
                return value if equals else "".join(parts[index + 1 : index + 2])
        return None
