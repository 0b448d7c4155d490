"""Mean imbalance of the torch originals on the loads of `test_quality.py`.

python tests/golden/make_imbalance.py DIR     # DIR holds the originals, NAME.py each

Writes imbalance.json beside this file: the mean over 32 runs, 8 of the slow originals. A run
differs from the next by up to 10 %.
"""

import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    HERE = Path(__file__).parent
    sys.path[:0] = [str(HERE.parent.parent), sys.argv[1]]

    from tests.helpers import mean_imbalance
    from tests.test_quality import LOADS

    torch.manual_seed(0)
    random.seed(0)
    result: dict[str, dict[str, float]] = {}
    for path in sorted(Path(sys.argv[1]).glob("*.py")):
        pack = importlib.import_module(path.stem).balanced_packing
        result[path.stem] = {}
        runs = 8 if path.stem in ("greedy_swap", "pruned") else 32
        for name, (weight, num_packs) in LOADS.items():
            tensor = torch.from_numpy(weight.copy())
            values = [
                mean_imbalance(weight, pack(tensor, num_packs)[0], num_packs) for _ in range(runs)
            ]
            result[path.stem][name] = float(np.mean(values))
    command = "python tests/golden/make_imbalance.py DIR"
    (HERE / "imbalance.json").write_text(json.dumps({"command": command} | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
