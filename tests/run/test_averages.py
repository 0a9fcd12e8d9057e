"""Power-function averages against averages of recorded weights, and those made of them afterwards."""

import numpy as np
import pytest
import torch as th
from scipy import integrate

from improved_diffusion.run import averages, checkpoint
from improved_diffusion.run.averages import gamma_of, reconstruct, sigma_rel_of
from improved_diffusion.run.checkpoint import power_kind


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_gamma_is_that_of_the_width(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel)
    moments = [
        integrate.quad(lambda k, n=n: (gamma + 1) * k ** (gamma + n), 0, 1, epsabs=1e-12)[0]
        for n in (0, 1, 2)
    ]
    assert moments[0] == pytest.approx(1)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-5)


def test_lengths_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)  # Karras et al. 2023, section 3.1
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


def test_the_decay_makes_the_profile():
    shares = np.zeros(200)
    for step in range(1, 201):
        by = averages.decay(0.1, step)
        shares *= by
        shares[step - 1] += 1 - by
    np.testing.assert_allclose(shares, averages.profile(0.1, 200), atol=1e-14)
    assert shares.sum() == pytest.approx(1)


def random_walk(steps, size=300):
    """Weights on their way: drift that slows down, and noise. [steps + 1, size]"""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(steps + 1, size)), axis=0)
    return walk + 30 * np.sqrt(np.arange(steps + 1))[:, None]


def save_run(folder, walk, lengths, every, keep_last=0):
    """A run directory that holds the averages of `lengths` every so many steps. :param keep_last: see `rotate`."""
    kept = {length: th.zeros(walk.shape[1]) for length in lengths}
    for step in range(1, len(walk)):
        for length, mean in kept.items():
            mean.lerp_(th.from_numpy(walk[step]).float(), 1 - averages.decay(float(length), step))
        if step % every == 0:
            tensors = {"model": {"w": th.from_numpy(walk[step]).float()}, "opt": {}}
            tensors |= {power_kind(length): {"w": mean.clone()} for length, mean in kept.items()}
            checkpoint.save(str(folder), step, tensors, {})
            if keep_last:
                checkpoint.rotate(str(folder), keep_last, log=pytest.fail)


def exact(walk, sigma_rel, step):
    return averages.profile(sigma_rel, step) @ walk[1 : step + 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, walk = tmp_path_factory.mktemp("run"), random_walk(640)
    save_run(folder, walk, ["0.05", "0.1"], 40)
    return averages.with_averages(str(folder)), walk


@pytest.mark.parametrize("step", [640, 400])
@pytest.mark.parametrize(
    "sigma_rel, tolerance", [(0.05, 1e-4), (0.1, 1e-4), (0.07, 0.01), (0.15, 0.03), (0.2, 0.1)]
)
def test_reconstructed_is_the_average_of_the_recorded_weights(run, sigma_rel, tolerance, step):
    checkpoints, walk = run
    found, distance = reconstruct(checkpoints[::-1], sigma_rel, step)
    expected = exact(walk, sigma_rel, step)
    assert found["w"].dtype == th.float32
    # In units of what the choice of the length is about.
    scale = np.linalg.norm(exact(walk, 0.05, step) - exact(walk, 0.1, step))
    assert np.linalg.norm(found["w"].numpy() - expected) < tolerance * scale
    assert distance < tolerance


def test_what_rotation_has_left_makes_the_usual_lengths_within_two_percent(tmp_path):
    walk = random_walk(640)
    save_run(tmp_path, walk, ["0.05", "0.1"], 16, keep_last=1)  # 40 checkpoints
    left = averages.with_averages(str(tmp_path))
    assert len(left) == checkpoint.MOST_AVERAGES + 1
    scale = np.linalg.norm(exact(walk, 0.05, 640) - exact(walk, 0.1, 640))
    for sigma_rel in (0.04, 0.05, 0.07, 0.1, 0.15, 0.2):
        found, distance = reconstruct(left, sigma_rel)
        assert distance < 0.02, sigma_rel
        assert np.linalg.norm(found["w"].numpy() - exact(walk, sigma_rel, 640)) < 0.05 * scale, sigma_rel


def test_that_holds_after_any_number_of_checkpoints(monkeypatch):
    """The thinning alone, without files, and the error in closed form."""
    kept, newest = [], []
    monkeypatch.setattr(checkpoint, "averages_steps", lambda folder: kept)
    monkeypatch.setattr(checkpoint, "steps", lambda folder: newest)
    errors = []
    for step in range(1, 301):
        kept, newest = kept + newest, [step]
        kept = sorted(set(kept) - set(checkpoint._superfluous_averages("")))
        if step > checkpoint.MOST_AVERAGES and step % 9 == 0:
            left = [(length, one) for one in kept + newest for length in (0.05, 0.1)]
            errors += [averages.combine(left, sigma_rel, step)[1] for sigma_rel in (0.04, 0.07, 0.13, 0.2)]
    assert len(errors) > 100 and max(errors) < 0.02


def test_between_checkpoints_and_beyond_what_the_averages_can_give(run):
    checkpoints, walk = run
    found, distance = reconstruct(checkpoints, 0.1)
    assert distance < 1e-4
    np.testing.assert_allclose(found["w"], exact(walk, 0.1, 640), rtol=1e-4)
    # A profile that rises between two checkpoints is beyond them, and the distance says so.
    assert reconstruct(checkpoints, 0.01)[1] > 0.2
    assert reconstruct(checkpoints[:1], 0.2)[1] > reconstruct(checkpoints, 0.2)[1]


def test_factors_are_the_least_squares_solution(run):
    kept = [(0.05, 40), (0.1, 40), (0.05, 80), (0.1, 80), (0.05, 120), (0.1, 120)]
    grid = (np.arange(12000) + 0.5) / 100

    def continuous(sigma_rel, end):
        gamma = gamma_of(sigma_rel)
        return np.where(grid <= end, (gamma + 1) / end * (grid / end) ** gamma, 0)

    profiles = np.stack([continuous(*one) for one in kept], axis=1)
    wanted = continuous(0.14, 120)
    # That they add up to 1 is one more equation, with a weight that beats all others.
    equations = np.vstack([profiles, np.full(len(kept), 1e5)]), np.append(wanted, 1e5)
    expected, *_ = np.linalg.lstsq(*equations, rcond=None)
    factors, distance = averages.combine(kept, 0.14, 120)
    assert factors.sum() == pytest.approx(1)
    np.testing.assert_allclose(profiles @ factors, profiles @ expected, atol=2e-3 * wanted.max())
    residual = np.linalg.norm(profiles @ factors - wanted) / np.linalg.norm(wanted)
    assert distance == pytest.approx(residual, rel=0.02)


def test_what_cannot_be_reconstructed(run, tmp_path):
    checkpoints, _ = run
    for length in (0, 0.3, float("nan")):
        with pytest.raises(ValueError, match="sigma_rel .*0.01 to 0.28"):
            reconstruct(checkpoints, length)
    with pytest.raises(ValueError, match="sigma_rel 0.1: no checkpoint up to step 39.*ema_lengths"):
        reconstruct(checkpoints, 0.1, step=39)
    with pytest.raises(ValueError, match="no checkpoint"):
        reconstruct([], 0.1)


def test_lengths_as_text():
    assert averages.parse_lengths("") == [] and averages.parse_lengths(" 0.05, 0.10") == ["0.05", "0.10"]
    for text in ("0.3", "0.005", "-0.1", "x", "0.1,", "0.1,0.10", "1e-1", "0.05/../x", "nan"):
        with pytest.raises(ValueError, match="ema_lengths"):
            averages.parse_lengths(text)
