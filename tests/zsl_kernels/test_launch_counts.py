"""What each op does on a device, by benchmarks/gpu/counts.py: few launches, no operation of PyTorch's beside them, no reads."""

import pytest
import torch

from benchmarks.gpu.counts import counts, step_counts

ENDED = ("slab_gram", "add_partials")
# Launches and allocations of an op that was called before. The last allocation is a workspace. (Results of registered ops are
# tensors of their own, since an op's outputs may not share memory.)
PREPARED = {
    "interference": (("hopper",), 4),
    "interference, direction": (("hopper",), 4),
    "interference, Gram": (("hopper", *ENDED), 4),
}
HOPPER = {
    "gram": (("hopper", *ENDED), 4),
    "sq_norm": (("hopper",), 2),
    "dot": (("hopper",), 2),
    "weighted_grad": (("hopper",), 2),
}
ROWS = {
    "dense_interference": (("dense", "add_partials"), 4),
    "dense_interference, Gram": (("dense", *ENDED), 4),
    "scale_bias_grad": (("scale_bias", "add_partials"), 3),
    "embedding_interference": (("embedding_keys", "embedding_places", "embedding", "embedding_finish"), 13),
    "embedding_interference, Gram": (
        ("embedding_keys", "embedding_places", "embedding_clear", "embedding", *ENDED, "embedding_finish"),
        16,
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_op_is_so_many_launches_and_allocations(dtype):
    # float32 operands are split into parts: a launch and an allocation for each of the two.
    packs = ("pack", "pack") if dtype == torch.float32 else ()
    expected = {name: ((*packs, *launches), n + len(packs)) for name, (launches, n) in HOPPER.items()} | ROWS
    expected |= {name: ((*packs, *launches), n) for name, (launches, n) in PREPARED.items()}
    found = counts(dtype)
    assert {name: (x.launches, x.allocations) for name, x in found.items()} == expected
    for name, x in found.items():
        assert x.others == (("sort",) if name.startswith("embedding") else ()), name


@pytest.mark.parametrize("arch", [80, 100])
def test_elsewhere_one_more_launch_ends_a_call(arch):
    """By the older kernels, which take operands as they are."""
    found = counts(torch.float32, arch)
    tiled = {name: x for name, x in found.items() if name not in ROWS}
    assert tiled.keys() == {"interference", "interference, direction", "interference, Gram", "gram"}
    for name, x in tiled.items():
        assert (x.launches, x.others) == (("gram", "add_partials"), ()), name
    assert {name: (x.launches, x.allocations) for name, x in found.items() if name in ROWS} == ROWS


@pytest.mark.parametrize("gram", [False, True])
def test_a_captured_step_reads_nothing_and_adds_few_operations(gram):
    """Beside an op for each of the 10 weights, and one for their sums over coordinates: what reads the losses' factors, and what
    spreads the embedding's touched rows."""
    plain, probed = step_counts(probed=False), step_counts(gram=gram)
    assert plain.own == {}
    assert probed.own == {"interference": 9, "embedding_interference": 1, "coordinate_sums_of_many": 1}
    assert probed.reads == plain.reads == 0
    assert probed.others - plain.others <= 20
