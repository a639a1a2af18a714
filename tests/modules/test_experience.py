"""Rows of a rollout: cut, joined, and dealt to minibatches alike for any number of processes."""

import pytest
import torch

from lit_rlhf.modules.experience import Experience, joined
from lit_rlhf.modules.minibatches import Pass, RowTable, _Row, passes
from lit_rlhf.types import Rollout, Sampling, Sequences


def sequences(prompt_lengths, response_lengths, offset=0):
    """Rows whose ids count 100 row + column of the unpadded row."""
    left, right = max(prompt_lengths), max(response_lengths)
    ids = torch.zeros(len(prompt_lengths), left + right, dtype=torch.long)
    attention, response = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, t) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        ids[row, left - p : left + t] = 100 * (row + offset) + torch.arange(p + t)
        attention[row, left - p : left + t] = True
        response[row, left : left + t] = True
    return Sequences(ids, attention, response)


def rollout(prompt_lengths, response_lengths, offset=0):
    rows = sequences(prompt_lengths, response_lengths, offset)
    mask = rows.response_mask[:, max(prompt_lengths) :]
    names = [f"{k + offset}" for k in range(len(mask))]
    logps = torch.where(mask, -torch.arange(1.0, mask.shape[1] + 1), 0)
    return Rollout(names, names, rows, logps, 2 * logps, torch.ones(len(mask), dtype=torch.bool), Sampling())


def test_rows_lose_the_columns_that_all_of_them_leave_empty():
    rows = sequences([1, 3, 2], [2, 4, 1])
    columns = torch.arange(12.0).reshape(3, 4)
    experience = Experience(
        torch.tensor([7, 8, 9]), rows, columns, columns[..., None], columns[..., None], columns[..., None],
        torch.tensor([[1.0], [2.0], [3.0]]),
    )  # fmt: skip
    part = experience.rows([2, 0])
    assert part.index.tolist() == [9, 7]
    assert part.sequences.ids.tolist() == [[200, 201, 202, 0], [0, 0, 1, 2]]
    assert part.behaviour_logps.tolist() == [[8, 9], [0, 1]]
    assert part.values.shape == (2, 2, 1)
    assert part.constraint_values.tolist() == [[3], [1]]
    assert part.mask.tolist() == [[True, False], [True, True]]


def test_joined_rollouts_keep_every_row_aligned():
    first, second = rollout([2, 1], [1, 3]), rollout([4], [2], offset=2)
    whole = joined([first, second])
    assert whole.sequences.ids.tolist() == [
        [0, 0, 0, 1, 2, 0, 0],
        [0, 0, 0, 100, 101, 102, 103],
        [200, 201, 202, 203, 204, 205, 0],
    ]
    assert whole.response_mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert whole.token_logps.tolist() == [[-1, 0, 0], [-1, -2, -3], [-1, -2, 0]]
    assert torch.equal(whole.sampler_logps, 2 * whole.token_logps)
    assert whole.prompts == ["0", "1", "2"]
    assert joined([first]) is first


def table(owners, rank=0, ranks=1):
    """Row number i belongs to owners[i]; it has i + 1 tokens."""
    seen = dict.fromkeys(range(ranks), 0)
    rows = []
    for number, owner in enumerate(owners):
        rows.append(_Row(number, owner, seen[owner], number + 1, 2))
        seen[owner] += 1
    return RowTable(tuple(rows), rank, ranks)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_minibatches_hold_the_same_rows_for_any_number_of_processes(size):
    owners = [0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1]
    numbers = {rank: [n for n, owner in enumerate(owners) if owner == rank] for rank in (0, 1)}
    one = table([0] * 11).minibatches((3, 1, 0), 4, size)
    two = [table(owners, rank, 2).minibatches((3, 1, 0), 4, size) for rank in (0, 1)]
    for whole, *parts in zip(one, *two, strict=True):
        rows = [n for part in whole.passes for n in part.rows]
        shared = [numbers[k][i] for k in (0, 1) for part in parts[k].passes if part.counts for i in part.rows]
        assert sorted(rows) == sorted(shared)
        assert whole.tokens == parts[0].tokens == parts[1].tokens == sum(n + 1 for n in rows)
        assert whole.extra_tokens == 2 * len(rows)
        assert whole.rows == parts[0].rows == len(rows)
        assert len(parts[0].passes) == len(parts[1].passes)  # sharded models gather in step
    dealt = [n for minibatch in one for part in minibatch.passes for n in part.rows]
    assert sorted(dealt) == list(range(11))


def test_the_order_changes_with_update_epoch_and_seed():
    found = [str(table([0] * 11).minibatches(key, 1)) for key in ((3, 1, 0), (3, 1, 1), (3, 2, 0), (4, 1, 0))]
    assert len(set(found)) == 4


def test_fewer_rows_than_minibatches_give_fewer():
    assert [m.rows for m in table([0, 0]).minibatches((0, 0, 0), 4)] == [1, 1]


def test_a_process_with_nothing_to_do_keeps_step():
    assert passes([5, 6, 7], 5, 2) == [Pass((5, 6)), Pass((7,)), Pass((5,), counts=False)]
    assert passes([], 3, 2) == [Pass((0,), counts=False)] * 2
    assert passes([4, 2], 2) == [Pass((4, 2))]
