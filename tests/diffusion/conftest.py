"""Weights of the tiny model, and one packed batch for all."""

import pytest

from tests.diffusion.tiny import DENSE, make_batch, make_params


@pytest.fixture(scope="session")
def dense():
    return make_params(DENSE, 1)


@pytest.fixture(scope="session")
def batch():
    return make_batch()
