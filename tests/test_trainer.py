"""The trainer: it refuses without a verdict, does what its options say, and survives being killed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from probes.behaviors import Behavior, read_behavior
from probes.criteria import Criterion, Verdict
from probes.damage import DATA, GENERAL
from probes.directions import Direction, mean_difference
from probes.errors import WrongInput
from probes.model import HybridModel, load
from probes.pairs import contrast
from probes.propensity import prepare, propensity
from training.admission import checked_verdict, recipe
from training.checkpoints import checkpoints
from training.config import TrainConfig
from training.optimizers import WRITERS, trained_parameters
from training.result import open_training
from training.trainer import Trainer, train

SHORT = TrainConfig(
    examples=20, steps=8, batch=4, questions=4, max_new_tokens=9, evaluate_every=8, checkpoint_every=2, warmup=2
)


@pytest.fixture
def model() -> HybridModel:
    return load("organism")


@pytest.fixture(scope="module")
def behavior() -> Behavior:
    return read_behavior("follow-direction")


def weights(model: HybridModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the verdict ---------------------------------------------------------------------------------------------------


def verdict_for(model: HybridModel, about: Behavior, **changed: Any) -> Verdict:
    told = {"behavior": about.name, "behavior_hash": about.hash, "weights_hash": model.weights_hash,
            "config": {"direction": "mean", "shuffle_labels": False}}  # fmt: skip
    outcome = changed.pop("verdict", "PASS")
    status = "pass" if outcome == "PASS" else "fail"
    criterion = Criterion(number=3, name="effect", status=status, observed=1.0)
    return Verdict(
        verdict=outcome, sentence="it does", behavior=about.name, model=model.name, site="resid", layer=4, dose=0.5,
        phase="prefill", criteria=(criterion,), controls={}, phases=(), cost={}, evidence={}, recipe=told | changed,
    )  # fmt: skip


def test_nothing_starts_without_a_pass_for_this_behaviour_and_model(model: HybridModel, behavior: Behavior) -> None:
    before = weights(model)
    cases: list[tuple[Verdict | None, str]] = [
        (None, "no verdict for 'follow-direction'"),
        (verdict_for(model, behavior, verdict="FAIL"), r"is FAIL: 3 effect \(fail\)"),
        (verdict_for(model, behavior, verdict="INCONCLUSIVE"), "is INCONCLUSIVE"),
        (verdict_for(model, behavior, behavior="sentiment"), "about other behaviour: sentiment"),
        (verdict_for(model, behavior, behavior_hash="0" * 16), "about other behaviour: follow-direction 0000"),
        (verdict_for(model, behavior, weights_hash="0" * 16), "about other weights: 0000"),
        (verdict_for(model, behavior, config={"direction": "random"}), "a direction that means nothing"),
        (verdict_for(model, behavior, config={"shuffle_labels": True}), "a direction that means nothing"),
    ]
    for verdict, message in cases:
        with pytest.raises(WrongInput, match=message):
            train(model, behavior, SHORT, verdict=verdict, progress=False)
    assert same(weights(model), before)
    effect = Criterion(number=3, name="effect", status="fail", observed=1.0)
    for criteria, found in (((), "none at all"), ((effect,), r"3 effect \(fail\)")):
        claims = replace(verdict_for(model, behavior), criteria=criteria)
        with pytest.raises(WrongInput, match=f"says PASS, which its criteria do not: {found}"):
            checked_verdict(claims, behavior, model)
    checked_verdict(verdict_for(model, behavior), behavior, model)
    checked_verdict(None, behavior, model, unverified=True)


def test_what_it_started_on_is_recorded(model: HybridModel, behavior: Behavior) -> None:
    config = replace(SHORT, steps=1, evaluate_every=1)
    done = train(model, behavior, config, verdict=verdict_for(model, behavior), progress=False)
    assert done.verified
    assert done.recipe["verdict"]["recipe"]["weights_hash"] == done.weights_hash != done.trained_hash
    assert not train(model, behavior, config, unverified=True, progress=False).verified
    failed = verdict_for(model, behavior, verdict="FAIL")
    assert not train(model, behavior, config, verdict=failed, unverified=True, progress=False).verified
    assert recipe(model, behavior, config, None, unverified=True)["verdict"] is None


FOUR = replace(SHORT, steps=4, evaluate_every=4, batch=8)


@pytest.fixture(scope="module")
def plain(behavior: Behavior) -> dict[str, torch.Tensor]:
    """Weights after four steps by the defaults."""
    model = load("organism")
    train(model, behavior, FOUR, unverified=True, progress=False)
    return weights(model)


# -- what it does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "folder"), [("model", True), ("checkpoints", False), ("metrics.jsonl", True)])
def test_what_lies_in_the_way_is_refused_before_anything_is_done(
    model: HybridModel, behavior: Behavior, tmp_path: Path, place: str, folder: bool
) -> None:
    (tmp_path / place).mkdir() if folder else (tmp_path / place).write_text("mine")
    with pytest.raises(WrongInput, match=rf"{place}' is not what a run writes there"):
        train(model, behavior, SHORT, unverified=True, out=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [place]


def test_the_data_are_as_large_as_asked_and_the_last_step_is_evaluated(model: HybridModel, behavior: Behavior) -> None:
    config = replace(SHORT, steps=5, evaluate_every=2, batch=8, general_share=0.3)
    done = train(model, behavior, config, unverified=True, progress=False)
    assert done.mix["general"]["segments"] == 12  # 5 x 8 x 0.3
    assert done.mix["behavior"]["segments"] == 20
    assert [e.step for e in done.evaluations] == [0, 2, 4, 5]


def test_a_trainer_runs_once(model: HybridModel, behavior: Behavior) -> None:
    trainer = Trainer(model, behavior, replace(SHORT, steps=1, evaluate_every=1), unverified=True, progress=False)
    trainer.run()
    with pytest.raises(RuntimeError, match="runs once"):
        trainer.run()


def test_a_short_run_moves_the_behaviour_and_leaves_a_model_folder(
    model: HybridModel, behavior: Behavior, tmp_path: Path
) -> None:
    flags = {name: p.requires_grad for name, p in model.hf.named_parameters()}
    before, rows = weights(model), []
    config = replace(SHORT, steps=16, batch=8, lr=5e-4, evaluate_every=8, checkpoint_every=4)
    prepared = prepare(model, behavior.take(24))
    leaned = propensity(model, prepared).estimate().value
    done = train(model, behavior, config, unverified=True, out=tmp_path, watch=rows.append, progress=False)
    assert propensity(model, prepared).estimate().value > leaned + 1
    assert done.after.propensity.value > done.before.propensity.value + 1
    assert [e.step for e in done.evaluations] == [0, 8, 16]
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not any(word in name for word in WRITERS)}
    assert {name: p.requires_grad for name, p in model.hf.named_parameters()} == flags
    assert all(p.grad is None for p in model.hf.parameters())
    # what is on disk
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [dict(row) for row in rows] == [dict(row) for row in done.steps]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert {"loss", "behavior_loss", "general_loss", "lr", "grad_norm", "limiter", "update_ratio"} <= rows[0].keys()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000012", "step-000016"]
    again = load(tmp_path / "model")
    assert again.weights_hash == model.weights_hash == done.trained_hash
    done.save(tmp_path / "training.json")
    opened = open_training(tmp_path)
    assert opened.sentence == done.sentence
    assert opened.evaluations == done.evaluations
    assert "wanted" in opened.table()


def test_tensorboard_gets_the_rows_where_it_is_installed(
    model: HybridModel, behavior: Behavior, tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = train(model, behavior, replace(SHORT, steps=3), unverified=True, out=tmp_path, progress=False)
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([row["loss"] for row in done.steps])


@pytest.mark.parametrize(
    "changed",
    [
        {"general_share": 0.0}, {"general_share": 1.0}, {"context": "full"}, {"contrast": 1.0},
        {"optimizer": "apollo-mini"}, {"optimizer": "adamw"}, {"optimizer": "sgd", "lr": 0.01}, {"refill": 2},
        {"clip": 0.01}, {"rank": 8}, {"seed": 1}, {"parameters": ("all",)}, {"parameters": ("mlp",)},
        {"weight_decay": 0.5}, {"warmup": 0}, {"refresh": 2},
    ],
)  # fmt: skip
def test_every_option_changes_what_is_learned(
    model: HybridModel, behavior: Behavior, changed: dict[str, Any], plain: dict[str, torch.Tensor]
) -> None:
    done = train(model, behavior, replace(FOUR, **changed), unverified=True, progress=False)
    assert not same(weights(model), plain)
    assert all(math.isfinite(row["loss"]) for row in done.steps)
    if changed.get("general_share") == 0.0:
        assert done.mix["general"]["segments"] == 0
        assert "general_loss" not in done.steps[0]


def test_parts_of_a_batch_and_checkpointed_layers_learn_the_same(model: HybridModel, behavior: Behavior) -> None:
    others, config = load("organism"), replace(SHORT, steps=3, batch=8, evaluate_every=3)
    train(model, behavior, config, unverified=True, progress=False)
    train(others, behavior, replace(config, accumulate=4, checkpointing=True), unverified=True, progress=False)
    start = weights(load("organism"))
    for (name, one), other in zip(weights(model).items(), weights(others).values(), strict=True):
        assert (one - other).norm() <= 2e-3 * (one - start[name]).norm() + 1e-12, name  # sums in another order


def test_steps_in_backward_learn_the_same_and_hold_no_gradients(model: HybridModel, behavior: Behavior) -> None:
    twin, config = load("organism"), replace(SHORT, steps=3, clip=0.0, evaluate_every=3)
    held: list[int] = []

    def watch(_: Any) -> None:
        held.append(sum(p.grad is not None for p in twin.hf.parameters()))

    train(model, behavior, config, unverified=True, progress=False)
    done = train(twin, behavior, replace(config, in_backward=True), unverified=True, watch=watch, progress=False)
    assert same(weights(model), weights(twin))
    assert held == [0, 0, 0]
    assert "grad_norm" not in done.steps[0]
    assert done.steps[0]["limiter"] == 1.0


def test_steering_while_training_changes_what_has_to_be_learned(model: HybridModel, behavior: Behavior) -> None:
    direction = mean_difference(contrast(model, behavior.take(48), layers=[4])[4])
    config = replace(SHORT, steps=6, batch=8, lr=5e-4, evaluate_every=6)
    done = {}
    for dose in (0.0, 0.25):
        twin = load("organism")
        done[dose] = train(
            twin, behavior, replace(config, steer=dose), unverified=True, direction=direction, progress=False
        )
        assert not twin.interventions
    # with the direction added there is less left to learn, and less is learned
    assert done[0.25].steps[0]["behavior_loss"] < done[0.0].steps[0]["behavior_loss"]
    assert done[0.25].after.propensity.value < done[0.0].after.propensity.value
    with pytest.raises(WrongInput, match=r"steer is 0\.5, but there is no direction"):
        train(model, behavior, replace(config, steer=0.5), unverified=True, progress=False)
    beyond = replace(direction, layer=77)
    with pytest.raises(WrongInput, match="77"):
        Trainer(model, behavior, replace(config, steer=0.5), unverified=True, direction=beyond)


def test_frozen_contexts_are_steered_as_full_ones_are(behavior: Behavior) -> None:
    direction = mean_difference(contrast(load("organism"), behavior.take(24), layers=[2])[2])
    first = []
    for context in ("frozen", "full"):
        config = replace(SHORT, steps=1, evaluate_every=1, context=context, steer=0.5)
        done = train(load("organism"), behavior, config, unverified=True, direction=direction, progress=False)
        first.append(done.steps[0]["loss"])
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    plain = train(load("organism"), behavior, replace(config, steer=0.0), unverified=True, progress=False)
    assert abs(plain.steps[0]["loss"] - first[0]) > 0.01 * first[0]


@pytest.mark.parametrize(
    ("where", "said"),
    [("weights", "the loss is nan"), ("gradient", r"the gradient of .*o_proj\.weight is not finite")],
)
@pytest.mark.parametrize("optimizer", ["apollo", "sgd"])
def test_what_is_not_finite_stops_the_run_and_says_where(
    model: HybridModel, behavior: Behavior, tmp_path: Path, where: str, said: str, optimizer: Any
) -> None:
    name, weight = next((name, p) for name, p in model.hf.named_parameters() if "o_proj" in name)

    def spoil(row: Mapping[str, Any]) -> None:
        if row["step"] == 4 and where == "weights":
            weight.data[0, 0] = math.nan
        if row["step"] == 4 and where == "gradient":
            weight.register_hook(lambda gradient: gradient * math.inf)

    config = replace(SHORT, steps=6, optimizer=optimizer, checkpoint_every=2, evaluate_every=6)
    others = {key: value for key, value in weights(model).items() if key != name}
    with pytest.raises(WrongInput, match=rf"step 5: {said}.* smaller learning rate .*{tmp_path.name}"):
        train(model, behavior, config, unverified=True, out=tmp_path, watch=spoil, progress=False)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000002", "step-000004"]
    saved = load_file(tmp_path / "checkpoints" / "step-000004" / "model.safetensors")
    now = weights(model)
    assert not all(torch.equal(now[key], value) for key, value in others.items())  # four steps were taken
    assert all(torch.equal(now[key], saved[key]) for key in others)  # and nothing of a fifth


def test_wrong_options_are_refused(model: HybridModel, behavior: Behavior, unchecked: None) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"general_share": 1.5}, "general_share must lie between 0 and 1, saw 1.5"),
        ({"contrast": math.inf}, "contrast must be at least 0 and be finite, saw inf"),
        ({"lr": 0.0}, "lr must lie between 0 and 1"), ({"batch": 0}, "batch must be at least 1"),
        ({"context": "warm"}, "unknown context 'warm'; allowed are frozen, full"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"), ({"batch": 2, "accumulate": 4}, "cannot be cut into 4"),
        ({"refill": 3, "checkpoint_every": 4}, "must fall on refills"),
        ({"refill": 2, "context": "full"}, "refill is for frozen contexts"),
        ({"optimizer": "adamw", "rank": 8}, "rank is for the optimizer apollo"),
        ({"contrast": 1.0, "general_share": 1.0}, "a contrast needs examples"),
        ({"in_backward": True}, "saw apollo, clip 1 and accumulate 1"),
        ({"in_backward": True, "clip": 0.0, "optimizer": "adamw"}, "need apollo or apollo-mini, .* saw adamw"),
        ({"parameters": ()}, "parameters must be all, auto or words"),
        ({"parameters": ("mlp", " ")}, "parameters must be all, auto or words"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(WrongInput, match=message):
            TrainConfig(**options)
    with pytest.raises(WrongInput, match="no parameter of organism has 'q_projj' in its name; there are"):
        trained_parameters(model, TrainConfig(parameters=("q_projj",)))
    assert len(trained_parameters(model, TrainConfig(context="full"))) == len(list(model.hf.parameters()))


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = TrainConfig(steps=100, warmup=10)
    rates = [config.lr_at(step, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 == max(rates)
    assert all(one > other for one, other in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(2.0 * 0.55)  # half of the way: the mean of peak and floor
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert TrainConfig(steps=8, warmup=10).lr_at(3, 1.0) == 1.0  # at most half of the run
    assert TrainConfig(steps=8, warmup=0).lr_at(0, 1.0) == 1.0


def test_defaults_go_by_the_model(model: HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainConfig().rank_for(model) == 32  # a quarter of a width of 128
    assert TrainConfig(rank=5).rank_for(model) == 5
    assert TrainConfig().lr_for(model) == 2e-4
    assert TrainConfig(lr=1e-5).lr_for(model) == 1e-5
    monkeypatch.setattr(type(model.config), "hidden_size", 4096, raising=False)
    monkeypatch.setitem(model.config.__dict__, "hidden_size", 4096)
    assert TrainConfig().rank_for(model) == 256


def test_losses_of_a_batch_in_parts_are_those_of_the_whole(model: HybridModel, behavior: Behavior) -> None:
    rows = []
    for accumulate in (1, 4):
        config = replace(SHORT, steps=1, batch=8, evaluate_every=1, accumulate=accumulate, contrast=1.0, lr=1e-6)
        rows.append(train(load("organism"), behavior, config, unverified=True, progress=False).steps[0])
    names = ("loss", "behavior_loss", "general_loss", "contrast_loss", "grad_norm")
    assert [rows[0][name] for name in names] == pytest.approx([rows[1][name] for name in names], rel=1e-4)
    # 8 a step, a quarter of them general: the loss is the mean over all, the contrast over those with a rival
    whole = (6 * (rows[0]["behavior_loss"] + rows[0]["contrast_loss"]) + 2 * rows[0]["general_loss"]) / 8
    assert rows[0]["loss"] == pytest.approx(whole, rel=1e-4)


# -- interruptions -------------------------------------------------------------------------------------------------


def _child(out: str, steps: int) -> None:
    torch.set_num_threads(1)
    config = replace(SHORT, steps=steps, evaluate_every=steps)
    train(load("organism"), read_behavior("follow-direction"), config, unverified=True, out=out, progress=False)


def start(out: Path, steps: int) -> Any:
    """A process of its own, from a server that has imported everything and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.trainer"])
    process = context.Process(target=_child, args=(str(out), steps))
    process.start()
    return process


