"""DeepSeek's EPLB for PyTorch: the plans of `eplb_jax` as torch tensors.

`import eplb_torch as eplb` replaces `import eplb`. `eplb_torch.vllm`, `eplb_torch.sglang`
and `eplb_torch.verl` are plug-ins for those engines. `split_load`, `quotas` and `to_physical`
divide the tokens of every step among replicas, in torch alone. `to_jax` and `to_torch` convert
tensors and arrays.
"""

from eplb_torch.balancer import Balancer as Balancer
from eplb_torch.conversion import to_jax as to_jax
from eplb_torch.conversion import to_torch as to_torch
from eplb_torch.eplb import balanced_packing as balanced_packing
from eplb_torch.eplb import preload as preload
from eplb_torch.eplb import rebalance_experts as rebalance_experts
from eplb_torch.eplb import rebalance_experts_hierarchical as rebalance_experts_hierarchical
from eplb_torch.eplb import replicate_experts as replicate_experts
from eplb_torch.routing import Quotas as Quotas
from eplb_torch.routing import expert_counts as expert_counts
from eplb_torch.routing import quotas as quotas
from eplb_torch.routing import to_physical as to_physical
from eplb_torch.split_plan import SplitPlan as SplitPlan
from eplb_torch.split_plan import prepare_split as prepare_split
from eplb_torch.splitting import split_load as split_load
