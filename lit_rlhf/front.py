"""Answers what needs no training at once; everything else pays for Lightning's import."""

from __future__ import annotations

import sys

from lit_rlhf.errors import guarded

COMMANDS = ("fit", "validate", "test", "predict", "sample", "bon", "label", "export", "report")
USAGE = """\
lit_rlhf {version}: train reward models and policies from preferences, and watch for over-optimisation.

usage: python train.py COMMAND ...           (installed also as `lit-rlhf`)

  fit        train:            python train.py fit --config configs/dpo.yaml
  validate   held-out metrics  python train.py validate --config configs/reward.yaml --ckpt_path FILE
  test       the same on the test split
  predict    a reward model scores a file of responses; a policy answers a file of prompts
  sample     print a model's responses to prompts given as arguments, from a file, or typed in
  bon        best-of-n: python train.py bon --config configs/bon.yaml
  label      write labels onto pairs: preferences by the gold reward, a share of them wrong, or aspects by a judge
  export     checkpoint to a folder that plain transformers and peft load
  report     run folders to one self-contained HTML file

Each takes --help. Configs: see the folder `configs/`; any key can be set on the command line, for example
  python train.py fit --config configs/dpo.yaml --model.loss.beta 0.05 --trainer.max_steps 100
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 for what the user can mend, 1 for anything else."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        from lit_rlhf import __version__

        print(USAGE.format(version=__version__))
        return 0
    if argv[0] == "--version":
        from lit_rlhf import __version__

        print(f"lit_rlhf {__version__}")
        return 0
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if argv[0] == "report":
        from lit_rlhf.report import main as report

        return guarded(lambda: report(argv[1:]))
    from lit_rlhf.cli import main as command

    return guarded(lambda: command(argv))
