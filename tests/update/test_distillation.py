"""The distance to a teacher, against formulas in numpy and Hinton's own derivative."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbaccel.update.distillation import distance_to_teacher

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def pair(seed=0, n=7, classes=5):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (n, classes)), rng.normal(0, 3, (n, classes))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_it_is_the_divergence_of_the_softened_answers_times_the_squared_temperature(temperature):
    z, v = pair()
    p, q = softmax(v / temperature), softmax(z / temperature)
    truth = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1)
    found = distance_to_teacher(torch.tensor(z), torch.tensor(v), temperature=temperature)
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_its_gradient_is_t_times_the_difference_of_the_probabilities(temperature):
    """Hinton et al. 2015, equation 2, with the factor T^2 of section 2."""
    z, v = pair(1)
    logits, answers = torch.tensor(z, requires_grad=True), torch.tensor(v)
    distance_to_teacher(logits, answers, temperature=temperature).sum().backward()
    truth = temperature * (softmax(z / temperature) - softmax(v / temperature))
    np.testing.assert_allclose(logits.grad.numpy(), truth, rtol=1e-12, atol=1e-14)


def test_answers_of_one_class_alone_are_finite_and_move_the_other_classes():
    z = torch.zeros(1, 3, dtype=torch.float32, requires_grad=True)
    found = distance_to_teacher(z, torch.tensor([[1e4, 0.0, 0.0]]), temperature=1.0)
    found.sum().backward()
    assert found.item() == pytest.approx(np.log(3), rel=1e-6)
    np.testing.assert_allclose(z.grad[0], [1 / 3 - 1, 1 / 3, 1 / 3], rtol=1e-6)


def test_answers_in_another_precision_are_taken_in_that_of_the_logits():
    z, v = pair(2)
    answers = torch.tensor(v, dtype=torch.bfloat16)
    found = distance_to_teacher(torch.tensor(z), answers, temperature=2.0)
    truth = distance_to_teacher(torch.tensor(z), answers.double(), temperature=2.0)
    assert found.dtype == torch.float64 and torch.equal(found, truth)
