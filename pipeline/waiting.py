"""What a Ray cluster holds, what it is asked for in vain, and which nodes are on their way: why a run waits.

Left out: what the run itself is doing (`status`).
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

ANSWER_SECONDS = 5
SHOWN = ("CPU", "GPU")


def cluster_lines(address: str) -> list[str]:
    """A Ray cluster for people. address: its "host:port". A cluster that does not answer is a line, too."""
    if not _listens(address):
        return [f"Ray at {address} does not answer: it has ended, or cannot be reached from here"]
    logging.getLogger("ray").setLevel(logging.ERROR)
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RayError

    if _has_token():  # a Ray of this machine asks for it; to demand one that is not there would end this process
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return lines_of(get_cluster_status(address, timeout=ANSWER_SECONDS))
    except (RayError, RuntimeError, OSError) as error:
        return [f"Ray at {address} gives no answer: {' '.join(str(error).split())[:300]}"]


def lines_of(cluster: ClusterStatus) -> list[str]:
    """Nodes and resources, demands that nothing meets yet, nodes that start or failed to."""
    nodes = len(cluster.active_nodes) + len(cluster.idle_nodes)
    used = {r.resource_name: (r.used, r.total) for r in cluster.cluster_resource_usage}
    usage = [f"{used[name][0]:g} of {used[name][1]:g} {name}" for name in SHOWN if name in used]
    lines = [f"{nodes} node{'s' * (nodes != 1)}, in use: {', '.join(usage) or 'nothing'}"]
    demands = cluster.resource_demands
    for demand in demands.ray_task_actor_demand:
        lines += [f"waits for  {b.count} × {_bundle(b.bundle)}" for b in demand.bundles_by_count]
    for demand in demands.placement_group_demand:
        together = [f"{b.count} × {_bundle(b.bundle)}" for b in demand.bundles_by_count]
        lines.append(f"waits for  {' and '.join(together)}, together")
    starting = Counter(node.ray_node_type_name for node in cluster.pending_nodes)
    starting.update({launch.ray_node_type_name: launch.count for launch in cluster.pending_launches})
    lines += [f"starting   {count} × {kind}" for kind, count in starting.items()]
    lines += [f"failed     {_failure(launch.ray_node_type_name, launch.details)}" for launch in cluster.failed_launches]
    lines += [f"gone       {_failure(kind, None)}" for kind in _kinds(cluster.failed_nodes)]
    return lines


def _has_token() -> bool:
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


def _kinds(nodes: Iterable[object]) -> list[str]:
    return [f"{count} × {kind}" for kind, count in Counter(node.ray_node_type_name for node in nodes).items()]


def _failure(kind: str, details: str | None) -> str:
    return kind if details is None else f"{kind}: {' '.join(details.split())[:200]}"


def _bundle(bundle: Mapping[str, float]) -> str:
    """Custom resources that Ray adds by itself (`node:…`, `bundle_group_…`) are left out."""
    parts = [f"{value:g} {name}" for name, value in bundle.items() if ":" not in name and "_group_" not in name]
    return " + ".join(parts) or "an actor without resources"


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False
