"""Slow networks: rounds of steps that each process takes on its own (--sync_interval), and 16 bits on the way."""

import copy
import hashlib
import math
import os
import re
import signal

import numpy as np
import pytest
import torch as th
import torch.distributed
from conftest import TINY
from training_process import (
    _context,
    assert_same_run,
    assert_same_tensors,
    one_host,
    rows,
    run_training,
    two_ranks,
)

from improved_diffusion import dist_util, seeding
from improved_diffusion.config import TrainConfig
from improved_diffusion.image_datasets import BatchStream
from improved_diffusion.resample import UniformSampler
from improved_diffusion.run import checkpoint
from improved_diffusion.script_util import create_from_flags, read_images_alike
from improved_diffusion.seeding import Purpose
from improved_diffusion.train_util import TrainLoop

pytestmark = pytest.mark.skipif(not th.distributed.is_gloo_available(), reason="this torch has no gloo")

ROUND = 3
FLAGS = ["--batch_size", 4, "--microbatch", 3, "--lr", "1e-3", "--ema_rate", "0.9", "--sample_interval", 0]
FLAGS += ["--log_interval", 2, "--save_interval", 5, "--sync_interval", ROUND]


def wait(ranks, codes=(0, 0)):
    found = tuple(rank.wait() for rank in ranks)
    assert found == codes, "\n".join(rank.stdout + rank.stderr for rank in ranks)


def vector(tensors) -> th.Tensor:
    return th.cat([tensor.detach().double().flatten() for tensor in tensors])


def assert_close(found, expected, start=None):
    """They differ by less than a hundredth of the way from `start` (by default zero) to `expected`.

    Not by rounding only: the gradient of a bias before a normalisation is nothing but rounding, of which AdamW makes
    full steps.
    """
    found, expected = vector(found), vector(expected)
    way = expected if start is None else expected - vector(start)
    assert (found - expected).norm() < 1e-2 * way.norm()


def by_hand(rounds):
    """Two processes in one, with the optimizers of PyTorch.

    :return: the first parameters; parameters, their average and the moments after the last round; its last step.
    """
    config = TrainConfig(**TINY, batch_size=4, channels=3)
    th.manual_seed(0)
    model, diffusion = create_from_flags(config)
    images = read_images_alike("builtin", 8)
    data = [iter(BatchStream(images, 8, shard=rank, num_shards=2)) for rank in range(2)]
    copies = [copy.deepcopy(model) for _ in range(2)]
    inner = [th.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0) for m in copies]
    params = [p.detach().clone() for p in model.parameters()]
    outer = th.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)
    start, average = ([p.clone() for p in params] for _ in range(2))
    step = 0
    for _ in range(rounds):
        decay = 1.0
        for _ in range(ROUND):
            position = 8 * step
            step += 1
            t, _ = UniformSampler(diffusion).sample(
                8, "cpu", seeding.generator(0, Purpose.TIMESTEPS, position)
            )
            noise = seeding.normal(seeding.generator(0, Purpose.NOISE, position), (8, 3, 8, 8))
            for rank in range(2):
                mine = slice(4 * rank, 4 * rank + 4)
                inner[rank].zero_grad()
                x, _ = next(data[rank])
                diffusion.training_losses(copies[rank], x, t[mine], noise=noise[mine])[
                    "loss"
                ].mean().backward()
                inner[rank].step()
            decay *= min(0.9, (1 + step) / (10 + step))
        for p, *theirs in zip(params, *(m.parameters() for m in copies)):
            p.grad = p - (theirs[0] + theirs[1]).detach() / 2
        outer.step()
        for mean, p in zip(average, params):
            mean.mul_(decay).add_(p, alpha=1 - decay)
        states = [[optimizer.state[p] for p in m.parameters()] for optimizer, m in zip(inner, copies)]
        for one, other in zip(*states):
            for name in ("exp_avg", "exp_avg_sq"):
                mean = (one[name] + other[name]) / 2
                one[name].copy_(mean)
                other[name].copy_(mean)
        for m in copies:
            for p, value in zip(m.parameters(), params):
                p.data.copy_(value)
    return start, params, average, states[0], step


