"""The command line: Lightning's own commands on our modules and data, and small commands of our own."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from callbacks import RLProgress, Throughput
from lit_rlhf import __version__, commands
from lit_rlhf.banner import LineProgress, StartBanner
from lit_rlhf.bon import bon
from lit_rlhf.data.base import DataModule
from lit_rlhf.errors import UserError
from lit_rlhf.loading import maker
from lit_rlhf.modules.base import BaseModule

OWN: dict[str, Callable[..., Any]] = {
    "sample": commands.sample,
    "predict": commands.predict,
    "bon": bon,
    "label": commands.label,
    "export": commands.export,
}


class CLI(LightningCLI):
    """LightningCLI that links model and data, continues run folders, and turns the user's mistakes into one message."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Keep Lightning's commands; `predict` is ours."""
        return {name: keys for name, keys in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the data be tokenised for the model, and one seed rule both."""
        parser.link_arguments("model.init_args.model_name_or_path", "data.init_args.tokenizer")
        parser.link_arguments("model.init_args.trust_remote_code", "data.init_args.trust_remote_code")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Leave the config alone: what a checkpoint was trained with stands in its run folder's config.yaml."""

    def before_instantiate_classes(self) -> None:
        """Choose how progress is shown, find the checkpoint to continue, and continue in its run folder."""
        config = self.config[self.subcommand]
        own = [callback.class_path for callback in config.trainer.get("callbacks") or [] if "class_path" in callback]
        if not any("Progress" in path for path in own):
            bar = RLProgress() if config.trainer.enable_progress_bar else LineProgress()
            self.trainer_defaults["callbacks"].append(bar)
        if config.get("ckpt_path"):
            config.ckpt_path = str(find_checkpoint(config.ckpt_path, config.trainer.get("logger")))
            check_kind(Path(config.ckpt_path), config.model.class_path)
            if self.subcommand == "fit":
                continue_folder(Path(config.ckpt_path), config.trainer.get("logger"))

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what they refuse is the user's mistake."""
        with mistakes():
            super().instantiate_classes()


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn the refusals of constructors and of the Trainer into one message."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, MisconfigurationException, ImportError) as error:
        raise UserError(str(error)) from error


def find_checkpoint(name: str, logger: Any) -> Path:
    """Return the checkpoint to load; "last" is the last one of the newest run folder of this name."""
    if name != "last":
        path = Path(name)
        if not path.exists():
            raise UserError(f"--ckpt_path: no checkpoint at {name!r}")
        return path
    if not logger or isinstance(logger, bool | list):
        raise UserError("--ckpt_path last: expected the config to name one logger, whose run folders are looked into")
    runs = Path(logger.init_args.save_dir) / logger.init_args.name
    found = sorted(runs.glob("version_*/checkpoints/last.ckpt"), key=lambda p: int(p.parts[-3].split("_")[1]))
    if not found:
        raise UserError(f"--ckpt_path last: no checkpoints/last.ckpt in any run folder under {str(runs)!r}")
    return found[-1]


def check_kind(checkpoint: Path, class_path: str) -> None:
    """Refuse a checkpoint file that another module, or another program, made."""
    if checkpoint.is_dir():
        return  # sharded; the module looks at it itself
    made_by = maker(checkpoint)
    if made_by.rpartition(".")[2] != class_path.rpartition(".")[2]:
        raise UserError(f"--ckpt_path: {str(checkpoint)!r} was made by {made_by}, not by {class_path}")


def continue_folder(checkpoint: Path, logger: Any) -> None:
    """Log into the folder that the checkpoint lies in, if it is a run folder of this logger."""
    if not logger or isinstance(logger, bool | list) or "init_args" not in logger:
        return
    folder = checkpoint.resolve().parent.parent
    runs = (Path(logger.init_args.save_dir) / logger.init_args.name).resolve()
    if folder.parent == runs and folder.name.startswith("version_"):
        logger.init_args.version = folder.name


def own_command(name: str, argv: list[str]) -> None:
    """Parse the arguments of one of our own commands, required ones by position, and run it."""
    function = OWN[name]
    parser = ArgumentParser(prog=f"train.py {name}", description=(function.__doc__ or "").partition("\n")[0])
    skip: set[str | int] = {"prompts"} if name == "sample" else set()
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)
    if name == "sample":
        parser.add_argument("prompts", nargs="*", help="prompts; without them and without --file they are typed in")
    if name == "bon":
        parser.add_argument("--config", action="config", help="file with any of these keys")
    with mistakes():
        arguments = vars(parser.instantiate(parser.parse_args(argv)))
    arguments.pop("config", None)
    function(**arguments)


def quieten() -> None:
    """Hush what other libraries say on every run and nobody can act on; everything else is heard."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",  # torch 2.13 under Lightning 2.6
        ".*module\\(s\\) in eval mode at the start of training.*",  # the frozen reference
        ".*does not have many workers.*",  # small in-memory data
        ".*args parameter is intended to run from within Python.*",  # it is the front door that hands them over
        ".*dirpath has changed from.*",  # a checkpoint from elsewhere, on purpose
        ".*checkpoint directory .* exists and is not empty.*",  # a resumed run folder
        ".*no pre-optimization state was saved.*",  # ModelCheckpoint, of every module that steps its own optimizer
    ):
        warnings.filterwarnings("ignore", message)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())


def main(argv: list[str]) -> None:
    """Run one command of the command line.

    Raises:
        UserError: for what the user can mend.
    """
    quieten()
    if argv[0] in OWN:
        own_command(argv[0], argv[1:])
        return
    CLI(
        BaseModule,
        DataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        load_from_checkpoint_support=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "use_distributed_sampler": False,  # the data modules plan their own steps
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,  # the banner says it
            "enable_progress_bar": sys.stdout.isatty(),
            "callbacks": [StartBanner(), Throughput()],
        },
        parser_kwargs={"version": __version__},
        args=argv,
    )
