"Convolutions as matrix products: the same function as `nn.Conv2d`, chosen only where it is faster."

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ecan_fastai import layers
from ecan_fastai.layers import *

FORMS = {"dense": conv2d_dense, "columns": conv2d_columns}
SHAPES = [
    (1, 1, 3, 1, 1),
    (2, 2, 3, 1, 1),
    (3, 2, 3, 2, 1),
    (2, 3, 3, 1, 0),
    (5, 4, 3, 2, 1),
    (3, 3, 2, 1, 0),
    (4, 3, 3, 3, 2),
    (1, 4, 1, 1, 0),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradients(conv, *leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    out = conv(*leaves)
    out.backward(draw(*out.shape, seed=9))
    return out.detach(), *[t.grad for t in leaves]


@pytest.mark.parametrize("height,width,kernel,stride,padding", [s for s in SHAPES if min(s[:2]) + 2 * s[4] >= s[2]])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradients_are_those_of_torch(form, height, width, kernel, stride, padding):
    x, weight, bias = draw(3, 4, height, width), draw(5, 4, kernel, kernel, seed=1), draw(5, seed=2)
    steps = dict(stride=(stride, stride), padding=(padding, padding))
    found = value_and_gradients(lambda *leaves: FORMS[form](*leaves, **steps), x, weight, bias)
    expected = value_and_gradients(lambda *leaves: F.conv2d(*leaves, **steps), x, weight, bias)
    for a, b in zip(found, expected):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_uneven_kernels_strides_and_padding():
    x, weight, steps = draw(2, 3, 4, 3), draw(4, 3, 3, 2, seed=1), dict(stride=(2, 1), padding=(1, 0))
    for form in FORMS.values():
        assert torch.allclose(form(x, weight, **steps), F.conv2d(x, weight, **steps), rtol=1e-10)


@pytest.fixture
def used(monkeypatch):
    "The forms that were used, in order"
    seen = []
    for name, form in FORMS.items():
        monkeypatch.setattr(
            layers, form.__name__, lambda *args, name=name, form=form: (seen.append(name), form(*args))[1]
        )
    return seen


def small_conv():
    return speed_up_small_maps(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)))[0]


@pytest.mark.parametrize(
    "side,n,training,bf16,expected",
    [
        (2, 1, True, False, ["dense"]),
        (2, 63, False, False, []),
        (2, 64, False, False, ["dense"]),
        (3, 64, True, False, []),
        (3, 4, True, True, ["columns"]),
        (3, 4, False, True, ["columns"]),
        (4, 4, True, True, []),
        (2, 4, True, True, ["dense"]),
    ],
)
def test_where_a_product_is_used(used, side, n, training, bf16, expected):
    conv, x = small_conv().train(training), torch.randn(n, 8, side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = conv(x)
    assert used == expected and y.dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_a_network_is_the_same_network(used):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", in_chans=1, num_classes=7, zero_init_last=False)
    fast = speed_up_small_maps(copy.deepcopy(plain))
    assert list(fast.state_dict()) == list(plain.state_dict()) and not any(
        isinstance(m, SmallMapConv2d) for m in plain.modules()
    )
    x = torch.randn(8, 1, 48, 48)
    a, b = plain(x), fast(x)
    assert torch.allclose(a, b, atol=1e-5) and used
    a.logsumexp(1).sum().backward()
    b.logsumexp(1).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-4 * p.grad.norm(), name
    fast.load_state_dict(plain.state_dict())


def test_in_bfloat16_a_product_is_as_exact_as_a_convolution():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(64, 64, 3, padding=1, bias=False), torch.randn(16, 64, 3, 3)
    exact = F.conv2d(x.double(), conv.weight.double(), padding=1)

    def error(module):
        with torch.autocast("cpu", torch.bfloat16):
            return (module(x).double() - exact).norm() / exact.norm()

    assert error(speed_up_small_maps(nn.Sequential(copy.deepcopy(conv)))) <= 1.2 * error(conv) < 0.01


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_stays(layout, used):
    conv, x = small_conv(), torch.randn(4, 8, 2, 2).contiguous(memory_format=layout)
    assert conv(x).is_contiguous(memory_format=layout) and used == ["dense"]


def test_other_convolutions_are_left_alone():
    kinds = nn.Sequential(
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 8, 3),
    )
    assert not any(isinstance(m, SmallMapConv2d) for m in speed_up_small_maps(kinds))


def test_an_export_holds_the_plain_convolution(used):
    program = torch.export.export(small_conv(), (torch.randn(4, 8, 2, 2),))
    assert not used and "aten.conv2d" in str(program.graph)


@pytest.mark.parametrize(
    "able,expected", [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False, "amx_bf16": True}, "bf16")]
)
def test_bfloat16_is_taken_where_the_processor_has_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert fast_precision("cpu") == expected


def test_layout_follows_precision_and_processor(monkeypatch):
    for capability, expected in (("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        assert channels_last_is_faster("cpu", "fp32") is expected and channels_last_is_faster("cpu", "bf16")
    assert channels_last_is_faster("cuda", "bf16") and not channels_last_is_faster("cuda", "fp32")
