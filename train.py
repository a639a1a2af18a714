"""The front door: `python train.py fit --config configs/dpo.yaml`; without arguments it says what it can do."""

import sys

from lit_rlhf.front import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
