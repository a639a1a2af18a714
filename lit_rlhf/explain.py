"""Why a DMoERM prefers one response to another, pair by pair, as tables that a person can read.

python -m lit_rlhf.explain runs/reward_moe/version_0/hf pairs.jsonl --n 3
"""

from __future__ import annotations

from itertools import islice

from lit_rlhf.errors import UserError


def explain(model: str, data: str, *, n: int = 3, routing: str = "router") -> None:
    """Print, for the first pairs of a file, each capability point's score of both responses and their difference.

    Args:
        model: folder that a DMoERM was exported to.
        data: preference rows.
        n: how many pairs.
        routing: "router", "soft" or "oracle" (the rows' own categories).

    Raises:
        UserError: the folder holds no DMoERM, or `routing` is none of the three.
    """
    if routing not in ("router", "soft", "oracle"):
        raise UserError(f"routing must be router, soft or oracle, got {routing!r}")

    from lit_rlhf.data.rows import preference_rows
    from lit_rlhf.data.sources import read
    from lit_rlhf.models import moe_scorer

    scorer = moe_scorer.MoERewardModel(model, routing)  # type: ignore[arg-type]
    for row in islice((row for record in read(data) for row in preference_rows(record)), n):
        scores = scorer.details([row.prompt] * 2, list(row.answers), [row.category] * 2)
        table = moe_scorer.explain(scores, scorer.points, 0, 1)
        texts = f"first, chosen: {row.chosen}\nsecond, rejected: {row.rejected}"
        print(f"{row.origin}\nprompt: {row.prompt}\n{texts}\n{table}\n")


if __name__ == "__main__":
    import sys

    from jsonargparse import auto_cli

    try:
        auto_cli(explain)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
