"""Mean imbalance of the torch originals on the loads of `test_quality.py`.

python tests/golden/make_imbalance.py DIR     # DIR holds the originals, NAME.py each

Writes imbalance.json beside this file: the mean over eight runs.
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
    sys.path[:0] = [str(HERE.parent), sys.argv[1]]

    from helpers import mean_imbalance
    from test_quality import LOADS

    torch.manual_seed(0)
    random.seed(0)
    result: dict[str, dict[str, float]] = {}
    for path in sorted(Path(sys.argv[1]).glob("*.py")):
        pack = importlib.import_module(path.stem).balanced_packing
        result[path.stem] = {}
        for name, (weight, num_packs) in LOADS.items():
            tensor = torch.from_numpy(weight.copy())
            values = [
                mean_imbalance(weight, pack(tensor, num_packs)[0], num_packs) for _ in range(8)
            ]
            result[path.stem][name] = float(np.mean(values))
    command = "python tests/golden/make_imbalance.py DIR"
    (HERE / "imbalance.json").write_text(json.dumps({"command": command} | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
