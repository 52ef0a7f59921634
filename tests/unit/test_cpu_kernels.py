from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from raymask.train.cpu_kernels import CPUKernels, attention, cpu_kernels, dropout

NEVER = 1e-9  # rounds to no dropout at all, but takes the way of one


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@given(p=st.floats(0.01, 0.99), size=st.integers(1, 70))
def test_dropout_zeroes_or_scales(p, size):
    values = normal(size).abs() + 1
    found = dropout(values, p)
    scaled = values / (1 - p)
    assert bool(((found == 0) | torch.isclose(found, scaled, rtol=2e-3)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_everywhere_and_independently(p, dtype):
    torch.manual_seed(1)
    gone = torch.stack([dropout(torch.ones(64, dtype=dtype), p) == 0 for _ in range(4000)]).double()
    error = (p * (1 - p) / 4000) ** 0.5
    assert float((gone.mean(0) - p).abs().max()) < 5 * error
    together = torch.corrcoef(gone.T) - torch.eye(64)
    assert float(together.abs().max()) < 6 / 4000**0.5


def test_a_gradient_meets_the_same_zeros():
    values = normal(100).requires_grad_()
    found = dropout(values, 0.3)
    found.sum().backward()
    assert torch.equal(values.grad == 0, found == 0)
    assert values.grad.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=1e-4)


def test_dropout_comes_from_torch_s_generator_whatever_the_threads():
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(7)
        found.append(dropout(torch.ones(300, 300), 0.1))
    torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert not torch.equal(found[0], dropout(torch.ones(300, 300), 0.1))


@pytest.mark.parametrize(
    ("p", "training", "expected"), [(0.5, False, 1.0), (0.0, True, 1.0), (1.0, True, 0.0), (NEVER, True, 1.0)]
)
def test_where_nothing_is_random_dropout_is_torch_s(p, training, expected):
    assert bool((dropout(torch.ones(50), p, training) == expected).all())


def masks():
    inside = torch.arange(5) < torch.tensor([[5], [2], [4]])
    return {"none": None, "bool": inside[:, None, None, :], "float": normal(3, 1, 5, 5)}


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_torch_s_where_nothing_is_dropped(kind, scale):
    q, k, v = (normal(3, 2, 5, 8) * factor for factor in (1, 2, 3))
    mask = masks()[kind]
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    assert torch.allclose(attention(q, k, v, mask, dropout_p=NEVER, scale=scale), expected, atol=1e-5)


def test_attention_with_dropout_has_the_mean_of_attention_without():
    q, k, v = (normal(3, 2, 5, 8) for _ in range(3))
    mask = masks()["bool"]
    torch.manual_seed(0)
    found = torch.stack([attention(q, k, v, mask, dropout_p=0.2) for _ in range(3000)])
    error = found.std(0) / 3000**0.5
    difference = (found.mean(0) - F.scaled_dot_product_attention(q, k, v, mask)).abs()
    assert bool((difference <= 5 * error + 1e-6).all())
    assert bool((error[0] > 0).all()), "nothing was dropped"


@pytest.mark.parametrize("special", [{"is_causal": True}, {"enable_gqa": True}])
def test_what_attention_does_not_know_is_left_to_torch(special):
    q = normal(1, 2, 5, 8)
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, **special)
    torch.manual_seed(3)
    assert torch.equal(attention(q, q, q, dropout_p=0.5, **special), expected)


def test_within_the_block_modules_and_functions_take_the_faster_way_and_elsewhere_not():
    ones, module = torch.ones(1000), torch.nn.Dropout(0.4)

    def seeded(call):
        torch.manual_seed(5)
        return call()

    expected = seeded(lambda: dropout(ones, 0.4))
    torchs = seeded(lambda: module(ones))
    with CPUKernels():
        assert torch.equal(seeded(lambda: module(ones)), expected)
        assert torch.equal(seeded(lambda: F.dropout(ones, 0.4, training=True)), expected)
        assert bool((module.eval()(ones) == 1).all())
        assert float(ones.sum()) == 1000
    assert not torch.equal(torchs, expected)
    assert torch.equal(seeded(lambda: module.train()(ones)), torchs)


@pytest.mark.parametrize(
    ("p", "device", "expected"), [(0.1, "cpu", CPUKernels), (0.0, "cpu", nullcontext), (0.1, "cuda", nullcontext)]
)
def test_the_block_is_entered_where_it_pays(p, device, expected):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(p))
    assert cpu_kernels(module, torch.device(device)) is expected
