"""The metrics: against independent implementations and closed forms, whatever the batches, within bounded memory."""

import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from improved_diffusion.evaluation import metrics as evaluation
from improved_diffusion.evaluation.metrics import (
    InceptionScore,
    compare,
    frechet_distance,
    kernel_distance,
    precision_recall,
    summarize,
)


def vectors(count, size, seed=0, shift=0.0):
    """Correlated float32 feature vectors with a mean that is far from zero."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(size, size))
    return (rng.normal(size=(count, size)) @ mixing + 5 + shift).astype(np.float32)


def batches(features, size):
    return (features[start : start + size] for start in range(0, len(features), size))


def rotated(eigenvalues, seed):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def test_statistics_are_those_of_numpy():
    features = vectors(2500, 6) + 1000
    found = summarize(batches(features, 70), len(features))
    assert found.count == 2500
    np.testing.assert_allclose(found.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-10)
    assert np.array_equal(found.kept, features)


@pytest.mark.parametrize("size", [1, 7, 1024, 2500])
def test_statistics_do_not_depend_on_the_batch_size(size):
    features = vectors(2500, 4)
    found = summarize(batches(features, size), len(features), keep=300)
    expected = summarize([features], len(features), keep=300)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))
    assert found.kept.shape == (300, 4) and len({row.tobytes() for row in found.kept}) == 300
    known = {row.tobytes(): number for number, row in enumerate(features)}
    order = [known[row.tobytes()] for row in found.kept]
    assert order == sorted(order) and order[0] < 50 and order[-1] > 2450


def test_memory_does_not_grow_with_the_number_of_images():
    def peak(count):
        batch = vectors(500, 128)
        tracemalloc.start()
        summarize(itertools.repeat(batch, count // 500), count, keep=500)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(40_000) < 1.1 * peak(5_000)


def test_frechet_distance_equals_that_by_sqrtm():
    a, b = vectors(400, 20), vectors(300, 20, seed=1, shift=0.5)
    means, covariances = zip(
        *((x.mean(axis=0, dtype=np.float64), np.cov(x.T.astype(np.float64))) for x in (a, b))
    )
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    shift = means[0] - means[1]
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * np.real(root))
    found = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Fewer images than features: the closed form for matrices with the same eigenvectors still holds."""
    one, two = np.array([4.0, 1, 9, 0, 0, 0]), np.array([1.0, 16, 0, 0, 0, 25])
    zero = np.zeros(6)
    expected = ((np.sqrt(one) - np.sqrt(two)) ** 2).sum()
    assert frechet_distance(zero, rotated(one, 3), zero, rotated(two, 3)) == pytest.approx(
        expected, abs=1e-10
    )
    few = np.cov(vectors(10, 50).T.astype(np.float64))
    assert frechet_distance(zero, few, zero, few) == pytest.approx(0, abs=1e-9 * np.trace(few))


def test_frechet_distance_of_shifted_sets_is_the_squared_shift():
    covariance = rotated(np.arange(1.0, 6), 0)
    shift = np.array([1.0, 2, 0, 0, 2])
    assert frechet_distance(shift, covariance, np.zeros(5), covariance) == pytest.approx(9, rel=1e-12)


