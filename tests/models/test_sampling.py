"""The sampler: exact log-probabilities, the right distribution, rows that ignore their neighbours, honest masks."""

from __future__ import annotations

import pytest
import torch

from lit_rlhf.models.backbone import Backbone, LoRA, ModelOptions
from lit_rlhf.models.sampling import draw, sample
from lit_rlhf.types import Sampling, Sequences, UserError

PROMPTS = [[1, 9, 7], [1, 12], [1, 5, 6, 7, 8, 9], [1, 30, 20]]
STOP = (0,)


def left_padded(rows: list[list[int]], pad: int = 0) -> Sequences:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Sequences(ids, mask, torch.zeros_like(mask))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def responses(result) -> list[list[int]]:
    sequences, _, _ = result
    return [ids[mask].tolist() for ids, mask in zip(sequences.ids, sequences.response_mask, strict=True)]


@pytest.fixture(params=["llama", "gpt2", "neox"])
def backbone(request) -> Backbone:
    return Backbone(request.getfixturevalue(f"tiny_{request.param}_path"))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=20),
        Sampling(temperature=0.6, max_new_tokens=20),
        Sampling(temperature=1.3, top_k=5, top_p=0.9, max_new_tokens=20),
    ],
)
def test_the_samplers_log_probs_are_those_of_a_fresh_pass(backbone, sampling):
    sequences, logps, _ = sample(backbone, left_padded(PROMPTS), generators(1, 2, 3, 4), sampling, STOP)
    with torch.no_grad():
        fresh = backbone(sequences, sampling.temperature)
    torch.testing.assert_close(logps, fresh[:, -logps.shape[1] :], rtol=0, atol=1e-5)
    assert logps[sequences.response_mask[:, -logps.shape[1] :]].all()


def test_a_row_draws_the_same_alone_and_among_others(backbone):
    sampling = Sampling(max_new_tokens=20)
    together = responses(sample(backbone, left_padded(PROMPTS), generators(1, 2, 3, 4), sampling, STOP))
    swapped = responses(sample(backbone, left_padded(PROMPTS[::-1]), generators(4, 3, 2, 1), sampling, STOP))
    alone = [
        responses(sample(backbone, left_padded([row]), generators(seed), sampling, STOP))[0]
        for row, seed in zip(PROMPTS, (1, 2, 3, 4), strict=True)
    ]
    assert together == alone == swapped[::-1]
    assert len({tuple(row) for row in together}) > 1


def test_what_stands_in_the_prompts_padding_changes_nothing(backbone):
    sampling = Sampling(max_new_tokens=8)
    one = sample(backbone, left_padded(PROMPTS, pad=0), generators(1, 2, 3, 4), sampling, STOP)
    other = sample(backbone, left_padded(PROMPTS, pad=17), generators(1, 2, 3, 4), sampling, STOP)
    assert responses(one) == responses(other)
    assert torch.equal(one[1], other[1])


def test_a_shorter_limit_cuts_the_same_response(backbone):
    long = responses(sample(backbone, left_padded(PROMPTS), generators(1, 2, 3, 4), Sampling(max_new_tokens=9), STOP))
    # The uniforms come up front, so a limit changes how many there are and not what they are.
    short = responses(sample(backbone, left_padded(PROMPTS), generators(1, 2, 3, 4), Sampling(max_new_tokens=4), STOP))
    assert short == [row[:4] for row in long]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1e-4, max_new_tokens=12), Sampling(top_k=1, max_new_tokens=12)]
)
def test_a_cold_sampler_agrees_with_greedy_generate(backbone, sampling):
    prompts = left_padded(PROMPTS)
    expected = backbone.causal_lm.generate(
        input_ids=prompts.ids,
        attention_mask=prompts.attention_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=list(STOP),
        pad_token_id=3,
    )[:, prompts.ids.shape[1] :]
    drawn = responses(sample(backbone, prompts, generators(1, 2, 3, 4), sampling, STOP))
    for row, wanted in zip(drawn, expected.tolist(), strict=True):
        assert row == wanted[: len(row)]
        assert set(wanted[len(row) :]) <= {3}


def test_masks_end_with_the_first_stop_token(tiny_llama_path):
    backbone = Backbone(tiny_llama_path)
    prompts = left_padded(PROMPTS * 8)
    stops = (0, 4, 11)
    result = sample(backbone, prompts, generators(*range(32)), Sampling(max_new_tokens=15), stops)
    sequences, logps, ended = result
    assert ended.any()
    assert not ended.all()
    assert sequences.ids.shape == sequences.response_mask.shape == (32, 6 + logps.shape[1])
    for row, done in zip(responses(result), ended.tolist(), strict=True):
        assert 1 <= len(row) <= 15
        assert not set(row[:-1]) & set(stops)
        assert (row[-1] in stops) == done
        assert done or len(row) == 15
    response = sequences.response_mask
    assert not response[:, :6].any()
    assert torch.equal(sequences.attention_mask, torch.cat([prompts.attention_mask, response[:, 6:]], -1))
    assert not logps[~response[:, 6:]].any()


