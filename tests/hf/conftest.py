"""These tests need transformers 5.x; on the llava stack each file is skipped before it is imported."""

import pytest
import torch
import transformers

torch.set_num_threads(1)
MAJOR = int(transformers.__version__.split(".")[0])


class OtherStack(pytest.Module):
    """A test file of a stack that is not installed."""

    def collect(self):
        pytest.skip(
            f"needs the hf stack (transformers 5.x, here is {transformers.__version__}): bash scripts/setup.sh hf",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path, parent):
    return OtherStack.from_parent(parent, path=module_path) if MAJOR < 5 else None
