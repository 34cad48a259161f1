"""Some files here belong to one stack; on the other they are not collected."""

import importlib.util

import pytest
import torch

LLAVA = importlib.util.find_spec("llava") is not None
collect_ignore_glob = ["test_hf_*"] if LLAVA else ["test_law_*", "test_training_*"]


@pytest.fixture(autouse=True)
def seeded():
    """The same pruners in every run: what they decide is a part of the test."""
    torch.manual_seed(0)
