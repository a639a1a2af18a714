"""The bar names phases and figures; where no bar is shown nothing breaks."""

import contextlib
import io
from types import SimpleNamespace

import torch

from callbacks import RLProgress
from lit_rlhf.functional.constrained import Equal
from lit_rlhf.modules.optimizer import Optimizer
from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_options import PPOOptions
from lit_rlhf.types import Sampling
from tests.modules.ppo_parts import Letters, prompts
from tests.modules.test_modules import fit


class Bar(RLProgress):
    """Remembers every description that the bar was given."""

    def on_train_start(self, *args):
        super().on_train_start(*args)
        self.described, self.figures = [], []
        inner = self.train_progress_bar.set_description
        self.train_progress_bar.set_description = lambda text: (self.described.append(text), inner(text))

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.figures.append(self.get_metrics(trainer, pl_module))


def run(model, folder, bar):
    ppo = PPOModule(
        {"a": Letters("a")}, constraints=[Equal("a", 0.5)], model_name_or_path=model,
        sampling=Sampling(max_new_tokens=8), ppo=PPOOptions(1, 2, scale_samples=16),
        optimizer=Optimizer(lr=1e-3), seed=0,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        fit(ppo, prompts(model, folder), bar, steps=4, enable_progress_bar=True)
    return shown.getvalue()


def test_phases_and_figures_are_shown(tiny_llama_path, tmp_path):
    bar = Bar()
    shown = run(tiny_llama_path, tmp_path, bar)
    phases = ["Epoch 0, sampling", "Epoch 0, scoring", "Epoch 0, optimising"]
    assert [text for text in bar.described if "," in text] == phases * 2
    assert bar.figures[-1].keys() >= {"reward", "kl", "mu a"}
    assert "gold" not in bar.figures[-1]
    assert "mu a=" in shown
    assert "sampling" in shown


def test_a_hidden_bar_stays_hidden(tiny_llama_path, tmp_path):
    assert "sampling" not in run(tiny_llama_path, tmp_path, RLProgress(refresh_rate=0))


def test_other_methods_see_lightnings_own_figures():
    from callbacks.rl_progress import figures

    trainer = SimpleNamespace(callback_metrics={"loss": torch.tensor(1.0), "gold/score": torch.tensor(2.0)})
    assert figures(trainer) == {}
    trainer.callback_metrics |= {"objective/kl": torch.tensor(0.51234), "constraint/b/multiplier": torch.tensor(-3.0)}
    assert figures(trainer) == {"gold": "2", "kl": "0.512", "mu b": "-3"}
