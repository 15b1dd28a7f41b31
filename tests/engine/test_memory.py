"""Buffers that live at the same time do not overlap, whatever the order in which the two pathways run."""

import pytest
import torch
from small_networks import lively_model, small_config

from slowfast_ext.engine.memory import ALIGNMENT, Arena, Lifetime, lifetimes, place
from slowfast_ext.engine.network import read_network
from slowfast_ext.engine.plan import Fusion, Signature, Value, draw_steps

FUSION = Fusion(converts_clip=False, whole_block=lambda block, pathway, shape: "not here", pair=lambda block: False)


def steps_of(**fields):
    network = read_network(lively_model(small_config(**fields)), torch.float32, torch.device("cpu"))
    return draw_steps(network, Signature((2, 3, 16, 64, 64), False, "logits"), FUSION)[0]


def values(*sizes):
    return [Value(str(index), (size,), torch.uint8) for index, size in enumerate(sizes)]


def test_buffers_that_follow_each_other_share_memory():
    a, b, c = values(1000, 1000, 1000)
    offsets, size = place([Lifetime(a, 0, 1), Lifetime(b, 1, 2), Lifetime(c, 2, 3)])
    assert size == 2048
    assert offsets["0"] == offsets["2"] != offsets["1"]


def test_a_small_buffer_fits_between_larger_ones():
    a, b, c, d = values(4096, 2048, 1024, 512)
    offsets, size = place([Lifetime(a, 0, 1), Lifetime(b, 0, 3), Lifetime(c, 2, 3), Lifetime(d, 2, 3)])
    assert size == 4096 + 2048
    assert {offsets["2"], offsets["3"]} == {0, 1024}


@pytest.mark.parametrize("fields", [{}, {"slow_depth": 18, "fast_depth": 18}, {"lateral_norm": True}])
def test_no_two_living_buffers_of_a_network_overlap(fields):
    steps = steps_of(**fields)
    arena = Arena(steps, torch.device("cpu"))
    position = {}
    for group in lifetimes(steps).values():
        for lifetime in group:
            start = arena.offsets[lifetime.buffer.name]
            assert start % ALIGNMENT == 0
            position[lifetime.buffer] = (start, start + lifetime.buffer.bytes, lifetime, group)
    assert max(end for _, end, *_ in position.values()) <= arena.bytes
    for start, end, lifetime, group in position.values():
        for other_start, other_end, other, other_group in position.values():
            together = group is not other_group or not (other.last < lifetime.first or lifetime.last < other.first)
            if other is not lifetime and together:
                assert end <= other_start or other_end <= start


def test_sharing_saves_most_of_the_memory():
    steps = steps_of()
    buffers = {value.buffer for step in steps for value in (*step.inputs, *step.outputs)}
    assert Arena(steps, torch.device("cpu")).bytes < sum(buffer.bytes for buffer in buffers) / 2


def test_memory_of_one_pathway_is_never_used_by_the_other():
    """Else the order of two streams would matter."""
    steps = steps_of()
    groups = lifetimes(steps)
    for name in ("slow", "fast"):
        for lifetime in groups[name]:
            writers = {step.pathway for step in steps for value in step.outputs if value.buffer is lifetime.buffer}
            if "joined" not in lifetime.buffer.name:
                assert writers == {name}
            else:
                assert (name, lifetime.first) == ("slow", 0)  # the fast pathway may write as early as it likes
    assert {lifetime.buffer.name for lifetime in groups["both"]} == {
        "clip",
        "logits",
        "slow_path.layer4.2",
        "fast_path.layer4.2",
    }


def test_a_slice_of_a_concatenation_is_a_view_of_its_channels():
    joined = Value("joined", (2, 24, 3, 4, 5), torch.float32)
    part = joined.channels("part", 16, 8)
    steps = steps_of()[:1]
    steps[0].outputs, steps[0].inputs = (part,), (joined,)
    arena = Arena(steps, torch.device("cpu"))
    whole, slice_ = arena.tensor(joined), arena.tensor(part)
    assert whole.is_contiguous(memory_format=torch.channels_last_3d)
    slice_.fill_(1.0)
    whole[:, :16] = 0.0
    assert slice_.shape == (2, 8, 3, 4, 5)
    assert whole.sum() == slice_.numel()
