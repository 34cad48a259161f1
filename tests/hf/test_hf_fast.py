"""Acceleration on Hugging Face's classes, without a GPU: the same code with calls in place of graphs."""

from fast_law import FACTORS, assert_fast_is_plain
from law import matrix, settings, texts_and_images
from tiny_hf import KINDS, batch_of, generate, tiny


@matrix({"kind": KINDS, **FACTORS})
def test_fast_is_plain(kind, batch, padding, images, selection, residual, first, how):
    model = tiny(kind)
    inputs = batch_of(model, *texts_and_images(batch, images), padding)
    config = settings(pruning_layers=(first, 3, 4), selection=selection, use_attn_residual=residual)
    assert_fast_is_plain(model, config, inputs, generate, how, padding == "right" and batch > 1)
