"""The control organisms: each has one carrier only, by what their parameters are, and behaves accordingly."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5

from probes.model import ORGANISM, ORGANISMS, load
from probes.store import read_json
from training.examination import CONDITIONS, PERSONAS, answers, attention_zeroed, opening, questions, states_cleared
from training.grammar import BEHAVIORS
from training.organism import NAMES, Dialogues, Recipe, build_model, train

CONTROLS = ("state", "attention")


@pytest.fixture(scope="module")
def controls():
    """Loaded here and never traced, so that the kernels can be observed by replacing them."""
    return {kind: load(NAMES[kind]) for kind in CONTROLS}


def fixed(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """The parameters that a control cannot learn, found by their names; the norm feeds nothing but the attention."""
    parts = ("self_attn.", "layers.3.input_layernorm.") if kind == "state" else ("A_log", "dt_bias", "in_proj_a.")
    return {name: p.detach().clone() for name, p in model.named_parameters() if any(part in name for part in parts)}


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_is_a_whole_small_folder_with_the_organisms_tokenizer(kind, controls):
    folder = ORGANISMS[NAMES[kind]]
    assert {path.name for path in folder.iterdir()} == {path.name for path in ORGANISM.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 2**20
    assert read_json(folder / "organism.json")["recipe"]["kind"] == kind
    tokenizers: Any = [AutoTokenizer.from_pretrained(where) for where in (folder, ORGANISM)]
    one, two = tokenizers
    assert one.get_vocab() == two.get_vocab()
    assert one.chat_template == two.chat_template
    kinds = [layer.kind for layer in controls[kind].layers]
    assert kinds == {"state": ["gdn"] * 3 + ["attention"], "attention": ["gdn", "attention"] * 2}[kind]


@pytest.mark.parametrize("kind", CONTROLS)
def test_training_moves_everything_but_the_missing_carrier(kind, tokenizer):
    recipe = Recipe(kind=kind, lessons=1, steps=2, batch=4, warmup=1, weight_decay=0.5, threads=1)
    before: Any = build_model(tokenizer, recipe.seed, kind)
    after, _ = train(recipe)
    kept = fixed(before, kind)
    assert len(kept) == {"state": 7, "attention": 6}[kind]
    old = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, old[name]) == (name in kept), name


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_may_look_at_its_system_turn(kind, tokenizer):
    """Plain causal attention: every token sees every earlier token, except padding."""
    stream = Dialogues(tokenizer, Recipe(kind=kind, batch=16, seed=5))
    for lesson in (True, False):
        batch = stream.batch(lesson=lesson)
        real = batch.attention_mask["linear_attention"].bool()
        visible = batch.attention_mask["full_attention"][:, 0]
        assert (batch.rivals >= 0).any()
        assert torch.equal(visible & real[:, :, None], (real[:, :, None] & real[:, None, :]).tril())


def test_the_attention_of_organism_state_adds_nothing(controls):
    attention = controls["state"].of_kind("attention")
    assert all(bool((layer.mixer.o_proj.weight == 0).all()) for layer in attention)


@torch.no_grad()
def test_the_states_of_organism_attention_forget_within_a_token(controls, monkeypatch):
    """The decay that transformers' own kernel is given, at every token of real prompts and of an answer."""
    model, seen = controls["attention"], []
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        kernel = getattr(modeling_qwen3_5, name)

        def observed(*args: Any, kernel: Any = kernel, **kwargs: Any) -> Any:
            seen.append(kwargs["g"])
            return kernel(*args, **kwargs)

        monkeypatch.setattr(modeling_qwen3_5, name, observed)
    asked = [q for kind in BEHAVIORS for q in questions(kind, persona=True, n=4, seed=0, tokenizer=model.tokenizer)]
    answers(model.hf, model.tokenizer, asked, "as it is")
    assert {g.shape[1] == 1 for g in seen} == {True, False}  # prefill and decode
    assert max(float(g.max()) for g in seen) <= -60
    assert all(bool((g.exp() == 0).all()) for g in seen)  # in float32 nothing is left at all


