"""Expert-parallelism load balancing in pure JAX.

`rebalance_experts` plans where the replicas of every expert of a mixture-of-experts model lie, and
`compile` makes that ready ahead of time. `balanced_packing` and `replicate_experts` are its two
halves, `metrics.balance` measures a plan, `moves` says what it takes to put it in place of another
and `decide` whether to. `runtime` puts plans to work in a running model. `loads` reads measured
loads, `traces` makes up others and `replay` plays them through. The axes are named in
`eplb_jax.types`.
"""

from eplb_jax import loads as loads
from eplb_jax import metrics as metrics
from eplb_jax import runtime as runtime
from eplb_jax import traces as traces
from eplb_jax.ahead import CompiledPlan as CompiledPlan
from eplb_jax.ahead import compile as compile  # noqa: A004
from eplb_jax.decision import Decision as Decision
from eplb_jax.decision import decide as decide
from eplb_jax.packing.balanced import balanced_packing as balanced_packing
from eplb_jax.packing.bounds import packing_bound as packing_bound
from eplb_jax.packing.bounds import plan_bound as plan_bound
from eplb_jax.packing.strategy import STRATEGIES as STRATEGIES
from eplb_jax.packing.strategy import Strategy as Strategy
from eplb_jax.placement import check_placement as check_placement
from eplb_jax.rebalance import rebalance_experts as rebalance_experts
from eplb_jax.replication import replicate_experts as replicate_experts
from eplb_jax.transition import moves as moves
from eplb_jax.types import Packing as Packing
from eplb_jax.types import Placement as Placement
from eplb_jax.types import Replication as Replication
