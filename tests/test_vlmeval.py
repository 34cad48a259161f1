"""VLMEvalKit's model with pruners, over a stand-in of the class it is built on: the package has 68 dependencies."""

import sys
from types import ModuleType

import pytest
import torch
from tiny import randomise_pruners

from llava_prune import PruneConfig, attach_pruners, save_pruners
from llava_prune.sidecar import read_sidecar

SETTINGS = PruneConfig(pruning_layers=(1, 3, 5), target_token_num=41, pruner_dim=16, pruner_heads=4)


class LLaVA:
    """Loads as `vlmeval.vlm.llava.LLaVA` does (0.0.20): through the builder; other keywords go to `generate`."""

    def __init__(self, model_path="liuhaotian/llava_v1.5_7b", **kwargs):
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        name = get_model_name_from_path(model_path)
        _, self.model, self.image_processor, _ = load_pretrained_model(model_path, None, name, device="cpu")
        self.model.float()
        self.kwargs = {"do_sample": False, **kwargs}

    def generate_inner(self, message, dataset=None):
        ids = torch.tensor([[1, 5, -200, 6, 7, message]])
        return self.model.generate(ids, images=torch.zeros(1, 3, 192, 192), **self.kwargs)


@pytest.fixture
def llava_prune_class(monkeypatch):
    """`LLaVAPrune`, with the stand-in where VLMEvalKit would be."""
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.llava"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vlmeval.vlm.llava"].LLaVA = LLaVA
    monkeypatch.delitem(sys.modules, "llava_prune.integrations.vlmeval", raising=False)
    from llava_prune.integrations.vlmeval import LLaVAPrune

    yield LLaVAPrune
    monkeypatch.delitem(sys.modules, "llava_prune.integrations.vlmeval")


@pytest.fixture
def pruners(testbed, tmp_path):
    from llava.model.builder import load_pretrained_model

    _, model, _, _ = load_pretrained_model(str(testbed / "llava-mosaic-tiny"), None, "llava-mosaic-tiny", device="cpu")
    randomise_pruners(attach_pruners(model.float(), SETTINGS))
    save_pruners(model, tmp_path / "pruners")
    return tmp_path / "pruners"


def test_pruners_and_origin(llava_prune_class, testbed, pruners, tmp_path):
    base = str(testbed / "llava-mosaic-tiny")
    report = tmp_path / "report.jsonl"
    model = llava_prune_class(base, pruners=str(pruners), average_tokens=40, report=str(report), max_new_tokens=3)
    assert model.kwargs == {"do_sample": False, "max_new_tokens": 3}  # none of ours reaches `generate`
    assert "no sample with an image yet" in model.kept.summary()
    for word in (8, 9):
        model.generate_inner(word)
    assert "mode hard, 39.9 average tokens of 144.0 over 2 samples" in model.kept.summary()
    assert len(read_sidecar(report)) == 2
    model = llava_prune_class(base, mode="origin", max_new_tokens=3)
    model.generate_inner(8)
    assert "mode origin, 144.0 average tokens of 144.0 over 1 samples" in model.kept.summary()
    with pytest.raises(ValueError, match="needs pruners"):
        llava_prune_class(base)


def test_every_process_has_a_report_of_its_own(llava_prune_class, testbed, tmp_path, monkeypatch):
    report = tmp_path / "report.jsonl"
    for rank, words in ((0, (8, 9)), (1, (8,))):
        monkeypatch.setenv("RANK", str(rank))
        model = llava_prune_class(
            str(testbed / "llava-mosaic-tiny"), mode="origin", report=str(report), max_new_tokens=1
        )
        for word in words:
            model.generate_inner(word)
    assert len(read_sidecar(report)) == 2 and len(read_sidecar(tmp_path / "report.jsonl.rank1")) == 1
