"""Scores at chosen positions against the whole logits."""

from __future__ import annotations

import pytest
import torch

from probes.prompts import pad
from probes.scoring import log_probs, logits_at, row_sums


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_scores_equal_those_of_the_whole_logits(request, name):
    model = request.getfixturevalue(name)
    batch = pad([[5, 6, 7, 8, 9], [4, 3]], pad_id=model.tokenizer.pad_token_id, device=model.device)
    mask = torch.tensor([[False, True, False, True, True], [False, False, False, True, False]])
    whole = model.hf(**batch.inputs).logits
    found = logits_at(model, mask, **batch.inputs)
    assert torch.allclose(found, whole[mask], atol=1e-5)
    targets = torch.tensor([1, 2, 3, 4])
    expected = whole.log_softmax(-1)[mask][range(4), targets]
    assert torch.allclose(log_probs(found, targets), expected, atol=1e-5)
    assert torch.equal(model.hf(**batch.inputs).logits, whole)  # nothing is left behind


def test_rows_are_summed_apart():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    assert row_sums(mask, torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 0.0, 4.0]


def test_half_precision_logits_are_scored_in_float32():
    logits = (4 * torch.randn(70, 500, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    targets = torch.arange(70)
    expected = logits.double().log_softmax(1)[range(70), targets]
    assert torch.allclose(log_probs(logits, targets).double(), expected, atol=1e-5)