def test_two_ranks_follow_an_implementation_with_the_optimizers_of_pytorch(tmp_path):
    start, params, average, moments, steps = by_hand(rounds=4)
    with two_ranks(tmp_path / "run", *FLAGS, "--total_steps", steps) as ranks:
        wait(ranks)
    assert f"rounds of {ROUND} steps" in ranks[0].stdout and ranks[1].stdout == ranks[1].stderr == ""
    # Due at 5 and 10, saved at the ends of those rounds.
    assert checkpoint.steps(str(tmp_path / "run")) == [6, 12]
    assert [row["step"] for row in rows(tmp_path / "run")] == ["3", "6", "9", "12"]
    found = checkpoint.read(str(tmp_path / "run"), steps)
    names = [name for name, _ in create_from_flags(TrainConfig(**TINY, channels=3))[0].named_parameters()]
    assert_close([found.load("model")[name] for name in names], params, start)
    assert_close([found.load("0.9")[name] for name in names], average, start)
    state = found.load("opt")["state"]
    for kind in ("exp_avg", "exp_avg_sq"):
        assert_close([state[i][kind] for i in range(len(names))], [entry[kind] for entry in moments])
    assert {float(state[i]["step"]) for i in range(len(names))} == {float(steps)}
    assert found.state["samples"] == 8 * steps


MUON = ["--optimizer", "muon", "--grad_clip", 1, "--ema_lengths", "0.1", "--gradient_exchange", "bfloat16"]
MUON += ["--schedule_sampler", "loss-second-moment", "--diffusion_steps", 4]


@pytest.mark.parametrize("more", [[], MUON], ids=["adamw", "muon, bfloat16"])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, more):
    flags = [*FLAGS, *more, "--total_steps", 30, "--precision", "fp32"]
    with two_ranks(tmp_path / "whole", *flags) as ranks:
        wait(ranks)
    with two_ranks(tmp_path / "killed", *flags) as ranks:
        ranks[0].wait_until(lambda: checkpoint.steps(str(tmp_path / "killed")))
        ranks[1].kill()
        ranks[0].kill()
    assert max(checkpoint.steps(str(tmp_path / "killed"))) < 30
    with two_ranks(tmp_path / "killed", *flags) as ranks:
        wait(ranks)
    assert "resumed step" in ranks[0].stdout
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 30)


def test_a_process_alone_takes_rounds_too_and_others_join_it(tmp_path):
    flags = [*FLAGS, "--total_steps"]
    run_training(tmp_path / "one", *flags, 12)
    run_training(tmp_path / "two", *flags, 6)
    run_training(tmp_path / "two", *flags, 12)
    assert_same_run(tmp_path / "one", tmp_path / "two", 12)
    momentum = checkpoint.read(str(tmp_path / "one"), 12).load("opt")["outer"]["momentum"]
    assert momentum.norm() > 0
    with two_ranks(tmp_path / "one", *flags, 15) as ranks:
        wait(ranks)
    assert "resumed step 12 " in ranks[0].stdout


def test_a_run_keeps_its_rounds(tmp_path):
    run_training(tmp_path / "run", *FLAGS, "--total_steps", 3)
    refused = run_training(tmp_path / "run", "--sync_interval", 2, "--total_steps", 6, check=2)
    assert re.search(
        r"--sync_interval 2: the run to resume was started with 3; leave the flag out", refused.stderr
    )
    flags = ["--sync_interval", 1, "--allow_changed_flags", "True", "--total_steps", 4]
    run_training(tmp_path / "run", *flags)
    assert "outer" not in checkpoint.read(str(tmp_path / "run"), 4).load("opt")


def write_down_what_is_saved():
    """Each rank writes the checksum of its weights and moments, before rank 0 sends its own to the others."""
    save = TrainLoop.save

    def written(loop, *args):
        tensors = [*loop.params, *loop.opt.state_tensors()]
        digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
        with open(f"{os.environ['SAVED_TO']}.{os.environ['RANK']}", "a", encoding="utf-8") as file:
            file.write(f"{loop.step} {digest}\n")
        return save(loop, *args)

    TrainLoop.save = written


@pytest.mark.parametrize("interval, exchange", [(3, "float32"), (3, "bfloat16"), (1, "bfloat16")])
def test_both_ranks_have_the_same_bits_when_they_meet(tmp_path, interval, exchange):
    flags = [*FLAGS, "--sync_interval", interval, "--gradient_exchange", exchange, "--save_interval", 3]
    with two_ranks(
        tmp_path / "run",
        *flags,
        "--total_steps",
        9,
        prepare=write_down_what_is_saved,
        more={"SAVED_TO": str(tmp_path / "saved")},
    ) as ranks:
        wait(ranks)
    zero, one = ((tmp_path / f"saved.{rank}").read_text("utf-8") for rank in range(2))
    assert zero == one and [line.split()[0] for line in zero.splitlines()] == ["3", "6", "9"]


def test_16_bits_on_the_way_change_little(tmp_path):
    """They are not the same numbers, or nothing would have been shortened."""
    ends = []
    for exchange in ("float32", "bfloat16"):
        flags = [*FLAGS, "--sync_interval", 1, "--gradient_exchange", exchange, "--total_steps", 6]
        with two_ranks(tmp_path / exchange, *flags) as ranks:
            wait(ranks)
        state = checkpoint.read(str(tmp_path / exchange), 6).load("opt")["state"]
        ends.append(vector(entry["exp_avg"] for entry in state.values()))
    difference = (ends[0] - ends[1]).norm() / ends[0].norm()
    assert 1e-5 < difference < 0.02