def test_a_row_that_ends_on_the_last_step_has_ended(tiny_llama_path):
    backbone, everything = Backbone(tiny_llama_path), tuple(range(40))
    sequences, logps, ended = sample(
        backbone, left_padded(PROMPTS), generators(1, 2, 3, 4), Sampling(max_new_tokens=1), everything
    )
    assert ended.all()
    assert logps.shape == (4, 1)
    assert sequences.response_lengths.tolist() == [1, 1, 1, 1]


def test_decoding_stops_once_all_rows_have(tiny_llama_path):
    backbone, everything = Backbone(tiny_llama_path), tuple(range(40))
    _, logps, _ = sample(
        backbone, left_padded(PROMPTS), generators(1, 2, 3, 4), Sampling(max_new_tokens=30), everything
    )
    assert logps.shape == (4, 1)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """P-value of observed counts; cells expected less than five times are pooled."""
    from scipy.stats import chisquare

    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = wanted > 0
    assert not observed[~keep].any()
    if keep.sum() == 1:
        return 1.0
    return float(chisquare(observed[keep], wanted[keep] * observed.sum() / wanted[keep].sum()).pvalue)


LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, -3.0, 1.0, -torch.inf, 0.0])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3, 4, 5, 7]),
        (Sampling(temperature=2.0), [0, 1, 2, 3, 4, 5, 7]),
        (Sampling(top_k=2), [0, 5]),
        (Sampling(top_p=0.6), [0, 5]),  # masses 0.48, 0.18, 0.11, 0.11, ...
        (Sampling(top_p=0.1), [0]),
        (Sampling(top_k=3, top_p=0.999), [0, 2, 3, 5]),  # a tie at the k-th place keeps both
    ],
)
def test_draws_have_the_frequencies_of_the_softmax(sampling, kept):
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(5))
    ids, logps = draw(LOGITS.expand(20_000, -1), uniforms, sampling)
    scaled = LOGITS / sampling.temperature
    allowed = torch.full_like(scaled, -torch.inf)
    allowed[kept] = scaled[kept]
    assert chi_square(ids.bincount(minlength=8), allowed.softmax(-1)) > 1e-3
    # The log-probabilities are of the distribution before top-k and top-p.
    torch.testing.assert_close(logps, scaled.log_softmax(-1)[ids])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_uniforms_never_draw_an_impossible_token(uniform):
    logits = torch.tensor([[-torch.inf, 1.0, 0.3, -torch.inf]])
    ids, _ = draw(logits, torch.tensor([uniform]), Sampling())
    assert ids.item() == (1 if uniform == 0 else 2)


def test_responses_follow_the_models_own_distribution(tiny_llama_path):
    backbone = Backbone(tiny_llama_path)
    result = sample(
        backbone, left_padded([PROMPTS[0]] * 3000), generators(*range(3000)), Sampling(max_new_tokens=2), ()
    )
    drawn = torch.tensor(responses(result))
    with torch.no_grad():
        first = backbone.causal_lm(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
        after = backbone.causal_lm(torch.tensor([[*PROMPTS[0], v] for v in range(40)])).logits[:, -1].softmax(-1)
    assert chi_square(drawn[:, 0].bincount(minlength=40), first) > 1e-3
    assert chi_square(drawn[:, 1].bincount(minlength=40), first @ after) > 1e-3


def test_sampling_leaves_modes_and_gradients_as_they_were(tiny_llama_path):
    options = ModelOptions(activation_checkpointing=True, lora=LoRA(r=2, dropout=0.5))
    backbone = Backbone(tiny_llama_path, options)
    backbone.causal_lm.base_model.layers[0].eval()
    modes = {name: module.training for name, module in backbone.named_modules()}
    sequences, logps, _ = sample(
        backbone, left_padded(PROMPTS), generators(1, 2, 3, 4), Sampling(max_new_tokens=5), STOP
    )
    assert {name: module.training for name, module in backbone.named_modules()} == modes
    assert not logps.requires_grad
    assert backbone(sequences).requires_grad


def test_each_row_stops_at_the_window_by_itself(tiny_gpt2_path):
    backbone, long = Backbone(tiny_gpt2_path), Sampling(max_new_tokens=100)
    rows = left_padded(PROMPTS)
    sequences, _, _ = sample(backbone, rows, generators(1, 2, 3, 4), long, ())
    lengths = rows.attention_mask.sum(-1)
    assert sequences.response_lengths.tolist() == (64 - lengths).tolist()
    for i, prompt in enumerate(PROMPTS):  # batch-mates change nothing
        alone, _, _ = sample(backbone, left_padded([prompt]), generators(i + 1), long, ())
        assert alone.ids[alone.response_mask].equal(sequences.ids[i][sequences.response_mask[i]])


def test_a_prompt_that_fills_the_window_is_refused(tiny_gpt2_path):
    rows = left_padded([PROMPTS[0] * 64])
    with pytest.raises(UserError, match=r"a prompt of \d+ tokens fills the model's window of 64 tokens"):
        sample(Backbone(tiny_gpt2_path), rows, generators(1), Sampling(max_new_tokens=4), STOP)