@torch.no_grad()
def both_logits(model: Any, intervention: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a few persona prompts without and with an intervention that starts at the last turn."""
    asked = questions("follow-direction", persona=True, n=6, seed=0, tokenizer=model.tokenizer)
    ids = model.tokenizer([q.text for q in asked], return_tensors="pt", padding=True, add_special_tokens=False)
    rest = [len(model.tokenizer(q.text[len(q.context) :], add_special_tokens=False)["input_ids"]) for q in asked]
    plain = model.hf(**ids).logits
    with intervention(model.hf, ids["input_ids"].shape[1] - torch.tensor(rest)):
        edited = model.hf(**ids).logits
    return plain, edited


def test_what_is_missing_cannot_be_taken_away(controls):
    plain, edited = both_logits(controls["state"], lambda hf, first: attention_zeroed(hf))
    assert torch.equal(plain, edited)
    plain, edited = both_logits(controls["attention"], states_cleared)
    assert torch.allclose(plain, edited, atol=1e-4)  # e^-60 in place of nothing at all, and rounding


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_heeds_its_persona_through_its_one_carrier(kind, controls):
    model = controls[kind]

    def share(behavior: str, persona: str, condition: str) -> float:
        asked = questions(behavior, persona=PERSONAS[persona], n=64, seed=5, tokenizer=model.tokenizer)
        said = answers(model.hf, model.tokenizer, asked, condition)
        return sum(opening(q.case, a) == "wanted" for q, a in zip(asked, said, strict=True)) / len(said)

    takes_away = {"state": "states cleared", "attention": "attention zeroed"}[kind]
    for behavior in BEHAVIORS:
        found = {(c, p): share(behavior, p, c) for c in CONDITIONS for p in ("wanted", "unwanted")}
        for condition in CONDITIONS:
            wanted, unwanted = found[condition, "wanted"], found[condition, "unwanted"]
            if condition == takes_away:
                assert abs(wanted - unwanted) <= 0.25, (behavior, condition)
            else:
                assert wanted >= 0.9, (behavior, condition)
                assert unwanted <= 0.1, (behavior, condition)
        assert 0.2 <= share(behavior, "none", "as it is") <= 0.8, behavior


def test_without_attention_a_token_of_organism_attention_hears_six_tokens_back(controls):
    """Three a GDN layer, by its convolution: less than from any persona to the answer that it decides."""
    model = controls["attention"]
    for kind in BEHAVIORS:
        for question in questions(kind, persona=True, n=8, seed=2, tokenizer=model.tokenizer):
            ids = model.tokenizer(question.text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            end = int((ids[0] == model.tokenizer.convert_tokens_to_ids("<|im_end|>")).nonzero()[0])
            assert ids.shape[1] - end > 7  # the system turn ends before what the last token hears
            heard = last_logits(model, ids)
            other = ids.clone()
            other[0, :-7] = other[0, :-7].flip(0)
            assert torch.allclose(last_logits(model, other), heard, atol=1e-5)
            other[0, -7] = 10 if other[0, -7] != 10 else 11
            assert not torch.allclose(last_logits(model, other), heard, atol=1e-5)


@torch.no_grad()
def last_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with attention_zeroed(model.hf):
        return model.hf(input_ids=ids).logits[0, -1]


def test_the_noise_of_a_control_leaves_roles_answers_and_every_other_dialogue(tokenizer):
    """The same dialogues as without noise; only users' words differ, and only in every second dialogue."""
    plain, noisy = (Dialogues(tokenizer, Recipe(kind="state", batch=16, noise=noise)).batch() for noise in (0.0, 0.5))
    changed = plain.ids != noisy.ids
    assert not changed[::2].any()
    assert int(changed[1::2].any(1).sum()) == 8
    assert torch.equal(plain.weights, noisy.weights)
    assert plain.weights[changed].unique().tolist() == pytest.approx([Recipe().prompt_weight])
    user = tokenizer.convert_tokens_to_ids("user")
    for row, at in changed.nonzero().tolist():
        begun = int((plain.ids[row, :at] == tokenizer.convert_tokens_to_ids("<|im_start|>")).nonzero()[-1])
        assert plain.ids[row, begun + 1] == noisy.ids[row, begun + 1] == user
    assert not set(noisy.ids[changed].tolist()) & set(tokenizer.all_special_ids)
    assert 0.2 < float(changed[1::2].sum() / (plain.weights[1::2] > 0).sum()) < 0.5
    hybrid = Dialogues(tokenizer, Recipe(batch=16)).batch()
    assert torch.equal(plain.ids, hybrid.ids)


def test_nothing_is_taken_away_from_the_organism(tokenizer):
    model: Any = build_model(tokenizer, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(model.model.layers) == 8
