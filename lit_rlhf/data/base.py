"""What the data modules share: read, split by prompt, encode once, plan steps, report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Generic, Literal, TypeVar

from lightning.pytorch import LightningDataModule

from lit_rlhf.data.batching import MicroBatch, ResumableLoader, StepPlanner
from lit_rlhf.data.examples import Example, Examples, RowT, SplitName, held_out_groups, select
from lit_rlhf.data.rows import Origin, Record, digest
from lit_rlhf.data.sources import WORLD, read
from lit_rlhf.encoding import Encoded, Encoder
from lit_rlhf.types import Prompt, Scorer, UserError

BatchT = TypeVar("BatchT")
Sources = str | list[str]
LongPrompts = Literal["drop", "error", "keep_end"]

_NEEDED: dict[str, tuple[SplitName, ...]] = {"fit": ("train", "validation"), "test": ("test",)}


class DataModule(LightningDataModule, ABC, Generic[RowT, BatchT]):
    """Rows of text in, batches of ids and masks out.

    Args:
        tokenizer: model folder, hub id or `builtin:` name whose tokenizer, chat template and window are used.
        train: a JSONL, JSONL.gz or Parquet file, a folder, a hub id, `builtin:world`, or a list of these to mix.
        validation: the same; left out, all rows of some prompts are split off `train`, chosen by a hash of the prompt,
            so that the split depends neither on order nor on a seed. `builtin:world` has a validation split of its own.
        test: the same; only `builtin:world` has one of its own.
        joiner: text between a string prompt and its response.
        max_length: tokens of prompt and response together; None takes the model's window, at most 1024.
        batch_size: rows per process and micro-batch.
        validation_fraction: expected share of prompts to split off, in [0, 1); 0 for no validation.
        long_prompts: what to do with a prompt that fills the window alone: drop the row and count it, stop with an
            error, or keep the end of the prompt (half a window).
        num_workers: processes that make batches ahead of time; 0 is fast enough for most text.
        seed: of the order of rows.
        limit: rows to read of each source; None reads all.
        trust_remote_code: allow code from the tokenizer's author to run here.
        gold: what scores responses for the gold probe; None takes the built-in world's own, for its rows.
    """

    world_sizes: ClassVar[dict[SplitName, int]]  # rows that `builtin:world` stands for
    stream_numbers: tuple[int, ...] = (0,)  # orders of the training rows, side by side in every batch

    def __init__(  # noqa: PLR0913  # flat keys on the command line
        self,
        tokenizer: str = "builtin:policy",
        *,
        train: Sources = WORLD,
        validation: Sources | None = None,
        test: Sources | None = None,
        joiner: str = " ",
        max_length: int | None = None,
        batch_size: int = 8,
        validation_fraction: float = 0.1,
        long_prompts: LongPrompts = "drop",
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        trust_remote_code: bool = False,
        gold: Scorer | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["gold"])  # the model logs its own; equal names would collide
        self.tokenizer = tokenizer
        self.own_gold = gold
        self.is_world = _listed(train) == (WORLD,)
        own = (WORLD,) if self.is_world else ()
        self.sources: dict[SplitName, tuple[str, ...]] = {
            "train": _listed(train),
            "validation": _listed(validation) or own,
            "test": _listed(test) or own,
        }
        self.joiner = joiner
        self.max_length = max_length
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.long_prompts = long_prompts
        self.num_workers = num_workers
        self.seed = seed
        self.limit = limit
        self.trust_remote_code = trust_remote_code
        self._rows: dict[SplitName, list[RowT]] = {}
        self._examples: dict[SplitName, Examples[RowT]] = {}
        if not 0 <= validation_fraction < 1:
            raise UserError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        if limit is not None and limit < 1:
            raise UserError(f"limit must be >= 1 or null, got {limit}")
        if not self.sources["train"]:
            raise UserError("`train` is an empty list; expected a file, folder, hub id or builtin:world")

    @abstractmethod
    def parse(self, record: Record) -> list[RowT]:
        """Check one row of data and turn it into records."""

    @abstractmethod
    def world_rows(self, n: int, split: SplitName) -> list[dict[str, Any]]:
        """Return n rows of the built-in world."""

    @abstractmethod
    def batch_maker(self, items: Sequence[Example[RowT]]) -> Callable[[MicroBatch], BatchT]:
        """Return the function that makes a batch of some of the items; it must be picklable."""

    def encode(self, rows: Sequence[RowT]) -> list[tuple[Encoded, ...] | None]:
        """Encode the answers of each row; None where the prompt leaves too little of the window."""
        prompts = [row.prompt for row in rows for _ in row.answers]
        flat = iter(self.encoder.encode_many(prompts, [answer for row in rows for answer in row.answers]))
        found = (tuple(islice(flat, len(row.answers))) for row in rows)
        return [None if None in answers else tuple(e for e in answers if e is not None) for answers in found]

    def judge(self) -> Callable[[Example[RowT]], str | None]:
        """Return a function, new for each split, that says why a row cannot be used; None where it can."""
        return lambda _: None

    @cached_property
    def encoder(self) -> Encoder:
        """The one place where this module's ids and masks are made."""
        return Encoder.from_pretrained(
            self.tokenizer,
            joiner=self.joiner,
            max_length=self.max_length,
            keep_end=self.long_prompts == "keep_end",
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def proxy_path(self) -> str | None:
        """The reward model that was trained on these very pairs, where one ships: the built-in world's first proxy."""
        return "builtin:proxy-0" if self.is_world else None

    @property
    def gold(self) -> Scorer | None:
        """The scorer given; else the exact reward of the built-in world where all training rows come from it."""
        if self.own_gold is not None or not self.is_world:
            return self.own_gold
        from lit_rlhf.data.synthetic import WorldGold

        return WorldGold()

    @property
    def fingerprint(self) -> str:
        """The hash of the training rows' ids, see `Examples.fingerprint`."""
        return self.examples("train").fingerprint

    def setup(self, stage: str) -> None:
        """Read and encode what a stage needs; nothing is done twice."""
        for split in _NEEDED.get(stage, ("validation",)):
            if split != "validation" or self.has_validation:
                self.examples(split)

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows, given or split off."""
        return bool(self.sources["validation"]) or self.validation_fraction > 0

    def examples(self, split: SplitName) -> Examples[RowT]:
        """Return the encoded rows of a split, numbered as in the batches' `index`.

        Raises:
            UserError: a bad row, no source for the split, or no usable row in it.
        """
        if split not in self._examples:
            rows = self._split(split)
            refuse_long = self.long_prompts == "error"
            chosen = select(rows, self.encode(rows), self.encoder, self.judge(), refuse_long=refuse_long)
            self._examples[split] = chosen
        return self._examples[split]

    def loader(self, split: SplitName, *, training: bool = False) -> ResumableLoader[BatchT]:
        """Return planned batches of a split: shuffled optimizer steps, or one pass in the order of the data."""
        items = self.examples(split).items
        ranks = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        planner = StepPlanner(
            [example.tokens for example in items],
            self.batch_size,
            world_size=ranks["num_replicas"],
            rank=ranks["rank"],
            accumulate=getattr(self.trainer, "accumulate_grad_batches", 1) if training else 1,
            seed=self.seed,
            training=training,
            streams=self.stream_numbers if training else (0,),
        )
        return ResumableLoader(planner, self.batch_maker(items), self.num_workers)

    def train_dataloader(self) -> ResumableLoader[BatchT]:
        """Return the planned batches of the training rows."""
        return self.loader("train", training=True)

    def val_dataloader(self) -> ResumableLoader[BatchT] | list[Any]:
        """Return the batches of the validation rows; an empty list where there are none."""
        return self.loader("validation") if self.has_validation else []

    def test_dataloader(self) -> ResumableLoader[BatchT]:
        """Return the batches of the test rows."""
        return self.loader("test")

    def held_out(self, n: int) -> list[BatchT]:
        """Return the first n validation rows in batches, equal on every rank; empty where there are none."""
        if not self.has_validation:
            return []
        items = self.examples("validation").items[:n]
        planner = StepPlanner([e.tokens for e in items], batch_size=self.batch_size, training=False)
        return [self.batch_maker(items)(micro) for micro in planner.epoch(0)]

    def probe_prompts(self, n: int) -> list[tuple[Prompt, str | None]]:
        """Return up to n different validation prompts with their categories, in an order that is always the same.

        The order is that of a hash, since files are often sorted by category. Without validation rows, training rows
        are taken.
        """
        items = self.examples("validation" if self.has_validation else "train").items
        rows = {item.row.group: item.row for item in reversed(items)}
        return [(rows[group].prompt, rows[group].category) for group in sorted(rows, key=digest)[:n]]

    def report(self) -> list[str]:
        """Say in lines for the start banner what was read, kept, dropped and cut, and show the first example."""
        lines = []
        for split, found in self._examples.items():
            sources = ", ".join(self.sources[split]) or "split off train by prompt"
            lines.append(f"{split} ({sources}): {found.summary()}")
            lines += found.first(self.encoder) if split == "train" else []
        messages = any(not isinstance(found.items[0].row.prompt, str) for found in self._examples.values())
        if messages and not self.encoder.has_chat_template:
            lines.append("the tokenizer has no chat template: each message becomes a line `role: content`")
        return lines

    def _split(self, split: SplitName) -> list[RowT]:
        if split not in self._rows:
            splits_off = not self.sources["validation"] and self.validation_fraction > 0
            if split != "test" and splits_off:
                self._split_off()
            elif self.sources[split]:
                self._rows[split] = self._read(split)
            else:
                raise UserError(f"there are no {split} rows: expected `{split}` to name a file, folder or data set")
        return self._rows[split]

    def _split_off(self) -> None:
        rows = self._read("train")
        held_out = held_out_groups({row.group for row in rows}, self.validation_fraction)
        if not held_out:
            raise UserError(
                f"{rows[0].origin}: all rows have one prompt, so no prompt can be held out; expected `validation` to"
                " name a file, or validation_fraction 0"
            )
        self._rows["train"] = [row for row in rows if row.group not in held_out]
        self._rows["validation"] = [row for row in rows if row.group in held_out]
        assert held_out.isdisjoint(row.group for row in self._rows["train"])

    def _read(self, split: SplitName) -> list[RowT]:
        rows: list[RowT] = []
        for source in self.sources[split]:
            records = self._world(split) if source == WORLD else read(source, split)
            rows += [row for record in islice(records, self.limit) for row in self.parse(record)]
        return rows

    def _world(self, split: SplitName) -> Iterable[Record]:
        rows = self.world_rows(min(self.world_sizes[split], self.limit or self.world_sizes[split]), split)
        return (Record(Origin(WORLD, line), row) for line, row in enumerate(rows, 1))


def _listed(sources: Sources | None) -> tuple[str, ...]:
    return () if sources is None else (sources,) if isinstance(sources, str) else tuple(sources)
