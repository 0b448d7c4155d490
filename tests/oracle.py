"""Slow, obvious NumPy: DeepSeek's algorithm, with ties to the lowest index.

Written from its description, one layer and one item at a time, in float32 as the original.
"""

import numpy as np


def balanced_packing(weight, num_packs):
    weight = np.asarray(weight, np.float32)
    num_layers, n = weight.shape
    capacity = n // num_packs
    pack_index = np.zeros((num_layers, n), int)
    rank = np.zeros((num_layers, n), int)
    for layer in range(num_layers):
        if capacity == 1:
            pack_index[layer] = np.arange(n)
            continue
        load = [np.float32(0)] * num_packs
        count = [0] * num_packs
        for item in sorted(range(n), key=lambda i: (-weight[layer, i], i)):
            pack = min((p for p in range(num_packs) if count[p] < capacity), key=lambda p: load[p])
            pack_index[layer, item], rank[layer, item] = pack, count[pack]
            load[pack] += weight[layer, item]
            count[pack] += 1
    return pack_index, rank


def replicate_experts(weight, num_phy):
    weight = np.asarray(weight, np.float32)
    num_layers, num_log = weight.shape
    phy2log = np.tile(np.arange(num_phy), (num_layers, 1))
    rank = np.zeros((num_layers, num_phy), int)
    logcnt = np.ones((num_layers, num_log), int)
    for layer in range(num_layers):
        for slot in range(num_log, num_phy):
            expert = int(np.argmax(weight[layer] / logcnt[layer].astype(np.float32)))
            phy2log[layer, slot], rank[layer, slot] = expert, logcnt[layer, expert]
            logcnt[layer, expert] += 1
    return phy2log, rank, logcnt


def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus):
    weight = np.asarray(weight, np.float32)
    num_layers, num_experts = weight.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    group_size = num_experts // num_groups
    by_group = np.zeros((num_layers, num_groups), np.float32)
    for i in range(group_size):  # one expert after the other, as float32 sums have an order
        by_group += weight.reshape(num_layers, num_groups, group_size)[:, :, i]
    node_of_group, rank_of_group = balanced_packing(by_group, num_nodes)
    per_gpu = num_replicas // num_gpus
    phy2log = np.zeros((num_layers, num_replicas), int)
    log2phy = np.full((num_layers, num_experts, num_replicas - num_experts + 1), -1)
    logcnt = np.zeros((num_layers, num_experts), int)
    for layer in range(num_layers):
        for node in range(num_nodes):
            groups = [g for g in range(num_groups) if node_of_group[layer, g] == node]
            groups.sort(key=lambda g: rank_of_group[layer, g])
            experts = [g * group_size + i for g in groups for i in range(group_size)]
            load = weight[layer, experts][None]
            local, rank, count = replicate_experts(load, num_replicas // num_nodes)
            per_replica = (load / count.astype(np.float32))[0, local[0]][None]
            gpu, place = balanced_packing(per_replica, num_gpus // num_nodes)
            for replica in range(num_replicas // num_nodes):
                gpu_index = node * (num_gpus // num_nodes) + gpu[0, replica]
                slot = gpu_index * per_gpu + place[0, replica]
                expert = experts[local[0, replica]]
                phy2log[layer, slot] = expert
                log2phy[layer, expert, rank[0, replica]] = slot
            logcnt[layer, experts] = count[0]
    return phy2log, log2phy, logcnt