def spoil_one_loss():
    """The noise of rank 1 is not a number in the second step; on request also in all that follow, or only in those
    of the second round."""
    draw = TrainLoop.draw

    def spoilt(loop, *args):
        drawn = draw(loop, *args)
        spoils = loop.samples == 8 or (loop.samples > 8 and os.environ.get("FOR_GOOD"))
        if "SECOND_ROUND" in os.environ:
            spoils = loop.samples >= 8 * ROUND
        if spoils and dist_util.get_rank() == 1:
            drawn.noise.fill_(math.nan)
        return drawn

    TrainLoop.draw = spoilt


def test_a_step_that_one_rank_skips_counts_for_the_other(tmp_path):
    flags = [*FLAGS, "--skip_nonfinite", 1, "--total_steps", 6]
    with two_ranks(tmp_path / "run", *flags, prepare=spoil_one_loss) as ranks:
        wait(ranks)
    assert ranks[0].stdout.count("is not finite (gradient norm nan): skipped (1 in a row, at most 1)") == 1
    found = checkpoint.read(str(tmp_path / "run"), 6)
    assert {float(entry["step"]) for entry in found.load("opt")["state"].values()} == {6.0}
    assert all(np.isfinite(float(row["loss"])) for row in rows(tmp_path / "run"))


def test_a_round_without_a_step_that_all_ranks_took_has_an_empty_row(tmp_path):
    flags = [*FLAGS, "--skip_nonfinite", 3, "--log_interval", 3, "--total_steps", 6]
    more = {"SECOND_ROUND": "1"}
    with two_ranks(tmp_path / "run", *flags, prepare=spoil_one_loss, more=more) as ranks:
        wait(ranks)
    assert [row["loss"] != "" for row in rows(tmp_path / "run")] == [True, False]
    assert "step 6/6  loss nan" in ranks[0].stdout


def test_a_loss_that_is_not_finite_stops_both_at_the_end_of_the_round(tmp_path):
    with two_ranks(
        tmp_path / "run", *FLAGS, "--total_steps", 30, prepare=spoil_one_loss, more={"FOR_GOOD": "1"}
    ) as ranks:
        wait(ranks, (1, 1))
    assert checkpoint.steps(str(tmp_path / "run")) == [3]
    assert "is not finite (gradient norm nan); checkpoint 3 has the last finite" in ranks[0].stdout
    found = checkpoint.read(str(tmp_path / "run"), 3)
    assert all(th.isfinite(tensor).all() for tensor in found.load("model").values())


@pytest.mark.skipif(os.name != "posix", reason="there are no signals between processes")
def test_a_signal_ends_a_run_at_the_end_of_a_round(tmp_path):
    flags = [*FLAGS, "--sync_interval", 4, "--total_steps", 10**6, "--save_interval", 10**6]
    with two_ranks(tmp_path / "run", *flags) as ranks:
        ranks[0].wait_for_rows(1)
        ranks[1].signal(signal.SIGTERM)
        wait(ranks, (143, 143))
    (stopped,) = checkpoint.steps(str(tmp_path / "run"))
    assert stopped % 4 == 0


def _sum_in_16_bits(rank, place, folder):
    os.environ.update({**place, "RANK": str(rank)})
    dist_util.setup_dist()
    values = th.load(folder / f"{rank}.pt", weights_only=True)
    for value in values:
        dist_util.all_reduce_in_16_bits(value)
    th.save(values, folder / f"sum{rank}.pt")
    dist_util.finish()


def test_numbers_are_sent_in_16_bits_and_added_in_32(tmp_path):
    th.manual_seed(0)
    sizes = (1, 2, 1001)
    sent = [[th.randn(size) * 10.0**rank for size in sizes] for rank in range(2)]
    for rank, values in enumerate(sent):
        th.save(values, tmp_path / f"{rank}.pt")
    place = one_host()
    processes = [_context.Process(target=_sum_in_16_bits, args=(rank, place, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = [th.load(tmp_path / f"sum{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_tensors(found[0], found[1])
    for one, other, value in zip(*sent, found[0]):
        total = one.bfloat16().float() + other.bfloat16().float()
        assert th.equal(value, total.bfloat16().float())
        assert value.dtype == th.float32


def test_a_process_alone_sends_nothing():
    vector = th.full((3,), 1 + 2.0**-20)
    dist_util.all_reduce_in_16_bits(vector)
    assert vector.tolist() == [1 + 2.0**-20] * 3
