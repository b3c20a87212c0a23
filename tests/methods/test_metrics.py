"""Scores: closed forms and an independent reference."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from methods.metrics import expected_calibration_error, knn_predict, linear_probe, paired_bootstrap, wilson_interval


def test_wilson_interval_by_hand_and_at_the_ends():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert (
        wilson_interval(0, 10)[0] == 0
        and wilson_interval(10, 10)[1] == pytest.approx(1)
        and wilson_interval(0, 0) == (0, 1)
    )


@pytest.mark.parametrize(("temperature", "share"), [(0.07, 0.736936), (0.1, 0.628532), (1.0, 0.361592)])
def test_knn_vote_of_three_neighbours(temperature, share):
    cosines = torch.tensor([0.9, 0.8, 0.75], dtype=torch.float64)
    train = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    votes = knn_predict(
        train, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), k=3, temperature=temperature, classes=2
    )
    assert votes[0, 0].item() == pytest.approx(share, abs=1e-5)


def test_each_training_image_is_its_own_nearest_neighbour():
    train = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    label = torch.arange(40) % 4
    assert torch.equal(knn_predict(train, label, train, k=1, temperature=0.07, classes=4, chunk=7).argmax(dim=1), label)


def test_the_linear_probe_is_scikit_learns_logistic_regression():
    rng = torch.Generator().manual_seed(0)
    label = torch.arange(90) % 3
    train = torch.randn(90, 5, generator=rng) * torch.tensor([1, 10, 0.1, 3, 1]) + torch.eye(5)[label] * 2
    weight, bias, mean, deviation = linear_probe(train, label, classes=3, weight_decay=0.1)
    x = (train - mean) / deviation
    reference = LogisticRegression(C=1 / (0.1 * 90), tol=1e-8, max_iter=1000).fit(x.numpy(), label.numpy())
    ours = torch.nn.functional.linear(x, weight, bias).softmax(dim=1)
    torch.testing.assert_close(ours, torch.from_numpy(reference.predict_proba(x.numpy())).float(), atol=2e-3, rtol=0)


def test_the_paired_bootstrap_of_a_constant_difference_has_no_width():
    assert paired_bootstrap(torch.ones(50), torch.zeros(50), resamples=200) == (1.0, 1.0)


def test_the_paired_bootstrap_agrees_with_the_normal_interval():
    rng = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 1000, generator=rng) < torch.tensor([[0.8], [0.7]])).float()
    low, high = paired_bootstrap(a, b, resamples=4000)
    error = 1.96 * float((a - b).std()) / 1000**0.5
    assert low == pytest.approx(float((a - b).mean()) - error, abs=0.004)
    assert high == pytest.approx(float((a - b).mean()) + error, abs=0.004)


def test_calibration_error_by_hand():
    confidence, correct = torch.tensor([0.95, 0.95, 0.55, 0.55]), torch.tensor([True, True, True, False])
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
