"""The training loop: gradients, averages, schedules, metrics, exact resume."""

import csv
import math
import os
import signal
import time

import numpy as np
import pytest
import torch as th
from conftest import TINY
from openpyxl import load_workbook

from improved_diffusion import logger, train_util
from improved_diffusion.config import MOST_STEPS
from improved_diffusion.image_datasets import BatchStream, read_images
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.run import averages, checkpoint, pace
from improved_diffusion.run.checkpoint import power_kind
from improved_diffusion.script_util import (
    create_model_and_diffusion,
)
from improved_diffusion.train_util import (
    NonFiniteError,
    TrainLoop,
    ema_decay,
    learning_rate,
    parse_ema_rates,
)

needs_signals = pytest.mark.skipif(os.name != "posix", reason="a signal would end the process")
TIMING = {"images_per_sec", "elapsed"}


def make_loop(folder, *, sampler="uniform", model_flags=None, batch_size=6, data=None, **kwargs):
    logger.configure(str(folder))
    th.manual_seed(0)
    flags = {**TINY, **(model_flags or {})}
    model, diffusion = create_model_and_diffusion(**flags)
    # The last layers start at zero; filling them lets every gradient flow from the first step on.
    for i, p in enumerate(model.parameters()):
        if not p.any():
            p.data.normal_(0, 0.02, generator=th.Generator().manual_seed(i))
    images = read_images("builtin", flags["image_size"])
    data = data or BatchStream(
        images, batch_size, class_cond=flags.get("class_cond", False), random_flip=True
    )
    return TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        batch_size=batch_size,
        schedule_sampler=create_named_schedule_sampler(sampler, diffusion),
        **{"lr": 1e-3, "log_interval": 2, "save_interval": 1000, **kwargs},
    )


