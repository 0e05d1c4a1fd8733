"""Start and stop the processes of a cluster on this machine, and show what they do."""

from kvferry.cluster.local import ClusterPlan, LocalCluster
from kvferry.cluster.processes import Child

__all__ = ["Child", "ClusterPlan", "LocalCluster"]
