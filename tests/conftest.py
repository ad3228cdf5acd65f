"""Where the tests run: on the GPU if there is one, else on the CPU, with Triton's kernels in its interpreter."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any kernel module is


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is false"))


@pytest.fixture
def device():
    """The device whose registered implementation a test exercises."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def generator(device):
    return torch.Generator(device).manual_seed(0)
