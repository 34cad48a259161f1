"""What the hf stack is held against is what the llava stack computes today."""

import json

import pytest
import reference
import torch
import transformers
from safetensors.torch import load_file

if int(transformers.__version__.split(".")[0]) > 4:
    pytest.skip("needs the llava stack (transformers 4.37.2): bash scripts/setup.sh", allow_module_level=True)


def test_the_stored_reference_is_current(tmp_path):
    cases, tensors = reference.build(tmp_path)
    assert json.loads(json.dumps(cases)) == json.loads((reference.FOLDER / "reference.json").read_text()), (
        "run `python tests/reference.py` on the llava stack and look at what changed"
    )
    stored = load_file(reference.FOLDER / "reference.safetensors")
    for name, value in tensors.items():
        torch.testing.assert_close(value, stored[name], atol=1e-4, rtol=0)
