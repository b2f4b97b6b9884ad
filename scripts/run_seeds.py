"""Run `imbsam fit` once for every seed, in one process; the seed is the run's and the data's.

python scripts/run_seeds.py 0 1 2 3 4 -- --config configs/digits_lt/imbsam.yaml --model.sam.rho 0.1
imbsam report logs/digits_lt/imbsam --format md
"""

import sys

from lightning_modules.cli import main

if __name__ == "__main__":
    if "--" not in sys.argv:
        raise SystemExit(__doc__)
    split = sys.argv.index("--")
    seeds, settings = sys.argv[1:split], sys.argv[split + 1 :]
    for seed in seeds:
        sys.argv = ["imbsam", "fit", *settings, f"--seed_everything={seed}", f"--data.seed={seed}"]
        main()
