"""The models that lmms-eval finds under the entry point group `lmms_eval.models`, named and not yet imported."""

from __future__ import annotations


def manifests() -> list:
    """`llava_prune` (haotian's LLaVA) and `llava_prune_hf` (Hugging Face's classes) as lmms-eval's `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id="llava_prune", simple_class_path="llava_prune.integrations.lmms_llava.LlavaPrune"),
        ModelManifest(
            model_id="llava_prune_hf", simple_class_path="llava_prune.integrations.lmms_llava_hf.LlavaPruneHf"
        ),
    ]
