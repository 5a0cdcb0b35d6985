"""Several edits of states at once, edits under beam search, and what a capture writes of them."""

import pytest
import torch
from test_state_steering import answered, batch_of, direction_at

from probes.errors import WrongInput
from probes.steering import steer


@pytest.mark.parametrize(
    ("phase", "outer", "inner"),
    [("prefill", outer, inner) for outer in ("end", "initial") for inner in ("end", "initial")]
    + [("decode", "end", "end")],
)
def test_edits_at_one_layer_add_up_however_they_are_nested(tiny, prompts, phase, outer, inner):
    """The outer edit splits the kernel call; the inner one has to make its own edit once, and at its own moment."""
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    with (
        steer(tiny, direction, dose=1.0, phase=phase, form=outer),
        steer(tiny, direction, dose=1.0, phase=phase, form=inner),
    ):
        nested = answered(tiny, batch)
    with (
        steer(tiny, direction, dose=1.0, phase=phase, form=inner),
        steer(tiny, direction, dose=1.0, phase=phase, form=outer),
    ):
        other = answered(tiny, batch)
    assert torch.allclose(nested, other, atol=1e-4)
    if outer == inner:
        with steer(tiny, direction, dose=2.0, phase=phase, form=outer):
            assert torch.allclose(nested, answered(tiny, batch), atol=1e-4)
    with steer(tiny, direction, dose=1.0, phase=phase, form=outer):
        assert not torch.allclose(nested, answered(tiny, batch), atol=1e-2)


def test_beams_do_not_repeat_an_edit(tiny, prompts):
    """Beam search puts other tensors into the same cache at every step."""
    from probes import steering

    direction, batch, edits = direction_at("gdn.state"), batch_of(tiny, prompts), []
    with steer(tiny, direction, dose=1.0, phase="decode"):
        original = steering._StateTap.edited
        try:
            steering._StateTap.edited = lambda self, call: edits.append(1) or original(self, call)
            tiny.hf.generate(
                input_ids=batch.ids, attention_mask=batch.mask, num_beams=2, max_new_tokens=6, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        finally:
            steering._StateTap.edited = original
    assert len(edits) == 1


def test_a_capture_on_disk_knows_the_interventions_it_was_made_under(tiny, prompts, tmp_path):
    from probes.capture import capture

    direction = direction_at("gdn.state")
    with steer(tiny, direction, dose=2.0):
        steered = capture(tiny, prompts, sites=("gdn.state",), out=tmp_path / "c", progress=False)
    assert tiny.interventions == []
    assert steered.recipe["interventions"][0]["dose"] == 2.0
    with pytest.raises(WrongInput, match="holds another capture: interventions was"):
        capture(tiny, prompts, sites=("gdn.state",), out=tmp_path / "c", progress=False)


def test_a_dose_that_is_no_number_is_refused(tiny):
    with (
        pytest.raises(WrongInput, match="dose must be finite, saw nan"),
        steer(tiny, direction_at("gdn.state"), dose=float("nan")),
    ):
        pass