def test_killed_at_ten_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    steps, whole, broken = 30, tmp_path / "whole", tmp_path / "broken"
    process = start(whole, steps)
    process.join()
    assert process.exitcode == 0
    rng, killed = random.Random(0), []
    for target in sorted(rng.sample(range(1, steps), 10)):
        process = start(broken, steps)
        while process.is_alive() and lines(broken) < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))  # in a step, or while a checkpoint is written
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed.append(lines(broken))
    process = start(broken, steps)
    process.join()
    assert process.exitcode == 0
    assert len(set(killed)) > 5, killed
    ends = [load_file(folder / "model" / "model.safetensors") for folder in (whole, broken)]
    assert same(*ends)
    rows = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (out / "metrics.jsonl").open()]
        for out in (whole, broken)
    ]
    assert rows[0] == rows[1]


def lines(out: Path) -> int:
    """Rows of metrics that a run has written."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_on_request(
    behavior: Behavior, tmp_path: Path
) -> None:
    config = replace(SHORT, steps=8, keep=3)
    whole, broken = load("organism"), load("organism")
    train(whole, behavior, config, unverified=True, out=tmp_path / "whole", progress=False)
    train(broken, behavior, config, unverified=True, out=tmp_path / "broken", progress=False)
    newest = checkpoints(tmp_path / "broken")[-1]
    damaged = newest / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(WrongInput, match=r"step-000008.*optimizer\.safetensors.*truncated.*previous.*step-000006"):
        train(load("organism"), behavior, config, unverified=True, out=tmp_path / "broken", progress=False)
    resumed = load("organism")
    train(resumed, behavior, config, unverified=True, out=tmp_path / "broken", previous=True, progress=False)
    assert same(weights(resumed), weights(whole))


def test_a_run_resumed_at_its_end_has_all_it_saw(behavior: Behavior, tmp_path: Path) -> None:
    config = replace(SHORT, steps=4)
    done = train(load("organism"), behavior, config, unverified=True, out=tmp_path, progress=False)
    (tmp_path / "metrics.jsonl").write_text("lost")
    (tmp_path / "model").unlink()
    again = train(load("organism"), behavior, config, unverified=True, out=tmp_path, progress=False)
    assert again == done
    assert done.telemetry
    assert load(tmp_path / "model").weights_hash == done.trained_hash
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [dict(row) for row in done.steps]


def test_checkpoints_of_another_run_are_refused(behavior: Behavior, tmp_path: Path) -> None:
    config = replace(SHORT, steps=2)
    train(load("organism"), behavior, config, unverified=True, out=tmp_path, progress=False)
    with pytest.raises(WrongInput, match=r"is of another run \(.*lr"):
        train(load("organism"), behavior, replace(config, lr=1e-3), unverified=True, out=tmp_path, progress=False)


def test_a_run_does_not_go_on_with_other_data_or_another_direction(behavior: Behavior, tmp_path: Path) -> None:
    chats, asked = tmp_path / "chats.jsonl", tmp_path / "asked.jsonl"
    lines = (DATA / GENERAL[1]).read_text(encoding="utf-8").splitlines()
    chats.write_text("\n".join(lines[:40]), encoding="utf-8")
    asked.write_text("\n".join(lines[40:50]), encoding="utf-8")
    organism = load("organism")
    one, other = (mean_difference(contrast(organism, behavior.take(24), layers=[i])[i]) for i in (2, 4))
    config = replace(SHORT, steps=1, evaluate_every=1, general=str(chats), abilities=str(asked), steer=0.1)

    def go(direction: Direction = one) -> None:
        train(
            load("organism"), behavior, config, unverified=True, direction=direction, out=tmp_path / "run",
            progress=False,
        )  # fmt: skip

    go()
    go()
    with pytest.raises(WrongInput, match=r"is of another run \(direction"):
        go(other)
    asked.write_text("\n".join(lines[41:51]), encoding="utf-8")
    with pytest.raises(WrongInput, match=r"is of another run \(held_out"):
        go()
    chats.write_text("\n".join(lines[:39]), encoding="utf-8")
    with pytest.raises(WrongInput, match=r"is of another run \(data"):
        go()
