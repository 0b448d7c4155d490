"""Expert-parallelism load balancing in pure JAX.

The public names are those imported here, and those of `runtime`, `loads`, `metrics`, `monitoring`,
`traces` and `formats`; everything else is private and changes without notice. Axes are named in
`eplb_jax.types`.

- `plan` chooses the expert of every physical slot for a `Topology`; `rebalance_experts` is its
  DeepSeek form, `precompile` makes it ready ahead of time. `balanced_packing` and
  `replicate_experts` are its two halves. `plan_layers` gives layers different numbers of slots.
- `History` keeps what a service has seen in bounded space: `init_history`, `update_history`,
  `merge_histories`, `save_history`, `load_history`.
- `balancer` is the loop of a running service: `init`, `observe`, `propose`, `commit`.
- `metrics` measures plans, `engine_metrics` by the definitions of engines; `plan_bound`,
  `packing_bound` and `split_bound` are proven lower bounds. `monitoring` has numbers of a running
  service, for Prometheus, too.
- `moves` says what leads from one plan to another, `decide` whether it is worth it, `spares_curve`
  what more slots are worth, `advise` what to choose for a trace. `spread_slots` divides slots over
  layers by `slots_curve`, `choose_slots` finds one number for all layers. `Cost` is what a replica
  costs, `fit_cost` fits it to measured times.
- `runtime` is for use inside a running model.
- `loads` has measured loads, `traces` synthetic ones; `replay` plans through a trace.
- `formats` reads what engines recorded, and reads and writes their maps.
- `inspect_loads` says what looks like a fault of the recording of loads.

The packages, each of which imports only those before it: `packing` (weighted items to packs;
it knows no expert), `transition` (plan to plan), `splitting` (tokens to replicas), `planning`
(loads to plans), `evaluation`,
`runtime`, `formats`, `cli`.
"""

from importlib.metadata import version as _version

from eplb_jax import formats as formats
from eplb_jax import runtime as runtime
from eplb_jax.evaluation import loads as loads
from eplb_jax.evaluation import metrics as metrics
from eplb_jax.evaluation import monitoring as monitoring
from eplb_jax.evaluation import traces as traces
from eplb_jax.evaluation.advice import Advice as Advice
from eplb_jax.evaluation.advice import advise as advise
from eplb_jax.evaluation.choose_slots import SlotChoice as SlotChoice
from eplb_jax.evaluation.choose_slots import SlotOption as SlotOption
from eplb_jax.evaluation.choose_slots import choose_slots as choose_slots
from eplb_jax.evaluation.cost_fit import fit_cost as fit_cost
from eplb_jax.evaluation.decision import Decision as Decision
from eplb_jax.evaluation.decision import decide as decide
from eplb_jax.evaluation.engine_metrics import EngineMetrics as EngineMetrics
from eplb_jax.evaluation.engine_metrics import engine_metrics as engine_metrics
from eplb_jax.evaluation.metrics import Balance as Balance
from eplb_jax.evaluation.replay import Replay as Replay
from eplb_jax.evaluation.replay import plan_from_history as plan_from_history
from eplb_jax.evaluation.replay import plan_from_last_window as plan_from_last_window
from eplb_jax.evaluation.replay import plan_from_windows as plan_from_windows
from eplb_jax.evaluation.replay import replay as replay
from eplb_jax.evaluation.sanity import Finding as Finding
from eplb_jax.evaluation.sanity import inspect_loads as inspect_loads
from eplb_jax.evaluation.slot_budget import SlotBudget as SlotBudget
from eplb_jax.evaluation.slot_budget import spread_slots as spread_slots
from eplb_jax.evaluation.slots_curve import slots_curve as slots_curve
from eplb_jax.evaluation.spares import Spares as Spares
from eplb_jax.evaluation.spares import spares_curve as spares_curve
from eplb_jax.evaluation.split_bound import split_bound as split_bound
from eplb_jax.evaluation.step_time import CostFit as CostFit
from eplb_jax.packing.balanced_packing import balanced_packing as balanced_packing
from eplb_jax.packing.bounds import packing_bound as packing_bound
from eplb_jax.planning.balancer import Balancer as Balancer
from eplb_jax.planning.balancer import BalancerState as BalancerState
from eplb_jax.planning.balancer import balancer as balancer
from eplb_jax.planning.balancer import load_balancer as load_balancer
from eplb_jax.planning.balancer import save_balancer as save_balancer
from eplb_jax.planning.bounds import plan_bound as plan_bound
from eplb_jax.planning.cost import Cost as Cost
from eplb_jax.planning.history import History as History
from eplb_jax.planning.history import init_history as init_history
from eplb_jax.planning.history import merge_histories as merge_histories
from eplb_jax.planning.history import update_history as update_history
from eplb_jax.planning.history_files import load_history as load_history
from eplb_jax.planning.history_files import save_history as save_history
from eplb_jax.planning.next_plan import TOLERANCE as TOLERANCE
from eplb_jax.planning.placement import check_placement as check_placement
from eplb_jax.planning.placement import placement_of as placement_of
from eplb_jax.planning.plan import plan as plan
from eplb_jax.planning.plan import plan_replicas as plan_replicas
from eplb_jax.planning.plan import rebalance_experts as rebalance_experts
from eplb_jax.planning.plan_layers import plan_layers as plan_layers
from eplb_jax.planning.policy import Policy as Policy
from eplb_jax.planning.precompile import CompiledPlan as CompiledPlan
from eplb_jax.planning.precompile import precompile as precompile
from eplb_jax.planning.proposal import VERDICTS as VERDICTS
from eplb_jax.planning.proposal import Proposal as Proposal
from eplb_jax.planning.replication import replicate_experts as replicate_experts
from eplb_jax.planning.strategies import STRATEGIES as STRATEGIES
from eplb_jax.planning.strategies import Strategy as Strategy
from eplb_jax.planning.strategies import in_kernels as in_kernels
from eplb_jax.planning.strategies import resolve_strategy as resolve_strategy
from eplb_jax.transition.moves import Moves as Moves
from eplb_jax.transition.moves import Traffic as Traffic
from eplb_jax.transition.moves import moves as moves
from eplb_jax.types import Packing as Packing
from eplb_jax.types import Placement as Placement
from eplb_jax.types import Replication as Replication
from eplb_jax.types import Topology as Topology

__version__ = _version("eplb-jax")
