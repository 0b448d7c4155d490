"""Traces of routing: the experts of tokens, and the counts of microbatches."""

import json

import numpy as np
import pytest
import torch

from eplb_jax import formats

LAYERS, EXPERTS, TOP_K = 3, 9, 2
RNG = np.random.default_rng(0)


def routed(tokens, dtype=np.int16):
    """The experts of tokens, [tokens, LAYERS, TOP_K]; expert 8 is never chosen."""
    draws = RNG.random((tokens, LAYERS, EXPERTS - 1))
    return np.argsort(draws, axis=2)[..., :TOP_K].astype(dtype)


def counted(experts, num_experts=EXPERTS - 1):
    load = np.zeros((LAYERS, num_experts), int)
    for token in experts:
        for layer, chosen in enumerate(token):
            for expert in chosen:
                load[layer, expert] += 1
    return load


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
@pytest.mark.parametrize("kind", ["npy", "pt", "npz"])
def test_the_experts_of_tokens(tmp_path, kind, dtype):
    experts = routed(40, dtype)
    padded = experts.copy()
    padded[-3:] = 255 if dtype == np.uint8 else -1
    path = tmp_path / "routed"
    if kind == "pt":
        torch.save(torch.from_numpy(padded), path)
    else:
        with path.open("wb") as file:
            np.save(file, padded) if kind == "npy" else np.savez(file, routed_experts=padded)
    if kind != "npz":  # it may be loads [windows, layers, experts]
        with pytest.raises(ValueError, match=r"routed-experts .* or array .*; say which: format="):
            formats.read(path)
    found = formats.read(path, "routed-experts", num_experts=EXPERTS)
    np.testing.assert_array_equal(found.load[0], counted(experts[:-3], EXPERTS))
    unknown = formats.read(path, "routed-experts")
    assert unknown.load.shape == (1, LAYERS, EXPERTS - 1)
    assert unknown.notes == ("expert 7 is the last one seen; num_experts says if there are more",)
    with pytest.raises(ValueError, match="num_experts=5, but there are 8 experts"):
        formats.read(path, "routed-experts", num_experts=5)


def test_prompts_and_masked_tokens(tmp_path):
    prompt, generated = routed(30), routed(24)
    path = tmp_path / "request.npz"
    np.savez(path, prompt_routed_experts=prompt, routed_experts=generated)
    found = formats.read(path)
    np.testing.assert_array_equal(found.load, [counted(prompt), counted(generated)])
    assert found.phases == ("prefill", "decode")
    mask = RNG.random((4, 6)) < 0.7  # of verl's batches
    batch = generated.reshape(4, 6, LAYERS, TOP_K)
    np.savez(path, routed_experts=batch, attention_mask=mask.astype(int))
    np.testing.assert_array_equal(formats.read(path).load[0], counted(batch[mask]))
    np.savez(path, routed_experts=batch, attention_mask=mask[1:])
    with pytest.raises(ValueError, match=r"attention_mask of the shape \(3, 6\) for \(4, 6\)"):
        formats.read(path)


def test_megatron_counts_one_stage_of_all_ranks(tmp_path):
    load = np.zeros((2, 3, 8), int)
    for rank in range(2):
        lines = []
        for step in (11, 10):
            for layer, more in ((5, {}), (3, {}), (0, {"mtp_idx": 0})):
                ids = routed(6)[:, 0].tolist()
                line = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer}
                line |= {"rank": rank, "num_tokens": 6, "topk": TOP_K, "top_indices": ids} | more
                lines += [line, line | {"stage": "post_dispatch"}]
                row = {5: 1, 3: 0, 0: 2}[layer]
                load[step - 10, row] += np.bincount(np.ravel(ids), minlength=8)
        text = "\n".join(json.dumps(x) for x in lines)
        (tmp_path / f"routing_rank{rank}.jsonl").write_text(text)
    found = formats.read(tmp_path, num_experts=8)
    np.testing.assert_array_equal(found.load, load)
    assert (found.layers, found.format) == ((3, 5, 6), "megatron")
    assert (
        found.notes[1] == "only the stage pre_dispatch is counted, of pre_dispatch, post_dispatch"
    )
    one = formats.read(tmp_path / "routing_rank0.jsonl")
    assert one.load.sum() * 2 == load.sum()


def test_ultra_ep(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "ultra_ep_trace_v1"}))
    load = RNG.integers(0, 90, (3, 2, EXPERTS))
    rows = [(t, i) for t in range(3) for i in range(2)]
    for number, part in enumerate((rows[:4], rows[4:])):
        t, i = np.array(part).T
        np.savez(
            tmp_path / f"chunk_{number}.npz",
            layers=np.array([4, 7], np.int32)[i],
            virtual_layers=np.zeros(len(t), np.int32),
            microbatches=t.astype(np.int64) + 100,
            pre=load[t, i].astype(np.int32),
            post=np.zeros((len(t), 12), np.int32),
        )
    found = formats.read(tmp_path)
    np.testing.assert_array_equal(found.load, load)
    assert (found.layers, found.format) == ((4, 7), "ultra-ep")


def test_craft(tmp_path):
    load = torch.from_numpy(RNG.integers(100, 900, (4, LAYERS, 64)))
    for name, tensor in ("trace.pkl", load), ("half.pkl", load.bfloat16()):
        torch.save(tensor, tmp_path / name)
        found = formats.read(tmp_path / name)
        np.testing.assert_array_equal(found.load, tensor.double().numpy())
        assert found.format == "array"
