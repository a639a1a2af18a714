"""`tests.modules.ppo_worker` with a search for thresholds as its one case, "search"."""

import sys
from functools import partial
from pathlib import Path

from lit_rlhf.modules.ppo_search import ThresholdSearchModule
from lit_rlhf.modules.threshold_search import ThresholdSearch
from tests.modules import ppo_worker
from tests.modules.ppo_parts import Letters

SEARCH = ThresholdSearch(150, cap=10, prompts=5, samples=2)  # five prompts on two processes; 14 or 1 row an update

ppo_worker.CASES = {"search": ppo_worker.XI | {"search": SEARCH}}
ppo_worker.PPOModule = ThresholdSearchModule
ppo_worker.UPDATES = 7
ppo_worker.prompts = partial(ppo_worker.prompts, validation_fraction=0.4, gold=Letters("o"))

if __name__ == "__main__":
    ppo_worker.main(Path(sys.argv[1]), *sys.argv[2:5])
