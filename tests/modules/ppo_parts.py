"""Small rewards, data and modules that the tests of PPO share."""

import itertools
import json

import torch

from lit_rlhf.data import PromptData
from lit_rlhf.functional.control import FixedKL
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_options import PPOOptions
from lit_rlhf.types import Sampling, Scorer, Scores
from tests.conftest import WORDS


class Letters(Scorer):
    """How often a letter occurs in a response, per word."""

    def __init__(self, letter="a"):
        self.letter = letter

    def score(self, prompts, responses, categories=None):
        return Scores(torch.tensor([r.count(self.letter) / (len(r.split()) + 1) for r in responses]))


class Words(Scorer):
    """The number of words."""

    def score(self, prompts, responses, categories=None):
        return Scores(torch.tensor([float(len(r.split())) for r in responses]))


class Constant(Scorer):
    def score(self, prompts, responses, categories=None):
        return Scores(torch.full((len(responses),), 2.5))


def prompt_file(folder, count=24):
    path = folder / "prompts.jsonl"
    texts = [" ".join(words) for words in itertools.islice(itertools.combinations(WORDS, 2), count)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def prompts(model, folder, batch_size=8, count=24, **options):
    options = {"validation_fraction": 0.0, "max_new_tokens": 8} | options
    return PromptData(tokenizer=model, train=prompt_file(folder, count), batch_size=batch_size, **options)


def module(model, *, ppo=None, lr=1e-2, **options):
    """A tiny policy with two rewards, of which "a" is the task's unless said otherwise."""
    options = {"rewards": {"a": Letters("a"), "e": Letters("e")}, "kl": FixedKL(0.1), "seed": 3} | options
    options = {"sampling": Sampling(max_new_tokens=8), "optimizer": Optimizer(lr=lr, eps=1e-4)} | options
    found = PPOModule(model_name_or_path=model, ppo=PPOOptions(**{"scale_samples": 16} | (ppo or {})), **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the critic's heads
        found.configure_model()
    return found


def ready(model, folder, **options):
    """A module whose units are measured, its optimizer, and the first batch of prompts; no Trainer anywhere."""
    data = prompts(model, folder)
    data.setup("fit")
    found = module(model, **options)
    found.encoder = data.encoder
    found.measure_scale([example.row.prompt for example in data.examples("train").items[:16]])
    optimizer = found.optimizer_options.build(found.parameter_groups())
    return found, optimizer, next(iter(data.train_dataloader()))


def experience_of(module, batch):
    rollout = module.rollout(batch)
    return module.advantages(batch.index, rollout, module.score(rollout))
