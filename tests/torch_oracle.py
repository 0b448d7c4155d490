"""DeepSeek's algorithm restated in torch, all layers at once; ties to the lowest index."""

import torch


def balanced_packing(weight, num_packs):
    num_layers, n = weight.shape
    capacity = n // num_packs
    if capacity == 1:
        return torch.arange(n).repeat(num_layers, 1), torch.zeros(num_layers, n, dtype=torch.int64)
    layer = torch.arange(num_layers)
    loads = torch.zeros(num_layers, num_packs)
    items = torch.zeros(num_layers, num_packs, dtype=torch.int64)
    pack_index = torch.empty(num_layers, n, dtype=torch.int64)
    rank = torch.empty(num_layers, n, dtype=torch.int64)
    for item in weight.float().sort(descending=True, stable=True).indices.T:
        pack = loads.masked_fill(items == capacity, torch.inf).argmin(dim=1)
        pack_index[layer, item], rank[layer, item] = pack, items[layer, pack]
        loads[layer, pack] += weight[layer, item]
        items[layer, pack] += 1
    return pack_index, rank


def replicate_experts(weight, num_phy):
    num_layers, num_log = weight.shape
    layer = torch.arange(num_layers)
    experts, ranks = list(torch.arange(num_log).repeat(num_layers, 1).T), [layer * 0] * num_log
    logcnt = torch.ones(num_layers, num_log, dtype=torch.int64)
    for _ in range(num_phy - num_log):
        neediest = (weight / logcnt).argmax(dim=1)
        experts.append(neediest)
        ranks.append(logcnt[layer, neediest])
        logcnt[layer, neediest] += 1
    return torch.stack(experts, dim=1), torch.stack(ranks, dim=1), logcnt


def rebalance_experts_hierarchical(weight, num_physical_experts, num_groups, num_nodes, num_gpus):
    num_layers, num_experts = weight.shape
    size = num_experts // num_groups
    by_group = weight.view(num_layers, num_groups, size).sum(dim=-1)
    node, place = balanced_packing(by_group, num_nodes)
    order = (node * num_groups + place).argsort(dim=1)  # groups, node by node
    expert = (order[..., None] * size + torch.arange(size)).view(num_layers * num_nodes, -1)
    owner = torch.arange(num_layers).repeat_interleave(num_nodes)[:, None]
    load = weight[owner, expert]
    local, rank, count = replicate_experts(load, num_physical_experts // num_nodes)
    gpu, place = balanced_packing((load / count).gather(1, local), num_gpus // num_nodes)
    slots = (gpu * num_physical_experts + place).argsort(dim=1)
    phy2log = expert.gather(1, local.gather(1, slots)).view(num_layers, -1)
    logcnt = torch.zeros(num_layers, num_experts, dtype=torch.int64)
    logcnt[owner, expert] = count
    return phy2log, rank.gather(1, slots).view(num_layers, -1), logcnt


def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus):
    weight = weight.float().cpu()
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    phy2log, rank, logcnt = rebalance_experts_hierarchical(
        weight, num_replicas, num_groups, num_nodes, num_gpus
    )
    log2phy = torch.full((*weight.shape, int(logcnt.max())), -1)
    layer = torch.arange(len(weight))[:, None]
    log2phy[layer, phy2log, rank] = torch.arange(num_replicas)
    return phy2log, log2phy, logcnt
