"""The application: an ingress before replicas that Ray starts, watches, scales and routes to."""

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from deploy.ray.args import FleetArgs
from deploy.ray.ingress import Ingress, application
from deploy.ray.replica import Replica, shared_store
from deploy.ray.router import PrefixRouter
from deploy.ray.scaling import QueuePolicy

INGRESS_REQUESTS = 10_000  # it only passes bytes on, so the replicas' own limits are what counts
HEALTH_SECONDS = 5.0


def build(args: FleetArgs) -> serve.Application:
    resources = {"TPU": float(args.num_tpus)} if args.num_tpus else {}
    replicas = serve.deployment(
        Replica,
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            initial_replicas=max(args.min_replicas, 1),
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            metrics_interval_s=args.metrics_interval_s,
            look_back_period_s=args.look_back_period_s,
            policy=AutoscalingPolicy(policy_function=QueuePolicy, policy_kwargs={"target_load": args.target_load}),
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"spill": args.spill}
        ),
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, "resources": resources},
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=args.drain_s,
    )
    ingress = serve.deployment(
        serve.ingress(application())(Ingress),
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
    )
    return ingress.bind(replicas.bind(args), shared_store(args), int(args.flag("--max-body-size") or 32))
