"""The bundled traces: measured loads of real models."""

from importlib import resources

import numpy as np
from jaxtyping import Int64

EXAMPLES = ("deepseek_v3_0324", "deepseek_v2_lite", "gpt_oss_20b", "gpt_oss_20b_decode")
"""Names of the bundled traces."""


def example(name: str = "deepseek_v3_0324") -> Int64[np.ndarray, "T L E"]:
    """Measured tokens routed to every expert of a real model, in every window; MoE layers only.

    deepseek_v3_0324: DeepSeek-V3-0324, [2, 58, 256], 8 experts a token. MMLU text packed to 4k
    tokens, then to 8k. Bobchenyx/CC-MoE at commit 98b792d, MIT licence.

    deepseek_v2_lite: DeepSeek-V2-Lite after fine-tuning, [32, 26, 64], 6 experts a token. Four
    tasks in turn (intent, law, summary, translation), 8 windows of 1024 tokens each.
    deepseek-ai/ESFT at commit 579a771, MIT licence.

    gpt_oss_20b: gpt-oss-20b decoding, [26, 24, 32], 4 experts a token. Windows of 8192 generated
    tokens, one request after another. AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting at commit
    72b368f, Apache-2.0 licence.

    gpt_oss_20b_decode: the same tokens, [31, 24, 32], as if all 703 requests had been decoded in
    one batch. Windows of 16 steps, with fewer tokens as requests end. The same source and licence.

    Args:
        name: One of `EXAMPLES`.

    Returns:
        Counts of routed tokens; every layer of a window adds up to tokens times experts a token.

    Raises:
        ValueError: The name is not known.

    Example:
        >>> example().shape
        (2, 58, 256)
        >>> example("gpt_oss_20b").shape
        (26, 24, 32)
    """
    if name not in EXAMPLES:
        raise ValueError(f"name={name!r} is not known; choose one of: {', '.join(EXAMPLES)}")
    source = resources.files("eplb_jax.evaluation").joinpath("data", f"{name}.npz")
    with source.open("rb") as file, np.load(file) as data:
        return data["load"].astype(np.int64)
