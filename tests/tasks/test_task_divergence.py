"""KL(teacher ‖ student) against scipy's closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax

from autocomp.tasks.divergence import kl_per_example, teacher_kl

LOGITS = arrays(np.float64, (3, 5), elements=st.floats(-30, 30))


@given(LOGITS, LOGITS)
def test_equals_the_sum_of_relative_entropies(teacher, student):
    expected = rel_entr(softmax(teacher, axis=1), softmax(student, axis=1)).sum(axis=1)
    np.testing.assert_allclose(kl_per_example(teacher, student), expected, atol=1e-9)
    ours = teacher_kl(torch.from_numpy(teacher), torch.from_numpy(student)).item()
    assert ours == pytest.approx(expected.mean(), rel=1e-4, abs=1e-5)


@given(LOGITS)
def test_of_a_model_with_itself_is_zero_and_never_negative(teacher):
    assert np.array_equal(kl_per_example(teacher, teacher), np.zeros(3))
    tensor = torch.from_numpy(teacher)
    assert teacher_kl(tensor, tensor).item() == 0
    assert (kl_per_example(teacher, teacher[::-1]) >= -1e-12).all()


def test_mask_takes_the_mean_over_real_positions():
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(size=(2, 2, 4, 7)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    entropy = rel_entr(softmax(teacher, axis=-1), softmax(student, axis=-1)).sum(axis=-1)
    expected = [entropy[0, :2].mean(), entropy[1, :3].mean()]
    np.testing.assert_allclose(kl_per_example(teacher, student, mask), expected, rtol=1e-5)
    ours = teacher_kl(*map(torch.from_numpy, (teacher, student, mask))).item()
    assert ours == pytest.approx(entropy[mask == 1].mean(), rel=1e-5)
    np.testing.assert_allclose(kl_per_example(teacher, student), entropy.mean(axis=1), rtol=1e-5)


def test_gradient_is_the_difference_of_softened_probabilities():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 4, 6, generator=generator)
    student.requires_grad_()
    teacher_kl(teacher, student, temperature=3.0).backward()
    expected = ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 3 / len(teacher)
    torch.testing.assert_close(student.grad, expected.detach())