def test_kernel_distance_equals_its_definition():
    x, y = vectors(9, 4) / 5, vectors(9, 4, seed=1, shift=1) / 5

    def kernel(a, b):
        return (float(a.astype(np.float64) @ b) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    expected = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / (9 * 8)
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / 81
    found, spread = kernel_distance(x, y)
    assert found == pytest.approx(expected, rel=1e-9) and spread == 0


def test_kernel_distance_is_unbiased():
    """Of sets from one distribution it is zero on average, however small they are; the biased one is not."""
    rng = np.random.default_rng(0)
    found = [
        kernel_distance(*(rng.normal(size=(6, 3)).astype(np.float32) for _ in range(2)))[0]
        for _ in range(2000)
    ]
    assert abs(np.mean(found)) < 3.5 * np.std(found) / np.sqrt(len(found))


def test_kernel_distance_by_subsets():
    x, y = vectors(300, 4) / 5, vectors(200, 4, seed=1, shift=1) / 5
    whole, _ = kernel_distance(x[:200], y)
    mean, spread = kernel_distance(x, y, subsets=50, subset_size=60)
    assert (mean, spread) == kernel_distance(x, y, subsets=50, subset_size=60)
    assert 0 < spread < mean and mean == pytest.approx(whole, rel=0.2)


def test_precision_is_not_recall():
    """Real images of two kinds, samples of one: all look real, and half of the kinds are missing."""
    rng = np.random.default_rng(0)
    cats, dogs = (centre + rng.normal(size=(100, 5)) for centre in (0, 100))
    more_cats = rng.normal(size=(150, 5))
    precision, recall = precision_recall(np.concatenate([cats, dogs]), more_cats)
    assert precision > 0.8 and 0.3 < recall < 0.5
    precision, recall = precision_recall(more_cats, np.concatenate([cats, dogs]))
    assert 0.3 < precision < 0.5 and recall > 0.8


def test_precision_and_recall_equal_their_definition(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 7)
    reference, samples = vectors(40, 3), vectors(25, 3, seed=1, shift=0.5)

    def share_covered(points, balls):
        def covered(point):
            for i, ball in enumerate(balls):
                radius = sorted(np.linalg.norm(ball - other) for j, other in enumerate(balls) if j != i)[2]
                if np.linalg.norm(point - ball) <= radius:
                    return True
            return False

        return np.mean([covered(point) for point in points])

    expected = share_covered(samples, reference), share_covered(reference, samples)
    assert min(expected) > 0 and expected[0] != expected[1]
    assert precision_recall(reference, samples) == pytest.approx(expected, abs=1e-12)


def test_inception_score_equals_its_definition():
    probabilities = np.random.default_rng(1).dirichlet(np.full(6, 0.3), size=50).astype(np.float32)
    score = InceptionScore(50, splits=1)
    score.add(probabilities)
    p = probabilities.astype(np.float64)
    divergences = [sum(scipy.special.rel_entr(row, p.mean(axis=0))) for row in p]
    assert score.result() == (pytest.approx(np.exp(np.mean(divergences)), rel=1e-6), 0)


def test_inception_score_of_known_sets():
    def score(probabilities, size, splits=10):
        tally = InceptionScore(len(probabilities), splits)
        for batch in batches(probabilities, size):
            tally.add(batch)
        return tally.result()

    sorted_by_class = np.repeat(np.eye(4), 500, axis=0)
    mean, spread = score(sorted_by_class, 100)
    assert 3.9 < mean <= 4 and spread < 0.05
    assert score(np.full((40, 4), 0.25), 7) == (pytest.approx(1), pytest.approx(0))
    uneven = np.random.default_rng(0).dirichlet([0.5, 1, 2], size=95)
    assert score(uneven, 95) == pytest.approx(score(uneven, 4), rel=1e-12)
    assert score(uneven, 95)[1] > 0


def test_all_agree_with_torch_fidelity():
    """What torch-fidelity 0.4.0 computes of the same features (it needs torchvision, so it is not called here)."""
    rng, mixing = np.random.default_rng(0), np.random.default_rng(9).normal(size=(30, 30))
    samples = (np.abs(rng.normal(size=(900, 30)) @ mixing) / 5).astype(np.float32)
    reference = (np.abs(rng.normal(size=(900, 30)) @ mixing + 0.5) / 5).astype(np.float32)
    logits = rng.normal(size=(5000, 20)) * 2
    found = compare(summarize([samples], 900), summarize([reference], 900))
    assert found["frechet_distance"] == pytest.approx(0.26540336945344123, rel=1e-6)
    assert found["kernel_distance"] == pytest.approx(0.0008775256395239239, rel=1e-4)
    assert found["precision"] == pytest.approx(0.804444432258606, abs=0.0005)
    assert found["recall"] == pytest.approx(0.7788888812065125, abs=0.0005)
    score = InceptionScore(5000, splits=1)
    score.add(scipy.special.softmax(logits, axis=1))
    assert score.result()[0] == pytest.approx(3.347150905745767, rel=1e-9)


def test_all_metrics_of_one_comparison():
    a, b = vectors(500, 4), vectors(300, 4, seed=1, shift=1)
    found = compare(summarize([a], 500, keep=200), summarize([b], 300, keep=120))
    means, covariances = zip(
        *((x.mean(axis=0, dtype=np.float64), np.cov(x.T.astype(np.float64))) for x in (a, b))
    )
    expected = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert found["kernel_distance_std"] > 0
    # Equal numbers on both sides: exchanging the sets exchanges precision and recall.
    back = compare(summarize([b], 300, keep=120), summarize([a], 500, keep=200))
    assert (found["precision"], found["recall"]) == (back["recall"], back["precision"])
    assert found["precision"] != found["recall"]


def test_too_few_images():
    with pytest.raises(ValueError, match="at least 2 images"):
        summarize([vectors(1, 3)], 1)
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_distance(vectors(1, 3), vectors(5, 3))
    with pytest.raises(ValueError, match="at least 4 images"):
        precision_recall(vectors(9, 3), vectors(3, 3))
