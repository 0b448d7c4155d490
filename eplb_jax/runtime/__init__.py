"""Plans inside a running JAX model: counting, routing to replicas, moving weights, training.

Pure functions, traced in the caller's model. A plan is a pytree of arrays there: a new one
compiles nothing.

- `expert_counts`, `expert_counts_from_slots` and `slot_to_expert_counts` count the tokens of
  experts, for `eplb_jax.update_history`.
- `to_physical` turns the experts of a router into slots; `nearest_replica` and `split_load` make
  the tables for two of its choices; `quotas` are shares as whole tokens, for kernels,
  and `local_quotas` those that keep tokens on their GPU or node.
- `relocate` moves weights and optimizer state from plan to plan, some layers at a time with
  `select_layers`; `to_slots` and `to_logical` convert from and to checkpoints.
- `sum_replicas` and `mask_replicas` keep training exact where experts have replicas.
"""

from eplb_jax.runtime.counting import expert_counts as expert_counts
from eplb_jax.runtime.counting import expert_counts_from_slots as expert_counts_from_slots
from eplb_jax.runtime.counting import slot_to_expert_counts as slot_to_expert_counts
from eplb_jax.runtime.nearest import nearest_replica as nearest_replica
from eplb_jax.runtime.quotas import Quotas as Quotas
from eplb_jax.runtime.quotas import local_quotas as local_quotas
from eplb_jax.runtime.quotas import quotas as quotas
from eplb_jax.runtime.relocation import Relocated as Relocated
from eplb_jax.runtime.relocation import relocate as relocate
from eplb_jax.runtime.relocation import select_layers as select_layers
from eplb_jax.runtime.relocation import to_logical as to_logical
from eplb_jax.runtime.relocation import to_slots as to_slots
from eplb_jax.runtime.routing import Choice as Choice
from eplb_jax.runtime.routing import to_physical as to_physical
from eplb_jax.runtime.splitting import split_load as split_load
from eplb_jax.runtime.training import mask_replicas as mask_replicas
from eplb_jax.runtime.training import sum_replicas as sum_replicas
