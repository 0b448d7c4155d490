"""Plans in a running JAX model: counting, routing to replicas, moving weights, training.

Pure functions, traced inside the caller's model. A plan is a pytree of arrays there: a new one
compiles nothing anew.

- `load_of_ids`, `load_of_slots` and `load_of_counts` count what a router does, `history` and
  `recorded` keep the loads of past windows for `rebalance_experts`.
- `to_physical` turns the router's experts into slots; `nearest` and `split_load` make the tables
  of two of its choices.
- `relocate` moves weights and optimizer state from plan to plan, some layers at a time with
  `some_layers`; `to_slots` and `to_logical` lead from checkpoints to slots and back.
- `sum_replicas` and `counted_once` keep training exact where experts have replicas.
"""

from eplb_jax.runtime.counting import LoadHistory as LoadHistory
from eplb_jax.runtime.counting import history as history
from eplb_jax.runtime.counting import load_of_counts as load_of_counts
from eplb_jax.runtime.counting import load_of_ids as load_of_ids
from eplb_jax.runtime.counting import load_of_slots as load_of_slots
from eplb_jax.runtime.counting import recorded as recorded
from eplb_jax.runtime.nearest import nearest as nearest
from eplb_jax.runtime.relocation import Relocated as Relocated
from eplb_jax.runtime.relocation import relocate as relocate
from eplb_jax.runtime.relocation import some_layers as some_layers
from eplb_jax.runtime.relocation import to_logical as to_logical
from eplb_jax.runtime.relocation import to_slots as to_slots
from eplb_jax.runtime.routing import to_physical as to_physical
from eplb_jax.runtime.splitting import split_load as split_load
from eplb_jax.runtime.training import counted_once as counted_once
from eplb_jax.runtime.training import sum_replicas as sum_replicas