def gradient(folder, microbatch):
    loop = make_loop(folder, microbatch=microbatch, batch_size=7)
    loop.compute_gradient(loop.draw(*next(loop.data)))
    return th.cat([value.flatten() for value in loop.gradients.total()])


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def assert_same_tensors(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tensors(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same_tensors(x, y)
    elif isinstance(a, th.Tensor):
        assert th.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("microbatch", [1, 2, 3, 5, 6])
def test_microbatch_does_not_change_the_gradient(tmp_path, microbatch):
    whole, parts = gradient(tmp_path / "a", -1), gradient(tmp_path / "b", microbatch)
    assert (whole - parts).norm() < 1e-5 * whole.norm()


def test_grad_norm_is_that_of_the_mean_loss_before_clipping(tmp_path):
    norm = gradient(tmp_path / "a", 3).double().norm().item()
    loop = make_loop(tmp_path / "b", microbatch=3, batch_size=7, grad_clip=1e-3, total_steps=1)
    step, clipped = loop.opt.step, []

    def spy(gradient, averages, copies, factor, more):
        clipped.append(factor * loop.gradients.norm())
        step(gradient, averages, copies, factor, more)

    loop.opt.step = spy
    loop.run_loop()
    assert float(rows(tmp_path / "b")[0]["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert clipped == [pytest.approx(1e-3, rel=1e-3)]


CASES = {
    "plain": {},
    "class_cond": {"model_flags": {"class_cond": True, "num_classes": 10}},
    "class_dropout": {
        "model_flags": {"class_cond": True, "num_classes": 10, "class_dropout": 0.5},
        "class_dropout": 0.5,
    },
    "dropout": {"model_flags": {"dropout": 0.3}},
    "learned_sigma": {"model_flags": {"learn_sigma": True}},
    "loss_second_moment": {
        "sampler": "loss-second-moment",
        "model_flags": {"diffusion_steps": 4, "use_kl": True},
    },
    "checkpointing": {"model_flags": {"use_checkpoint": True, "dropout": 0.2}},
    "power_averages": {"ema_lengths": "0.05,0.1"},
    "muon": {"optimizer": "muon"},
    "log_normal": {"sampler": "log-normal", "model_flags": {"diffusion_steps": 20}},
    "16_bits": {"precision": "bf16", "num_workers": 2, "model_flags": {"dropout": 0.2}},
}


@pytest.mark.parametrize("case, microbatch", [*((case, 4) for case in CASES), ("plain", -1)])
def test_resume_is_exact(tmp_path, monkeypatch, case, microbatch):
    monkeypatch.setattr(train_util, "export_all", lambda *args: ([], []))  # takes as long as the steps
    # The stop lies within a log interval, whose row must still cover all of its steps. 4 timesteps fill the
    # history of the loss-second-moment sampler within the run.
    settings = {**CASES[case], "microbatch": microbatch, "ema_rate": "0.9,0.99", "log_interval": 5}
    total = 24 if case == "loss_second_moment" else 12
    whole = make_loop(tmp_path / "whole", total_steps=total, **settings)
    whole.run_loop()
    first = make_loop(tmp_path / "parts", total_steps=total // 2 + 1, **settings)
    first.run_loop()
    th.manual_seed(99)  # a new process would be in another state
    second = make_loop(
        tmp_path / "parts", total_steps=total, resume_checkpoint=str(tmp_path / "parts"), **settings
    )
    assert second.step == total // 2 + 1
    second.run_loop()
    a, b = (checkpoint.read(str(tmp_path / name), total) for name in ("whole", "parts"))
    powers = map(power_kind, CASES[case].get("ema_lengths", "").split(","))
    for kind in ("model", "0.9", "0.99", "opt", *(powers if "ema_lengths" in settings else ())):
        assert_same_tensors(a.load(kind), b.load(kind))
    assert a.state["schedule_sampler"] == b.state["schedule_sampler"]
    assert a.state["samples"] == b.state["samples"] == 6 * total
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_microbatch_does_not_change_what_is_drawn(tmp_path):
    draws = []
    for microbatch in (2, 6):
        loop = make_loop(tmp_path / str(microbatch), microbatch=microbatch)
        loop.model.eval()
        seen = []
        original = loop.diffusion.training_losses

        def spy(model, x, t, original=original, seen=seen, **kwargs):
            seen.append((x, t, kwargs["noise"]))
            return original(model, x, t, **kwargs)

        loop.diffusion.training_losses = spy
        loop.compute_gradient(loop.draw(*next(loop.data)))
        draws.append([th.cat(parts) for parts in zip(*seen)])
    assert_same_tensors(*draws)


def test_class_dropout_withholds_its_share_of_the_labels(tmp_path):
    flags = {"class_cond": True, "num_classes": 10, "class_dropout": 0.25}
    loop = make_loop(tmp_path, model_flags=flags, class_dropout=0.25, batch_size=400)
    batch, cond = next(loop.data)
    labels = loop.draw(batch, cond).cond["y"]
    withheld = labels == 10
    assert 70 < withheld.sum() < 130
    assert th.equal(labels[~withheld], cond["y"][~withheld]) and cond["y"].max() == 9


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_process_on_its_own_draws_from_the_whole_range(tmp_path, monkeypatch, batch_size):
    """In rounds of steps, each process must expect the mean over all timesteps: here, the share of those below 500."""
    loop = make_loop(tmp_path, sampler="log-normal", batch_size=batch_size, sync_interval=2)
    batch = next(loop.data)
    monkeypatch.setattr(train_util.dist_util, "get_world_size", lambda: 4)
    for rank in (0, 3):
        monkeypatch.setattr(train_util.dist_util, "get_rank", lambda rank=rank: rank)
        shares = []
        for loop.samples in range(500):
            drawn = loop.draw(*batch)
            shares.append((drawn.weights * (drawn.t < 500)).mean().item())
        assert drawn.all_t[rank * batch_size :][:batch_size].equal(drawn.t)
        assert np.mean(shares) == pytest.approx(0.5, abs=0.12)


def test_seeds_differ(tmp_path):
    draws = []
    for seed in (0, 1):
        loop = make_loop(tmp_path / str(seed), seed=seed)
        draws.append(loop.draw(*next(loop.data)).t)
    assert not th.equal(*draws)


def test_resume_takes_new_flags_and_restores_the_rest(tmp_path):
    make_loop(tmp_path, total_steps=3, weight_decay=0.1).run_loop()
    loop = make_loop(tmp_path, total_steps=5, lr=7e-4, weight_decay=0.2, resume_checkpoint=str(tmp_path))
    assert (loop.step, loop.samples, loop.data.samples) == (3, 18, 18)
    assert loop.opt.state_dict()["param_groups"][0]["weight_decay"] == 0.2
    assert loop.opt.steps[0] == 3
    loop.run_loop()
    assert rows(tmp_path)[-1]["lr"] == "0.0007"
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "5"]


def test_branching_into_a_new_directory_brings_the_history_along(tmp_path):
    make_loop(tmp_path / "a", total_steps=4).run_loop()
    make_loop(
        tmp_path / "b", total_steps=6, resume_checkpoint=str(tmp_path / "a" / "model000004.pt")
    ).run_loop()
    assert [row["step"] for row in rows(tmp_path / "b")] == ["2", "4", "6"]
    assert checkpoint.steps(str(tmp_path / "a")) == [4]


class Poisoned:
    """Batches of which those in `bad` hold a NaN."""

    def __init__(self, stream, bad):
        self.stream, self.bad, self.count = stream, bad, 0

    def __next__(self):
        batch, cond = next(self.stream)
        self.count += 1
        if self.count in self.bad:
            batch[1, 0, 0, 0] = math.nan
        return batch, cond


def test_nonfinite_stops_before_anything_is_touched(tmp_path):
    images = read_images("builtin", 8)
    loop = make_loop(
        tmp_path / "a", total_steps=3, data=Poisoned(BatchStream(images, 6), {3}), save_interval=1
    )
    with pytest.raises(NonFiniteError, match=r"step 3: the loss at timesteps \[\d+\].*gradient norm nan"):
        loop.run_loop()
    good = make_loop(
        tmp_path / "b", total_steps=2, data=Poisoned(BatchStream(images, 6), {}), save_interval=1
    )
    good.run_loop()
    assert_same_tensors(loop.params, good.params)
    assert_same_tensors(loop.ema_params, good.ema_params)
    assert checkpoint.steps(str(tmp_path / "a")) == [1, 2]


def test_nonfinite_saves_what_is_finite(tmp_path):
    images = read_images("builtin", 8)

    def loop(name, bad, steps, **flags):
        data = BatchStream(images, 6)  # which a resumed run continues where it stopped
        data = Poisoned(data, bad) if bad else data
        return make_loop(tmp_path / name, total_steps=steps, data=data, **flags)

    said = "step 4: .* not finite .*; checkpoint 3 has the last finite weights"
    with pytest.raises(NonFiniteError, match=said):
        loop("a", {4}, 9).run_loop()
    loop("b", {}, 3).run_loop()
    stopped, good = (checkpoint.find(str(tmp_path / name)) for name in "ab")
    for kind in ("model", "opt", "0.9999"):
        assert_same_tensors(stopped.load(kind), good.load(kind))
    assert rows(tmp_path / "a")[-1]["step"] == "3"
    assert load_workbook(tmp_path / "a" / "results.xlsx")["Checkpoints"].max_row == 2

    # It goes on as the run does that was allowed to skip the step.
    on = {"resume_checkpoint": stopped, "skip_nonfinite": 1}
    loop("a", {}, 6, **on).run_loop()
    loop("c", {4}, 6, skip_nonfinite=1).run_loop()
    gone_on, skipped = (checkpoint.find(str(tmp_path / name)) for name in "ac")
    for kind in ("model", "opt", "0.9999"):
        assert_same_tensors(gone_on.load(kind), skipped.load(kind))


def test_nonfinite_weights_are_not_saved(tmp_path):
    loop = make_loop(tmp_path, total_steps=9, lr=1e39)
    with pytest.raises(NonFiniteError, match="no checkpoint has been saved"):
        loop.run_loop()
    assert checkpoint.steps(str(tmp_path)) == [] and (tmp_path / "results.xlsx").exists()


def test_skip_nonfinite_goes_on_up_to_the_limit(tmp_path):
    images = read_images("builtin", 8)

    def loop(name, bad):
        data = Poisoned(BatchStream(images, 6), bad)
        return make_loop(tmp_path / name, total_steps=5, data=data, skip_nonfinite=2)

    survivor = loop("a", {2, 3, 5})
    survivor.run_loop()
    assert survivor.step == 5 and survivor.samples == 8 * 6
    assert all(th.isfinite(p).all() for p in survivor.params)
    with pytest.raises(NonFiniteError):
        loop("b", {2, 3, 4}).run_loop()


def test_ema_warm_up_forgets_the_initial_weights(tmp_path):
    share = 1.0
    for step in range(1, 30001):
        share *= ema_decay(0.9999, step)
    assert share < 1e-9
    assert ema_decay(0.9999, 10**6) == 0.9999
    loop = make_loop(tmp_path, total_steps=1, ema_rate="0.5,0.0")
    initial = [p.detach().clone() for p in loop.params]
    loop.run_loop()
    decay = ema_decay(0.5, 1)
    for ema, start, now in zip(loop.ema_params["0.5"], initial, loop.params):
        assert th.allclose(ema, decay * start + (1 - decay) * now, atol=1e-7)
    assert_same_tensors(loop.ema_params["0.0"], [p.detach() for p in loop.params])


def test_learning_rate_schedule():
    assert [learning_rate(s, 1.0, warmup_steps=4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [learning_rate(s, 1.0, anneal_steps=4) for s in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


def test_learning_rate_decays_to_zero_at_the_end():
    def rates(decay, share, warmup=0):
        return [learning_rate(s, 1.0, warmup, 0, decay, share, 10) for s in range(12)]

    assert rates("linear", 1) == pytest.approx([*np.linspace(1, 0, 11), 0])
    assert rates("linear", 0.4) == pytest.approx([1] * 7 + [0.75, 0.5, 0.25, 0, 0])
    assert rates("linear", 1, warmup=2) == pytest.approx([0.5, 1, *np.linspace(1, 0, 9), 0])
    assert rates("linear", 0.9, warmup=2) == rates("linear", 1, warmup=2)
    half = (1 + np.cos(np.pi * np.linspace(0, 1, 6))) / 2
    assert rates("cosine", 0.5) == pytest.approx([1] * 5 + [*half, 0])
    assert rates("none", 1) == [1] * 12
    # Whoever prolongs a run from before its fall goes on as if it had been longer from the start.
    assert [learning_rate(s, 1.0, 0, 0, "linear", 0.2, 100) for s in range(80)] == [1] * 80


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr_decay": "exponential"}, "lr_decay 'exponential'.*none, linear, cosine"),
        ({"lr_decay": "linear", "lr_decay_share": 0.0}, "lr_decay_share 0.0"),
        ({"lr_decay": "linear", "lr_decay_share": 1.1}, "lr_decay_share 1.1"),
        ({"lr_decay_share": 0.5}, "lr_decay_share 0.5: needs lr_decay"),
        ({"lr_decay": "cosine", "lr_anneal_steps": 50}, "lr_decay cosine.*lr_anneal_steps 50"),
        (
            {"lr_decay": "linear", "lr_warmup_steps": 30, "total_steps": 30},
            "lr_warmup_steps 30.*total_steps 30",
        ),
        ({"ema_lengths": "0.5"}, "ema_lengths 0.5"),
    ],
)
def test_impossible_schedules_and_averages(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        make_loop(tmp_path, **options)


def test_power_averages_are_averages_of_the_weights_after_each_update(tmp_path):
    flags = {"ema_lengths": "0.05,0.2", "lr_decay": "linear", "save_interval": 3, "keep_last": 1}
    loop = make_loop(tmp_path, total_steps=9, **flags)
    recorded, step = [], loop.opt.step

    def spy(*arguments):
        step(*arguments)
        recorded.append([p.detach().double().clone() for p in loop.params])

    loop.opt.step = spy
    loop.run_loop()
    assert [float(row["lr"]) for row in rows(tmp_path)][-1] == pytest.approx(1e-3 / 9)
    names = list(dict(loop.model.named_parameters()))
    checkpoints = averages.with_averages(str(tmp_path))
    assert checkpoint.steps(str(tmp_path)) == [9] and [source.step for source in checkpoints] == [3, 6, 9]
    for length in ("0.05", "0.2"):
        for source in checkpoints:
            kept = source.load(power_kind(length))
            shares = averages.profile(float(length), source.step)
            for i, name in enumerate(names):
                expected = sum(share * weights[i] for share, weights in zip(shares, recorded))
                th.testing.assert_close(kept[name].double(), expected, rtol=1e-5, atol=1e-6)
        again, distance = averages.reconstruct(checkpoints, float(length))
        assert distance < 1e-3
        for name in names:
            th.testing.assert_close(again[name], kept[name], rtol=1e-3, atol=1e-5)


def test_power_averages_can_be_added_to_a_run(tmp_path):
    make_loop(tmp_path, total_steps=2).run_loop()
    loop = make_loop(tmp_path, total_steps=4, ema_lengths="0.1", resume_checkpoint=str(tmp_path))
    assert "--ema_lengths 0.1 is new; its average starts at step 2" in (tmp_path / "log.txt").read_text()
    assert_same_tensors(loop.power_params["0.1"], [p.detach() for p in loop.params])
    loop.run_loop()
    assert checkpoint.find(str(tmp_path)).power_lengths == ["0.1"]
    # And left out again.
    make_loop(tmp_path, total_steps=5, resume_checkpoint=str(tmp_path)).run_loop()
    assert checkpoint.find(str(tmp_path)).power_lengths == []


@pytest.mark.parametrize("text", ["1.0", "-0.1", "x", "0.9,0.9", "", "nan", "0.9,"])
def test_bad_ema_rates(text):
    with pytest.raises(ValueError, match="ema_rate"):
        parse_ema_rates(text)


def test_metrics_are_means_over_the_interval(tmp_path):
    every = make_loop(tmp_path / "every", total_steps=6, log_interval=1)
    every.run_loop()
    make_loop(tmp_path / "thirds", total_steps=6, log_interval=3).run_loop()
    fine, coarse = rows(tmp_path / "every"), rows(tmp_path / "thirds")
    assert list(fine[0]) == [name for name in every.log.columns if name not in TIMING]
    assert [row["step"] for row in coarse] == ["3", "6"] and coarse[-1]["samples"] == "36"
    for key in ("loss", "mse", "grad_norm"):
        expected = np.mean([float(row[key]) for row in fine[:3]])
        assert float(coarse[0][key]) == pytest.approx(expected, rel=1e-12)


def test_quarters_are_plain_means_of_the_losses_of_their_images(tmp_path):
    flags = {"diffusion_steps": 20, "learn_sigma": True}
    loop = make_loop(tmp_path, sampler="log-normal", model_flags=flags, batch_size=32, total_steps=1)
    seen, compute = [], loop.compute_gradient

    def spy(drawn):
        losses = compute(drawn)
        seen.append((drawn.t, drawn.weights, losses))
        return losses

    loop.compute_gradient = spy
    loop.run_loop()
    [(t, weights, losses)], [row] = seen, rows(tmp_path)
    assert weights.std() > 0.1
    for term in ("loss", "mse", "vb"):
        assert float(row[term]) == pytest.approx((losses[term] * weights).mean().item(), rel=1e-5)
        for quarter in range(4):
            inside = losses[term][(5 * quarter <= t) & (t < 5 * quarter + 5)]
            assert float(row[f"{term}_q{quarter}"]) == pytest.approx(inside.mean().item(), rel=1e-5)


def test_gradients_reach_every_parameter(tmp_path):
    loop = make_loop(tmp_path, model_flags={"class_cond": True, "num_classes": 10, "learn_sigma": True})
    loop.compute_gradient(loop.draw(*next(loop.data)))
    values = loop.gradients.total()
    names = [name for (name, _), value in zip(loop.model.named_parameters(), values) if not value.any()]
    assert names == []


@needs_signals
def test_a_signal_ends_a_preview_and_it_is_drawn_later(tmp_path):
    drawn, calls = [], []

    def preview(model, step):
        for number in range(1000):
            if step == 2 and number == 3 and not calls[3:]:
                os.kill(os.getpid(), signal.SIGTERM)
            calls.append(step)
            model(th.zeros(1, 3, 8, 8), th.zeros(1))
            if step != 2 or len(calls) > 100:
                break
        drawn.append(step)

    images = read_images("builtin", 8)
    flags = {"preview": preview, "sample_interval": 2}
    loop = make_loop(tmp_path, total_steps=5, data=BatchStream(images, 6), **flags)
    assert loop.run_loop() == "SIGTERM"
    assert calls == [2] * 4 and drawn == [] and checkpoint.steps(str(tmp_path)) == [2]
    calls += [2] * 100
    make_loop(
        tmp_path, total_steps=5, data=BatchStream(images, 6), **flags, resume_checkpoint=str(tmp_path)
    ).run_loop()
    assert drawn == [2, 4, 5]
    # It is not drawn a third time.
    make_loop(
        tmp_path, total_steps=6, data=BatchStream(images, 6), **flags, resume_checkpoint=str(tmp_path)
    ).run_loop()
    assert drawn == [2, 4, 5, 6]


REPORTS = ["preview", "heldout"]
FAILURES = {
    "preview": "the picture of step 2 could not be drawn",
    "heldout": "the held-out loss could not be measured",
}


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("error, said", [(MemoryError(), "MemoryError"), (OSError("disk full"), "disk full")])
def test_a_report_that_fails_does_not_end_the_training(tmp_path, capsys, report, error, said):
    def broken(model, step=0):
        raise error

    flags = {report: broken, "sample_interval": 2, "save_interval": 2}
    assert make_loop(tmp_path, total_steps=3, **flags).run_loop() is None
    assert f"WARNING: {FAILURES[report]} ({said}); training goes on" in capsys.readouterr().out
    assert checkpoint.steps(str(tmp_path)) == [2, 3]


@pytest.mark.parametrize("report", REPORTS)
def test_a_report_that_fails_in_a_directory_that_was_moved_ends_the_training(tmp_path, report):
    moved = []

    def broken(model, step=0):
        moved.append(True)
        raise RuntimeError("no such file")

    def check_folder():
        if moved:
            raise OSError("was moved")

    flags = {report: broken, "sample_interval": 2, "save_interval": 2, "check_folder": check_folder}
    with pytest.raises(OSError, match="was moved"):
        make_loop(tmp_path, total_steps=3, **flags).run_loop()


def test_a_checkpoint_that_could_not_be_written_does_not_count_as_saved(tmp_path, monkeypatch):
    def full(*args):
        raise MemoryError

    loop = make_loop(tmp_path, total_steps=3, save_interval=2)
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(MemoryError):
        loop.run_loop()
    assert loop.step == 2 and loop.saved_step is None


@needs_signals
def test_a_signal_to_save_what_max_hours_has_ended_does_not_lose_it(tmp_path):
    def heldout(model):
        os.kill(os.getpid(), signal.SIGINT)
        model(th.zeros(1, 3, 8, 8), th.zeros(1))

    loop = make_loop(tmp_path, total_steps=5, max_hours=1e-9, heldout=heldout)
    assert loop.run_loop() == "--max_hours"
    assert checkpoint.steps(str(tmp_path)) == [0] and loop.interrupts.stop == "SIGINT"


def test_the_most_total_steps_are_not_an_unknown_number(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "MEASURED_SECONDS", 0.0)
    loop = make_loop(tmp_path, total_steps=MOST_STEPS, on_plan=pytest.fail)
    run_step = loop.run_step

    def stop_in_the_end(*args):
        if loop.step == 20:
            loop.max_hours = 1e-9
        run_step(*args)

    monkeypatch.setattr(loop, "run_step", stop_in_the_end)
    assert loop.run_loop() == "--max_hours" and loop.step == 21


@needs_signals
def test_a_signal_ends_the_held_out_loss(tmp_path):
    calls = []

    def heldout(model):
        os.kill(os.getpid(), signal.SIGTERM)
        calls.append("asked to stop")
        model(th.zeros(1, 3, 8, 8), th.zeros(1))
        calls.append("went on")

    assert make_loop(tmp_path, total_steps=5, save_interval=2, heldout=heldout).run_loop() == "SIGTERM"
    assert calls == ["asked to stop"] and checkpoint.steps(str(tmp_path)) == [2, 3]
    assert checkpoint.read(str(tmp_path), 3).state["heldout"] == {}


@needs_signals
def test_a_signal_ends_an_export_that_takes_long(tmp_path, monkeypatch, capsys):
    exports = []

    def endless(folder, check_folder):
        exports.append("began")
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            time.sleep(0.01)
        exports.append("ended")

    monkeypatch.setattr(train_util, "export_all", endless)
    monkeypatch.setattr(train_util, "EXPORT_SECONDS", 0.0)
    assert make_loop(tmp_path, total_steps=5, save_interval=2).run_loop() == "SIGTERM"
    assert exports == ["began"]
    assert checkpoint.steps(str(tmp_path)) == [2, 3]  # the step after the export, too
    assert f"export_results.py {tmp_path}" in capsys.readouterr().out
