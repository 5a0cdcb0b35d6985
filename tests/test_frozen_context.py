"""Frozen contexts against full forward passes of transformers without a cache, and against finite differences."""

import copy
from typing import Any

import pytest
import torch
from conftest import wake
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import MistralConfig, MistralForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from probes.behaviors import read_behavior
from probes.errors import WrongInput
from probes.model import HybridModel
from training.data import Segment, behavior_segments
from training.frozen_context import prefill, score, stacked

# Either side of the convolution's kernel (4), of the padding's step (32) and of the scan's chunk (64), and none at all.
CONTEXTS = (7, 0, 1, 2, 3, 4, 31, 32, 33, 70)
DECISIONS = (5, 9, 2, 8, 3, 2, 12, 7, 2, 17)


def drawn(n, seed):
    """Random tokens of the grammar's vocabulary."""
    return tuple(torch.randint(4, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def segment(context, decision, scored=None, seed=0):
    """So many random tokens; all of the decision is scored beyond its first token, unless told."""
    if scored is None:
        scored = (False, *[True] * (decision - 1))
    ids = drawn(context + decision, seed)
    return Segment(
        id=f"{context}+{decision}", kind="general", group="g", context=ids[:context], decision=ids[context:],
        scored=scored,
    )  # fmt: skip


def mixed():
    parts = [segment(c, d, seed=i) for i, (c, d) in enumerate(zip(CONTEXTS, DECISIONS, strict=True))]
    return [*parts, segment(12, 6, scored=(False, False, True, False, True, False), seed=99)]


def frozen(model, parts, **options):
    return score(model, parts, prefill(model, [part.context for part in parts]), **options)


@torch.no_grad()
def alone(model, part):
    """From the logits of one row without padding, cache or positions."""
    ids = torch.tensor([[*part.context, *part.decision]])
    table = model.hf(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    start = len(part.context)
    return float(sum(table[start + i - 1, part.decision[i]] for i, counts in enumerate(part.scored) if counts))


def twin(model):
    """A copy whose weights and mode may be changed."""
    return HybridModel(copy.deepcopy(model.hf), model.tokenizer, name=model.name)


def gradients(model, scores):
    named = dict(model.hf.named_parameters())
    return dict(zip(named, torch.autograd.grad(scores.sum(), list(named.values())), strict=True))


@pytest.fixture(params=["tiny", "llama"])
def model(request) -> HybridModel:
    return request.getfixturevalue(request.param)


def test_scores_are_those_of_a_full_forward_pass(model):
    """Float32: 8e-6 nats were measured at most, in sums of up to 90 nats."""
    parts = mixed()
    expected = torch.tensor([alone(model, part) for part in parts])
    assert (frozen(model, parts) - expected).abs().max() < 1e-4
    assert (score(model, parts, None) - expected).abs().max() < 1e-4


def test_inside_a_multimodal_wrapper(tiny):
    """The checkpoints of the hub are of this kind, with positions for images of their own."""
    torch.manual_seed(3)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=tiny.config.to_dict(), vision_config=vision)
    model = HybridModel(wake(Qwen3_5ForConditionalGeneration(config)), tiny.tokenizer, name="multimodal")
    parts = mixed()
    expected = torch.tensor([alone(model, part) for part in parts])
    assert (frozen(model, parts) - expected).abs().max() < 1e-4


def test_the_context_is_what_makes_the_scores(tiny):
    """The tolerance above would mean nothing if contexts hardly mattered."""
    parts = [part for part in mixed() if part.context]
    none = prefill(tiny, [()] * len(parts))
    assert (score(tiny, parts, none) - frozen(tiny, parts)).abs().min() > 1e-2


def test_contexts_that_are_all_empty(model):
    parts = [segment(0, 2), segment(0, 9, seed=1)]
    expected = torch.tensor([alone(model, part) for part in parts])
    assert (frozen(model, parts) - expected).abs().max() < 1e-4


def test_neither_order_nor_neighbours_matter(model):
    """Float32 kernels may add in another order for other shapes."""
    parts = mixed()
    together = frozen(model, parts)
    assert (frozen(model, parts[::-1]).flip(0) - together).abs().max() < 1e-4
    for part, value in zip(parts, together, strict=True):
        assert (frozen(model, [part])[0] - value).abs() < 1e-4


def test_a_context_leaves_the_same_behind_whatever_it_is_padded_with(tiny):
    """Float32: 9e-6 was measured, of values up to 5."""
    contexts = [part.context for part in mixed()]
    together = prefill(tiny, contexts)
    for prefix, context in zip(together, contexts, strict=True):
        (own,) = prefill(tiny, [context], batch_tokens=1)
        assert own.tokens == prefix.tokens == len(context)
        for name in ("keys", "values", "states", "windows"):
            here, there = getattr(prefix, name), getattr(own, name)
            assert here.keys() == there.keys()
            for i, tensor in here.items():
                assert tensor.shape == there[i].shape
                assert tensor.dtype == there[i].dtype
                assert torch.allclose(tensor, there[i], rtol=0, atol=1e-4)


def test_batches_of_contexts_come_back_in_order(tiny):
    contexts = [part.context for part in mixed()]
    one, many = prefill(tiny, contexts), prefill(tiny, contexts, batch_tokens=40)
    assert [prefix.tokens for prefix in many] == [prefix.tokens for prefix in one] == [*CONTEXTS, 12]
    parts = mixed()
    assert torch.allclose(score(tiny, parts, one), score(tiny, parts, many), rtol=0, atol=1e-4)
    assert prefill(tiny, []) == []


def test_the_size_of_a_prefix(tiny):
    (prefix,) = prefill(tiny, [drawn(10, 0)])
    keys_and_values = 2 * 2 * (2 * 10 * 32)  # 2 attention layers, 2 heads of 32
    states, windows = 6 * (4 * 16 * 24), 6 * (2 * 2 * 16 + 4 * 24) * 4
    assert prefix.bytes == 4 * (keys_and_values + states + windows)


def test_a_prefix_serves_any_number_of_steps(model):
    parts = mixed()
    prefixes = prefill(model, [part.context for part in parts])
    held = copy.deepcopy(prefixes)
    first = score(model, parts, prefixes)
    wanted = gradients(model, first)
    for _ in range(2):
        again = score(model, parts, prefixes)
        assert torch.equal(again, first)
        assert all(torch.equal(g, wanted[name]) for name, g in gradients(model, again).items())
    for prefix, before in zip(prefixes, held, strict=True):
        for name in ("keys", "values", "states", "windows"):
            assert all(torch.equal(t, getattr(before, name)[i]) for i, t in getattr(prefix, name).items())


def test_a_stacked_cache_serves_any_number_of_steps(tiny):
    """The cache itself is only read, by the path for one token too."""
    cache, mask = stacked(tiny, prefill(tiny, [drawn(9, 0)]))
    for width in (1, 3):
        ids = torch.tensor([drawn(width, 1)])
        seen = torch.cat([mask, torch.ones_like(ids)], 1)
        places = 9 + torch.arange(width)[None]
        runs = [
            tiny.hf(input_ids=ids, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True)
            for _ in range(2)
        ]
        runs[0].logits.sum().backward()
        tiny.hf.zero_grad()
        assert torch.equal(runs[0].logits, runs[1].logits)
        whole = tiny.hf(input_ids=torch.tensor([[*drawn(9, 0), *ids[0].tolist()]]), use_cache=False).logits[:, 9:]
        assert torch.allclose(runs[0].logits, whole, rtol=0, atol=1e-4)


def test_a_prefix_is_of_the_weights_that_computed_it(tiny):
    model, parts = twin(tiny), mixed()
    prefixes = prefill(model, [part.context for part in parts])
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.get_parameter("down_proj.weight").mul_(1.1)
    expected = torch.tensor([alone(model, part) for part in parts])
    long = torch.tensor([len(part.context) > 3 for part in parts])
    assert (score(model, parts, prefixes) - expected)[long].abs().min() > 1e-3
    assert (frozen(model, parts) - expected).abs().max() < 1e-4


class Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64: transformers' kernel and norms cast on their own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


@pytest.fixture(scope="module")
def exact(tiny):
    model = twin(tiny)
    model.hf.double()
    return model


def finite_difference(parameter, direction, value, step=1e-5):
    """Slope of `value()` along a direction of one parameter, by central differences; leaves the parameter as it was."""
    kept, found = parameter.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.copy_(kept + sign * step * direction)
            found.append(value().sum().item())
            parameter.copy_(kept)
    return (found[0] - found[1]) / (2 * step)


LEARNED = (
    "layers.3.self_attn.q_proj.weight", "layers.3.self_attn.k_proj.weight", "layers.3.self_attn.v_proj.weight",
    "layers.1.linear_attn.in_proj_qkv.weight", "layers.4.linear_attn.A_log", "layers.0.linear_attn.conv1d.weight",
    "embed_tokens.weight",
)  # fmt: skip


@pytest.mark.parametrize("context", ["frozen", "full"])
def test_gradients_are_those_of_finite_differences(exact, context):
    """Frozen: of the function whose prefix is held. Float64, steps of 1e-5 along unit directions: 3e-7 at most."""
    parts = [segment(21, 7), segment(0, 3, seed=1), segment(2, 5, seed=2), segment(66, 4, seed=3)]
    random = torch.Generator().manual_seed(0)
    with Float64():
        prefixes = prefill(exact, [part.context for part in parts])
        assert prefixes[0].states[0].dtype == torch.float64
        held = prefixes if context == "frozen" else None
        found = gradients(exact, score(exact, parts, held))
        other = gradients(exact, score(exact, parts, prefixes if context == "full" else None))
        for name in LEARNED:
            parameter = exact.hf.get_parameter(f"model.{name}")
            direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            direction /= direction.norm()
            slope = finite_difference(parameter, direction, lambda: score(exact, parts, held))
            wanted, wrong = ((g[f"model.{name}"] * direction).sum().item() for g in (found, other))
            assert slope == pytest.approx(wanted, rel=1e-5)
            assert abs(slope - wrong) > 1e-2 * abs(slope)


def test_no_gradient_reaches_the_context(llama):
    """Untied embeddings: only tokens of decisions learn, and not the last ones, which predict nothing."""
    parts = [segment(20, 6, seed=5), segment(9, 8, seed=6)]
    learned = gradients(llama, frozen(llama, parts))["model.embed_tokens.weight"].abs().sum(1).nonzero()[:, 0]
    assert set(learned.tolist()) == {token for part in parts for token in part.decision[:-1]}


def test_ranks_of_gradients(exact):
    """A token adds one outer product to the gradient of a projection. Under a frozen context only the decision's tokens
    do, all but the last, which predicts nothing; under a full one every token whose keys and values are read later."""
    part = segment(40, 12)
    names = [
        *(f"model.layers.3.self_attn.{kind}_proj.weight" for kind in "qkv"),
        "model.layers.4.linear_attn.in_proj_qkv.weight",
    ]
    with Float64():
        narrow, wide = gradients(exact, frozen(exact, [part])), gradients(exact, score(exact, [part], None))
    for name in names:
        assert int(torch.linalg.matrix_rank(narrow[name], rtol=1e-9)) == 11, name
        assert int(torch.linalg.matrix_rank(wide[name], rtol=1e-9)) > 40, name


@pytest.mark.parametrize("behavior", ["sentiment", "hedging", "follow-direction"])
def test_the_gradient_of_queries_is_nearer_to_the_full_one(organism, behavior):
    """Cosines to it at layer 3: q .57, k .34, v .47 (sentiment); .97, .88, .64 (hedging); .95, .17, .07. Layer 7 is the
    last: nothing reads what its queries of the context make, so there the two gradients of q are the same."""
    parts = behavior_segments(organism, read_behavior(behavior).take(16))
    narrow, wide = (gradients(organism, value) for value in (frozen(organism, parts), score(organism, parts, None)))

    def cosine(layer, kind):
        name = f"model.layers.{layer}.self_attn.{kind}_proj.weight"
        return torch.cosine_similarity(narrow[name].flatten(), wide[name].flatten(), dim=0).item()

    for layer in (3, 7):
        assert cosine(layer, "q") > max(cosine(layer, "k"), cosine(layer, "v")) + 0.05
    assert cosine(7, "q") > 1 - 1e-5  # float32


def saved_bytes(model, work):
    """Bytes that autograd keeps for `backward`, parameters apart; each storage once."""
    seen = {p.untyped_storage().data_ptr() for p in model.hf.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("context", ["frozen", "full"])
def test_checkpointing_changes_memory_and_nothing_else(model, context):
    parts = mixed()
    held = prefill(model, [part.context for part in parts]) if context == "frozen" else None
    plain, again = (score(model, parts, held, checkpointing=on) for on in (False, True))
    assert torch.equal(plain, again)
    wanted, found = gradients(model, plain), gradients(model, again)
    assert all(torch.equal(found[name], g) for name, g in wanted.items())
    most, least = (
        saved_bytes(model, lambda on=on: score(model, parts, held, checkpointing=on)) for on in (False, True)
    )
    assert least < most / 5  # 10 to 70 times less was measured
    assert not any("forward" in layer.block.__dict__ for layer in model.layers)


def test_checkpointing_leaves_layers_as_they_were(tiny):
    """Also when it breaks, and where a layer's forward was replaced by somebody else."""
    model, parts = twin(tiny), [segment(9, 4)]
    prefixes, calls = prefill(model, [parts[0].context]), []
    block: Any = model.layers[2].block
    forward = block.forward

    def own(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    def broken(*_):
        raise RuntimeError("broken on purpose")

    block.forward = own
    score(model, parts, prefixes, checkpointing=True)
    assert len(calls) == 1
    handle = model.layers[5].block.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        score(model, parts, prefixes, checkpointing=True)
    handle.remove()
    assert block.forward is own
    assert [layer.index for layer in model.layers if "forward" in layer.block.__dict__] == [2]
    assert torch.equal(score(model, parts, prefixes), score(tiny, parts, prefixes))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning")
def test_transformers_own_checkpointing_drops_no_context(tiny):
    """In training its layers drop the cache: a context is prefilled without it, and a step is refused."""
    model, parts = twin(tiny), mixed()
    contexts = [part.context for part in parts]
    expected = frozen(tiny, parts)
    model.hf.gradient_checkpointing_enable()
    model.hf.train()
    prefixes = prefill(model, contexts)
    assert model.hf.training
    assert all(module.training for module in model.hf.modules())
    for checkpointing in (False, True):
        with pytest.raises(WrongInput, match=r"transformers' own gradient checkpointing, which drops a frozen context"):
            score(model, parts, prefixes, checkpointing=checkpointing)
    assert torch.equal(score(model, parts, None), score(tiny, parts, None))
    model.hf.eval()
    assert torch.equal(score(model, parts, prefixes), expected)
    model.hf.gradient_checkpointing_disable()
    model.hf.train()
    assert torch.equal(score(model, parts, prefixes), expected)
    wanted = gradients(tiny, expected)
    found = gradients(model, score(model, parts, prefixes, checkpointing=True))
    assert all(torch.equal(found[name], g) for name, g in wanted.items())


def test_prefill_puts_the_mode_back_when_it_breaks(tiny):
    model = twin(tiny)
    model.hf.train()
    with pytest.raises(IndexError):
        prefill(model, [[10**6]])
    assert model.hf.training


def test_bfloat16(tiny):
    """Keys, values and windows are in the model's dtype, states in float32. The full pass in bfloat16
    is as far from the one in float32 (0.14 nats, of 59)."""
    model, parts = twin(tiny), mixed()
    model.hf.to(torch.bfloat16)
    prefixes = prefill(model, [part.context for part in parts])
    for prefix in prefixes:
        assert {t.dtype for part in (prefix.keys, prefix.values, prefix.windows) for t in part.values()} == {
            torch.bfloat16
        }
        assert {t.dtype for t in prefix.states.values()} == {torch.float32}
    found, exact = score(model, parts, prefixes), torch.tensor([alone(tiny, part) for part in parts])
    rounding = max(abs(alone(model, part) - value) for part, value in zip(parts, exact.tolist(), strict=True))
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 2 * rounding
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(model, found).values())


@pytest.fixture(scope="module")
def mistral(tokenizer):
    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=192, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=40, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return HybridModel(MistralForCausalLM(config), tokenizer, name="mistral")


def test_a_model_that_forgets_keys_is_refused(mistral):
    with pytest.raises(WrongInput, match="layer 0 keeps the keys of 39 of 64 tokens"):
        prefill(mistral, [drawn(50, 0)])


def test_a_window_that_holds_the_context_still_slides(mistral):
    part = segment(30, 25)
    assert abs(frozen(mistral, [part]).item() - alone(mistral, part)) < 1e-4
