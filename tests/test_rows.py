"""Gathering and scattering rows: nothing is lost, moved or invented, for any mask."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_prune.drop import Rows
from llava_prune.layout import TokenLayout, gather_rows, padded_index


@st.composite
def masks(draw, count=1):
    """`count` bool masks (B, T)."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    made = [torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch))) for _ in range(count)]
    return made[0] if count == 1 else made


@settings(deadline=None)
@given(masks())
def test_padded_index_lists_the_true_positions_in_order(mask):
    index, valid = padded_index(mask)
    assert index.shape == valid.shape and index.shape[1] == max(1, int(mask.sum(-1).max()))
    for row in range(len(mask)):
        assert torch.equal(index[row][valid[row]], mask[row].nonzero().flatten())
    assert not index[~valid].any()


@settings(deadline=None)
@given(masks())
def test_padded_index_with_a_known_width_is_the_same(mask):
    width = int(mask.sum(-1).max())
    for known, counted in zip(padded_index(mask, width), padded_index(mask), strict=True):
        assert torch.equal(known, counted)


@settings(deadline=None)
@given(masks())
def test_rows_that_stay_come_back_where_they_were(mask):
    batch, length = mask.shape
    values = torch.arange(1, batch * length * 2 + 1).float().view(batch, length, 2)
    selected = Rows.full(batch, length, mask.device).select(mask)
    if selected is None:
        assert mask.all()
        return
    rows, index = selected
    assert rows.ragged == (mask.sum(-1).unique().numel() > 1)
    back = rows.scatter(gather_rows(values, index), length)
    assert torch.equal(back, values * mask[..., None])


@settings(deadline=None)
@given(masks(count=2))
def test_selecting_twice_is_selecting_both(pair):
    first, second = pair
    batch, length = first.shape
    once = Rows.full(batch, length, first.device)
    rows, hidden = once, torch.arange(1, batch * length + 1).float().view(batch, length, 1)
    for mask in (first, second):
        selected = rows.select(rows.flags(mask))
        if selected is not None:
            rows, index = selected
            hidden = gather_rows(hidden, index)
    expected = torch.arange(1, batch * length + 1).view(batch, length) * (first & second)
    assert torch.equal(rows.scatter(hidden, length)[..., 0], expected.float())


@settings(deadline=None)
@given(masks(), st.integers(1, 3))
def test_take_is_the_same_along_every_dimension(mask, heads):
    batch, length = mask.shape
    selected = Rows.full(batch, length, mask.device).select(mask)
    if selected is None:
        return
    rows, _ = selected
    values = torch.arange(batch * length).view(batch, length)
    taken = rows.take(values, 1)
    assert torch.equal(taken[rows.valid], values[mask])
    wide = values[:, None, :].expand(batch, heads, length)
    assert torch.equal(rows.take(wide, 2), taken[:, None].expand(-1, heads, -1))
    shared = torch.arange(length)[None]  # one row for the whole batch, as position_ids may be
    assert torch.equal(rows.take(shared, 1)[rows.valid], rows.positions[rows.valid])


@settings(deadline=None)
@given(masks(count=3))
def test_a_layout_tells_every_position_one_thing(made):
    valid, vision, answer = made
    vision = vision & valid
    labels = torch.where(answer, 5, -100)
    layout = TokenLayout.build(valid, vision, vision.any(-1).long(), labels)
    assert torch.equal(layout.text | layout.vision, layout.valid) and not (layout.text & layout.vision).any()
    assert not (layout.question & ~layout.text_after_image).any()
    supervised = (layout.text_after_image & (labels != -100)).cumsum(-1) > 0
    assert not (layout.question & supervised).any(), "the answer, or what follows it, leaks into the question"
    assert torch.equal(layout.vision_counts, vision.sum(-1))
    assert layout.has_vision == bool(vision.any())
    twice = layout.repeat(2)
    for told in (layout, twice):
        masks = (told.valid, told.vision, told.question)
        counted = zip(*(mask.sum(-1).tolist() for mask in masks), told.num_images.tolist(), strict=True)
        assert list(counted) == [size[:4] for size in told.sizes]
        assert [bool(size.ends) for size in told.sizes] == told.valid[:, -1].tolist()
