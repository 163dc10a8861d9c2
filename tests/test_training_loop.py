"""Runs go on where they stopped, end the same, and stop with the last good state where the loss is lost."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqonnx.errors import InputError, OptionError
from vqonnx.training.loop import Schedule, train

SCHEDULE = Schedule(steps=20, rate=0.1, drops=(15,))
ADAM = Schedule(steps=20, rate=0.1, optimiser="adam", cosine=True)
both = pytest.mark.parametrize("schedule", [SCHEDULE, ADAM], ids=["sgd", "adam"])


def quadratic() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"a": torch.tensor([4.0, -2.0], requires_grad=True)}, {"seen": torch.zeros(1)}


def loss_of(parameters: dict[str, Tensor], others: dict[str, Tensor], broken: int = -1):  # type: ignore[no-untyped-def]
    def loss(step: int) -> Tensor:
        others["seen"] += 1
        noise = torch.Generator().manual_seed(step)
        target = torch.rand(2, generator=noise)
        value = ((parameters["a"] - target) ** 2).sum()
        return value * float("nan") if step == broken else value

    return loss


@both
def test_the_loss_falls_and_is_kept(schedule: Schedule) -> None:
    parameters, others = quadratic()
    history = train(loss_of(parameters, others), parameters, schedule, others=others, every=5)
    assert [step for step, _ in history.losses] == [5, 10, 15, 20]
    assert history.losses[-1][1] < history.losses[0][1] / 3
    assert (history.steps, history.diverged) == (20, None)


def test_adam_moves_a_tensor_by_its_own_size() -> None:
    small, large = (torch.tensor([size, -size], requires_grad=True) for size in (1e-3, 1e3))
    schedule = Schedule(steps=1, rate=0.01, optimiser="adam")
    train(lambda _: small.sum() + large.sum(), {"small": small, "large": large}, schedule)
    assert small.tolist() == pytest.approx([0.99e-3, -1.01e-3], rel=1e-5)
    assert large.tolist() == pytest.approx([990, -1010], rel=1e-5)


def test_a_cosine_ends_near_zero() -> None:
    rates = [ADAM.rate_at(step) for step in range(20)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[10] == pytest.approx(0.05)
    assert 0 < rates[19] < 0.001


@both
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(schedule: Schedule, tmp_path: Path) -> None:
    parameters, others = quadratic()
    train(loss_of(parameters, others), parameters, schedule, others=others, every=4)

    class Interrupted(Exception):
        pass

    again, counted = quadratic()
    whole = loss_of(again, counted)

    def cut(step: int) -> Tensor:
        if step == 10:
            raise Interrupted
        return whole(step)

    checkpoint = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        train(cut, again, schedule, others=counted, every=4, checkpoint=checkpoint)
    fresh, recounted = quadratic()
    history = train(loss_of(fresh, recounted), fresh, schedule, others=recounted, every=4, checkpoint=checkpoint)
    assert torch.equal(fresh["a"], parameters["a"])
    assert torch.equal(recounted["seen"], others["seen"])
    assert [step for step, _ in history.losses] == [4, 8, 12, 16, 20]
    assert not list(tmp_path.glob("*.part"))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    parameters, others = quadratic()
    checkpoint = tmp_path / "state.pt"
    train(loss_of(parameters, others), parameters, SCHEDULE, others=others, checkpoint=checkpoint)
    fresh, recounted = quadratic()
    train(loss_of(fresh, recounted), fresh, SCHEDULE, others=recounted, checkpoint=checkpoint)
    assert torch.equal(fresh["a"], parameters["a"])
    assert float(recounted["seen"]) == 20


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, others = quadratic()
    train(loss_of(good, others), good, Schedule(steps=8, rate=0.1, drops=(15,)), others=others, every=4)
    parameters, counted = quadratic()
    checkpoint = tmp_path / "state.pt"
    with caplog.at_level(logging.WARNING):
        history = train(
            loss_of(parameters, counted, broken=10),
            parameters,
            SCHEDULE,
            others=counted,
            every=4,
            checkpoint=checkpoint,
        )
    assert (history.diverged, history.steps) == (10, 8)
    assert torch.equal(parameters["a"], good["a"])
    assert "step 10: the loss is nan; stopped, the state of step 8 is kept; choose a rate below 0.1" in caplog.text
    fresh, recounted = quadratic()
    again = train(loss_of(fresh, recounted), fresh, SCHEDULE, others=recounted, every=4, checkpoint=checkpoint)
    assert again.diverged == 10  # it would only diverge again
    assert torch.equal(fresh["a"], good["a"])


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    parameters, others = quadratic()
    checkpoint = tmp_path / "state.pt"
    train(loss_of(parameters, others), parameters, SCHEDULE, others=others, checkpoint=checkpoint)
    with pytest.raises(OptionError, match="belongs to a run with other settings"):
        train(
            loss_of(parameters, others), parameters, Schedule(steps=21, rate=0.1), others=others, checkpoint=checkpoint
        )


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    parameters, others = quadratic()
    checkpoint = tmp_path / "state.pt"
    checkpoint.write_bytes(b"something else")
    with pytest.raises(InputError, match="not a checkpoint of this version; delete it"):
        train(loss_of(parameters, others), parameters, SCHEDULE, others=others, checkpoint=checkpoint)


@pytest.mark.parametrize(("steps", "rate"), [(0, 0.1), (5, 0.0), (5, float("inf")), (5, float("nan"))])
def test_a_schedule_that_cannot_be_is_refused(steps: int, rate: float) -> None:
    with pytest.raises(OptionError, match="choose"):
        Schedule(steps=steps, rate=rate)
