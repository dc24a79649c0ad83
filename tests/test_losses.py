import math
import warnings

import naive_losses as naive
import numpy as np
import plain_losses as plain
import pytest
import torch
from torch.autograd import gradcheck

from ecan_fastai import losses
from ecan_fastai.losses import *

CLASSES = 7
RAFDB = np.array([4772, 2524, 1982, 1290, 717, 705, 281])


def draw(m, d, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    y = (
        torch.multinomial(torch.tensor(RAFDB / RAFDB.sum()), m, replacement=True, generator=g)
        if m
        else torch.zeros(0, dtype=torch.long)
    )
    return torch.randn(m, d, generator=g, dtype=torch.float64).to(dtype), y


def close(a, b, tol=1e-5):
    assert abs(float(a) - float(b)) <= tol * max(1, abs(float(b))), (float(a), float(b))


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("m,bank", [(2, 0), (8, 1), (24, 7), (40, 200)])
def test_contrastive_losses_match_the_equations(m, bank, tau):
    (z, y), (bz, by) = draw(m, 16), draw(bank, 16, seed=1)
    n = m // 2
    close(selfcon_loss(z[:n], z[n:], tau), naive.selfcon(z[:n].numpy(), z[n:].numpy(), tau))
    close(supcon_loss(z, y, tau), naive.supcon(z.numpy(), y.numpy(), tau))
    close(esc_loss(z, y, bz, tau), naive.esc(z.numpy(), y.numpy(), bz.numpy(), tau))
    close(ensc_loss(z, y, bz, by, tau), naive.ensc(z.numpy(), y.numpy(), bz.numpy(), by.numpy(), tau))


@pytest.mark.parametrize("tau,normalize", [(0.01, True), (0.1, True), (2.0, False)])
@pytest.mark.parametrize("m,bank", [(1, 3), (2, 0), (24, 7), (40, 200)])
def test_bank_entries_as_positives_of_some_classes(m, bank, tau, normalize):
    (z, y), (bz, by) = draw(m, 16), draw(bank, 16, seed=1)
    for classes in (np.arange(CLASSES) > 2, np.arange(CLASSES) == 0, np.ones(CLASSES, bool)):
        close(
            ensc_loss(z, y, bz, by, tau, normalize, torch.tensor(classes)),
            naive.ensc_with_positives(z.numpy(), y.numpy(), bz.numpy(), by.numpy(), tau, classes, normalize=normalize),
        )
    assert ensc_loss(z, y, bz, by, tau, normalize, torch.zeros(CLASSES, dtype=torch.bool)) == ensc_loss(
        z, y, bz, by, tau, normalize
    )


def test_an_anchor_that_is_alone_in_the_batch_learns_from_the_bank():
    z, y, bz, by = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2]),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([1]),
    )
    v, g = value_and_gradient(ensc_loss, z, y, bz, by, 0.1, True, torch.tensor([False, True, False]))
    assert v > 0 and (g @ bz.T)[1] < 0  # a step down goes towards the entry


def test_unnormalised_features():
    (z, y), (bz, by) = draw(20, 6), draw(9, 6, seed=1)
    close(supcon_loss(z, y, 2.0, normalize=False), naive.supcon(z.numpy(), y.numpy(), 2.0, normalize=False))
    close(esc_loss(z, y, bz, 2.0, normalize=False), naive.esc(z.numpy(), y.numpy(), bz.numpy(), 2.0, normalize=False))
    close(
        ensc_loss(z, y, bz, by, 2.0, normalize=False),
        naive.ensc(z.numpy(), y.numpy(), bz.numpy(), by.numpy(), 2.0, normalize=False),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_compactness_losses_match_the_equations(reduction):
    (x, y), (g, gy) = draw(10, 12), draw(30, 12, seed=1)
    c = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(2))
    groups, labels = g.view(3, 10, 12), gy.view(3, 10)
    close(center_loss(x, y, c), naive.center(x.numpy(), y.numpy(), c.numpy()))
    close(affinity_loss(x, y, c, reduction), naive.affinity(x.numpy(), y.numpy(), c.numpy(), reduction))
    close(
        mva_loss(x, y, c, groups, labels, reduction),
        naive.mva(x.numpy(), y.numpy(), c.numpy(), groups.numpy(), labels.numpy(), reduction),
    )
    close(
        mva_loss(x, y, c, groups[:0], labels[:0], reduction), naive.affinity(x.numpy(), y.numpy(), c.numpy(), reduction)
    )


def test_mva_weight():
    close(mva_weight(torch.tensor([1.0, 3.0])), 2)
    close(mva_weight(torch.tensor([5.0])), 1)
    losses = torch.tensor([0.5, 2.0, 7.0], requires_grad=True)
    assert not mva_weight(losses).requires_grad
    close(mva_weight(losses), naive.alpha([0.5, 2.0, 7.0]))


def test_a_batch_of_one_class_has_no_true_negative_of_that_class_in_the_bank():
    z, bz = draw(6, 8)[0], draw(5, 8, seed=1)[0]
    y, by = torch.full((6,), 3), torch.tensor([3, 3, 3, 0, 1])
    close(ensc_loss(z, y, bz, by), naive.ensc(z.numpy(), y.numpy(), bz.numpy(), by.numpy(), 0.1))
    close(ensc_loss(z, y, bz[:3], by[:3]), supcon_loss(z, y))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: supcon_loss(z, torch.arange(len(z))),
        lambda z: ensc_loss(z, torch.arange(len(z)), z.detach(), torch.arange(len(z))),
    ],
)
@pytest.mark.parametrize("m", [1, 5])
def test_without_any_positive_the_loss_is_zero_and_connected(loss, m):
    z = draw(m, 4)[0].requires_grad_()
    value = loss(z)
    value.backward()
    assert value == 0 and torch.isfinite(z.grad).all() and (z.grad == 0).all()


def test_anchors_without_positive_do_not_dilute_the_mean():
    z, y = draw(6, 8)[0], torch.tensor([0, 0, 1, 1, 2, 3])
    close(supcon_loss(z, y), naive.supcon(z.numpy(), y.numpy(), 0.1))
    assert naive.supcon(z.numpy(), y.numpy(), 0.1) > 0


@pytest.mark.parametrize("dtype,tol", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_input_is_computed_in_float32(dtype, tol):
    (z, y), (bz, by) = draw(24, 16), draw(50, 16, seed=1)
    c = draw(7, 16, seed=2)[0]
    for loss in (
        lambda t: ensc_loss(t(z), y, t(bz), by, 0.05),
        lambda t: ensc_loss(z=t(z), y=y, bank_z=t(bz), bank_y=by, center=t(bz.mean(0))),
        lambda t: supcon_loss(t(z), y),
        lambda t: affinity_loss(t(z), y, t(c)),
        lambda t: center_loss(t(z), y, t(c)),
    ):
        low = loss(lambda t: t.to(dtype))
        assert low.dtype == torch.float32
        close(low, loss(lambda t: t.to(dtype).float()), 1e-6)
        close(low, loss(lambda t: t), tol)


def test_mean_cosines_are_computed_in_float32():
    z, y = draw(24, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mean_cosines(z, y)
    assert cast == mean_cosines(z, y) and cast[0].dtype == torch.float32


def test_the_centre_is_a_constant():
    (z, y), (bz, by) = draw(24, 16), draw(50, 16, seed=1)
    center = bz.mean(0).requires_grad_()
    ensc_loss(z.requires_grad_(), y, bz, by, center=center).backward()
    assert center.grad is None and z.grad.abs().sum() > 0


def test_autocast_does_not_lower_the_losses_precision():
    (z, y), (bz, by) = draw(64, 64), draw(300, 64, seed=1)
    plain = ensc_loss(z, y, bz, by, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ensc_loss(z, y, bz, by, 0.05)
    assert cast == plain


def test_gradients():
    (z, y), (bz, by) = draw(7, 4, dtype=torch.float64), draw(5, 4, seed=1, dtype=torch.float64)
    y, by = torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 2, 1])
    c = draw(3, 4, seed=2, dtype=torch.float64)[0].requires_grad_()
    z.requires_grad_()
    assert gradcheck(lambda z: selfcon_loss(z[:3], z[3:6]), (z,))
    assert gradcheck(lambda z: supcon_loss(z, y), (z,))
    assert gradcheck(lambda z: esc_loss(z, y, bz), (z,))
    assert gradcheck(lambda z: ensc_loss(z, y, bz, by), (z,))
    assert gradcheck(lambda z: ensc_loss(z, y, bz, by, bank_positives=torch.tensor([False, True, True])), (z,))
    assert gradcheck(lambda z, c: center_loss(z, y, c), (z, c))
    assert gradcheck(lambda z, c: affinity_loss(z, y, c), (z, c))
    assert gradcheck(lambda z, c: affinity_loss(z, y, c, "sum"), (z, c))


RARE = torch.arange(CLASSES) > 1

FORMS = {
    "supcon": (lambda z, y, bz, by, *a: supcon_loss(z, y, *a), lambda z, y, bz, by, *a: plain.contrast(z, y, *a)),
    "esc": (lambda z, y, bz, by, *a: esc_loss(z, y, bz, *a), lambda z, y, bz, by, *a: plain.contrast(z, y, *a, bz)),
    "ensc": (ensc_loss, lambda z, y, bz, by, *a: plain.contrast(z, y, *a, bz, by)),
    "positives": (lambda *a: ensc_loss(*a, RARE), lambda z, y, bz, by, *a: plain.contrast(z, y, *a, bz, by, RARE)),
    "anchors": (
        lambda *a: ensc_loss(*a, anchors_only=True),
        lambda z, y, bz, by, *a: plain.contrast(z, y, *a, bz, by, anchors_only=True),
    ),
    "supcon, anchors": (
        lambda z, y, bz, by, *a: supcon_loss(z, y, *a, True),
        lambda z, y, bz, by, *a: plain.contrast(z, y, *a, anchors_only=True),
    ),
    "esc, anchors": (
        lambda z, y, bz, by, *a: esc_loss(z, y, bz, *a, True),
        lambda z, y, bz, by, *a: plain.contrast(z, y, *a, bz, anchors_only=True),
    ),
    "positives, anchors": (
        lambda *a: ensc_loss(*a, RARE, True),
        lambda z, y, bz, by, *a: plain.contrast(z, y, *a, bz, by, RARE, True),
    ),
}


def value_and_gradient(loss, z, *args):
    z = z.clone().requires_grad_()
    value = loss(z, *args)
    value.backward()
    return value.detach(), z.grad


@pytest.mark.parametrize(
    "tau,normalize", [(0.002, True), (0.02, True), (0.05, True), (1.0, True), (0.05, False), (3.0, False)]
)
@pytest.mark.parametrize(
    "m,bank,rows", [(1, 0, 4), (2, 9, 4), (9, 0, 4), (30, 1, 4), (30, 64, 64), (30, 65, 64), (30, 500, 7)]
)
@pytest.mark.parametrize("form", FORMS)
def test_streamed_loss_is_the_plain_one(form, m, bank, rows, tau, normalize, monkeypatch):
    monkeypatch.setattr(losses, "_chunk_rows", lambda z: rows)
    (z, y), (bz, by) = draw(m, 6, dtype=torch.float64), draw(bank, 6, seed=1, dtype=torch.float64)
    streamed, plainly = FORMS[form]
    (v, g), (v0, g0) = (
        value_and_gradient(streamed, 3 * z, y, bz, by, tau, normalize),
        value_and_gradient(plainly, 3 * z, y, bz, by, tau, normalize),
    )
    assert torch.allclose(v, v0, rtol=1e-9, atol=1e-12) and torch.allclose(
        g, g0, rtol=1e-7, atol=1e-9 * max(1, float(g0.abs().max()))
    )


@pytest.mark.parametrize("tau", [1 / 41, 1 / 60, 1 / 88, 1 / 89, 1 / 94, 1 / 200])
def test_small_temperatures_do_not_overflow_in_float32(tau):
    "All features alike: every similarity is 1, and the loss of an anchor the logarithm of what it is compared with"
    z = torch.ones(40, 4).requires_grad_()
    y, bank_y = torch.arange(40) % 2, torch.arange(300) % 3
    value = supcon_loss(z, y, tau)
    assert value.item() == pytest.approx(math.log(39), rel=1e-5)
    value = ensc_loss(z, y, torch.ones(300, 4), bank_y, tau)  # 200 rows of the bank have another label
    assert value.item() == pytest.approx(math.log(39 + 200), rel=1e-5)
    value.backward()
    assert z.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("d,bank", [(128, 6000), (512, 1280)])
def test_float32_keeps_five_digits_of_value_and_gradient(d, bank, tau):
    (z, y), (bz, by) = draw(512, d), draw(bank, d, seed=1)
    z = (
        z + 2 * torch.randn(CLASSES, d, generator=torch.Generator().manual_seed(5))[y]
    )  # classes that lie apart, as in training
    v, g = value_and_gradient(ensc_loss, z, y, bz, by, tau)
    v0, g0 = value_and_gradient(lambda z, *a: plain.contrast(z, y, tau, True, bz.double(), by), z.double())
    close(v, v0)
    assert (g - g0).abs().max() <= 1e-5 * g0.abs().max()


def test_an_excluded_entry_far_above_all_others_is_no_part_of_the_loss():
    z, y = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]]), torch.tensor([0, 0, 1])
    near, far = torch.tensor([[1e6, 0.0]]), torch.tensor([[0.0, 1.0]])
    for tau in (1e-3, 1.0):
        v, g = value_and_gradient(ensc_loss, z, y, torch.cat([near, far]), torch.tensor([0, 1]), tau, False)
        v0, g0 = value_and_gradient(ensc_loss, z, y, far, torch.tensor([1]), tau, False)
        assert torch.isfinite(v) and v == v0 and torch.equal(g, g0)


def test_memory_does_not_grow_with_the_bank():
    z, y = draw(512, 64)

    def peak(bank):
        bz, by = draw(bank, 64, seed=1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
            value_and_gradient(ensc_loss, z, y, bz, by, 0.1)
        held = [
            e.nbytes()
            for e in sorted(
                (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
            )
        ]
        return np.cumsum(held).max() / 2**20

    assert peak(32768) < peak(2048) + 0.5 < 12.5


def test_where_the_bank_takes_the_push_only_the_pull_is_left():
    """All alike, half of each denominator in the bank: what is compared with has 1/4 anchor times (3/6 push - 1
    pull), anchors have 0"""
    z, y, bz, by = torch.ones(4, 1), torch.tensor([0, 0, 1, 1]), torch.ones(6, 1), torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.allclose(value_and_gradient(ensc_loss, z, y, bz, by, 1.0, False)[1], torch.full((4, 1), -1 / 8))
    for loss in (
        lambda z: supcon_loss(z, y, 1.0, False),
        lambda z: ensc_loss(z, y, bz, by, 1.0, False, anchors_only=True),
    ):
        assert torch.allclose(value_and_gradient(loss, z)[1], torch.zeros(4, 1), atol=1e-7)


def test_second_derivative_is_refused():
    z, y = draw(6, 4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(supcon_loss(z.requires_grad_(), y % 2), z, create_graph=True)


def test_mva_gradient_is_alpha_times_that_of_affinity():
    (x, y), (g, gy) = draw(8, 5, dtype=torch.float64), draw(16, 5, seed=1, dtype=torch.float64)
    c = draw(7, 5, seed=2, dtype=torch.float64)[0]

    def grads(loss):
        leaf_x, leaf_c = x.clone().requires_grad_(), c.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf_x, leaf_c), (leaf_x, leaf_c))

    groups, labels = g.view(2, 8, 5), gy.view(2, 8)
    a = naive.mva(x.numpy(), y.numpy(), c.numpy(), groups.numpy(), labels.numpy()) / naive.affinity(
        x.numpy(), y.numpy(), c.numpy()
    )
    for whole, plain in zip(
        grads(lambda x, c: mva_loss(x, y, c, groups, labels)), grads(lambda x, c: affinity_loss(x, y, c))
    ):
        assert torch.allclose(whole, a * plain)


def output(n=8, d=16, bank=30, seed=0):
    (z, y), (zk, _), (bz, by) = draw(n, d, seed), draw(n, d, seed + 1), draw(bank, d, seed + 2)
    c = draw(CLASSES, d, seed + 3)[0]
    logits = torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(bank, generator=torch.Generator().manual_seed(seed))
    return dict(logits=logits, z_q=z, z_k=zk, bank_z=bz, bank_y=by, bank_order=order, centers=c), y


def naive_total(out, y, l1, l2, n_groups, tau, reduction="mean"):
    o = {k: v.numpy() for k, v in out.items()}
    y, n = y.numpy(), len(y)
    whole = min(n_groups - 1, len(o["bank_order"]) // n)
    rows = o["bank_order"][: whole * n].reshape(whole, n)
    m = naive.mva(o["z_q"], y, o["centers"], o["bank_z"][rows], o["bank_y"][rows], reduction)
    e = naive.ensc(np.concatenate([o["z_q"], o["z_k"]]), np.concatenate([y, y]), o["bank_z"], o["bank_y"], tau)
    return (1 - l1) * naive.cross_entropy(o["logits"], y) + l1 * e + l2 * m


@pytest.mark.parametrize("bank", [0, 7, 8, 30, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ecan_loss_is_equation_11(bank, reduction):
    out, y = output(bank=bank)
    close(
        ECANLoss(0.3, 0.5, 4, 0.2, reading=PaperReading(affinity_reduction=reduction))(out, y),
        naive_total(out, y, 0.3, 0.5, 4, 0.2, reduction),
    )


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("compact", COMPACTS)
def test_gradient_of_ecan_loss_is_the_sum_of_its_terms(contrast, compact):
    out, y = output()
    out = {k: v.double() if v.is_floating_point() else v for k, v in out.items()}
    leaves = [out[k].requires_grad_() for k in ("logits", "z_q", "centers")]
    bank = {} if contrast == "supcon" else dict(bank_z=out["bank_z"])
    if contrast == "ensc":
        bank["bank_y"] = out["bank_y"]
    contrastive = plain.contrast(torch.cat([out["z_q"], out["z_k"]]), torch.cat([y, y]), 0.1, **bank)
    x, own = out["z_q"], out["centers"][y]
    affinity = (x - own).pow(2).sum(1).mean() / out["centers"].var(0).sum()
    rows = out["bank_order"][:24].view(3, 8)
    alpha = (
        naive.mva(*[v.detach().numpy() for v in (x, y, out["centers"], out["bank_z"][rows], out["bank_y"][rows])])
        / affinity.item()
    )
    term = dict(mva=alpha * affinity, affinity=affinity, center=(x - own).pow(2).sum(1).mean() / 2)[compact]
    expected = torch.autograd.grad(
        0.7 * torch.nn.functional.cross_entropy(out["logits"], y) + 0.3 * contrastive + 0.5 * term, leaves
    )
    if compact == "center":
        expected = [*expected[:2], expected[2] / 0.5]  # the centres move at the full rate
    total = ECANLoss(0.3, 0.5, contrast=contrast, compact=compact)(out, y)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(torch.autograd.grad(total, leaves), expected))


def test_groups_are_the_newest_rows_of_the_bank():
    out, y = output(n=4, bank=10)
    far = out["bank_order"][8:]  # the two oldest of ten rows: no part of two whole groups of four
    before = ECANLoss(l1=0, n_groups=9)(out, y)
    out["bank_z"][far] = 1000.0
    assert ECANLoss(l1=0, n_groups=9)(out, y) == before
    out["bank_z"][out["bank_order"][7]] = 1000.0
    assert ECANLoss(l1=0, n_groups=9)(out, y) > before


def test_ecan_loss_parts_reductions_and_contract():
    out, y = output()
    loss = ECANLoss()
    total = loss(out, y)
    p = loss.parts
    assert list(p) == loss.part_names == ["ce", "ensc", "mva", "alpha", "cos_within", "cos_between"] and not any(
        v.requires_grad for v in p.values()
    )
    close(total, 0.8 * p["ce"] + 0.2 * p["ensc"] + 0.7 * p["mva"])
    loss.reduction = "none"
    each = loss(out, y)
    assert each.shape == (8,)
    close(each.mean(), total)
    loss.reduction = "sum"
    close(loss(out, y), 8 * total)
    assert torch.allclose(loss.activation(out["logits"]).sum(1), torch.ones(8))
    assert (loss.decodes(out["logits"]) == out["logits"].argmax(1)).all()


def test_class_weights_are_those_of_torch():
    out, y = output(n=20)
    w = 1 / RAFDB * 1000
    ce = torch.nn.functional.cross_entropy(out["logits"], y, torch.tensor(w, dtype=torch.float32))
    loss = ECANLoss(weight=w)
    close(loss(out["logits"], y), ce)
    total, parts = loss(out, y), loss.parts
    close(parts["ce"], ce)
    close(total, 0.8 * ce + 0.2 * parts["ensc"] + 0.7 * parts["mva"])
    shares = torch.softmax(torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(3)), 1)
    loss(out, shares)
    close(
        loss.parts["ce"], torch.nn.functional.cross_entropy(out["logits"], shares, torch.tensor(w, dtype=torch.float32))
    )
    assert not loss.state_dict()
    for reduction in ("none", "sum"):
        loss.reduction = reduction
        own = torch.nn.functional.cross_entropy(
            out["logits"], y, torch.tensor(w, dtype=torch.float32), reduction=reduction
        )
        assert torch.allclose(ECANLoss(l1=0, l2=0, weight=w, reduction=reduction)(out, y), own) and torch.allclose(
            loss(out["logits"], y), own
        )


def test_ecan_loss_with_bank_positives():
    out, y = output()
    z, yy = torch.cat([out["z_q"], out["z_k"]]), torch.cat([y, y])
    close(
        ECANLoss(l2=0, bank_positives=RARE)(out, y),
        0.8 * torch.nn.functional.cross_entropy(out["logits"], y)
        + 0.2 * ensc_loss(z, yy, out["bank_z"], out["bank_y"], bank_positives=RARE),
    )


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_ecan_loss_with_its_gradient_through_anchors_alone(contrast):
    out, y = output()
    bank = {} if contrast == "supcon" else dict(bank_z=out["bank_z"])
    if contrast == "ensc":
        bank["bank_y"] = out["bank_y"]
    ce = torch.nn.functional.cross_entropy(out["logits"], y)
    total = lambda z, alone: ECANLoss(0.3, 0, contrast=contrast, reading=PaperReading(anchors_only=alone))(
        {**out, "z_q": z}, y
    )
    twin = lambda z: (
        0.7 * ce + 0.3 * plain.contrast(torch.cat([z, out["z_k"]]), torch.cat([y, y]), 0.1, **bank, anchors_only=True)
    )
    (v, g), (v0, g0), (v_all, g_all) = (
        value_and_gradient(total, out["z_q"], True),
        value_and_gradient(twin, out["z_q"]),
        value_and_gradient(total, out["z_q"], False),
    )
    close(v, v0)
    assert v == v_all and torch.allclose(g, g0, atol=1e-6) and (g - g_all).norm() > 0.1 * g.norm()


@pytest.mark.parametrize("compact", COMPACTS)
def test_compactness_on_normalised_features(compact):
    out, y = output()
    unit = lambda z: z / z.norm(dim=1, keepdim=True)
    normalised = {**out, "z_q": unit(out["z_q"]), "bank_z": unit(out["bank_z"])}
    assert torch.allclose(
        ECANLoss(l1=0, compact=compact, reading=PaperReading(normalize_compact=True))(out, y),
        ECANLoss(l1=0, compact=compact)(normalised, y),
    )
    assert not torch.allclose(ECANLoss(l1=0, compact=compact)(out, y), ECANLoss(l1=0, compact=compact)(normalised, y))


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_ecan_loss_on_logits_is_cross_entropy(reduction):
    out, y = output()
    expected = torch.nn.functional.cross_entropy(out["logits"], y, reduction=reduction)
    assert torch.allclose(ECANLoss(reduction=reduction)(out["logits"], y), expected)


def test_rows_of_table_3():
    out, y = output()
    z, yy = torch.cat([out["z_q"], out["z_k"]]), torch.cat([y, y])
    ce = torch.nn.functional.cross_entropy(out["logits"], y)
    close(ECANLoss(l1=0, l2=0)(out, y), ce)
    close(ECANLoss(l1=0, l2=0.003, compact="center")(out, y), ce + 0.003 * center_loss(out["z_q"], y, out["centers"]))
    close(ECANLoss(l2=0, contrast="supcon")(out, y), 0.8 * ce + 0.2 * supcon_loss(z, yy))
    close(ECANLoss(l2=0, contrast="esc")(out, y), 0.8 * ce + 0.2 * esc_loss(z, yy, out["bank_z"]))
    close(ECANLoss(l2=0)(out, y), 0.8 * ce + 0.2 * ensc_loss(z, yy, out["bank_z"], out["bank_y"]))
    close(ECANLoss(l1=0, compact="affinity")(out, y), ce + 0.7 * affinity_loss(out["z_q"], y, out["centers"]))
    assert ECANLoss(l2=0).part_names == ["ce", "ensc", "cos_within", "cos_between"]
    assert ECANLoss(l1=0, compact="center").part_names == ["ce", "center"]


# Centred features


@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("bank", [1, 9, 500])
def test_centred_losses_are_the_equations_on_centred_features(bank, tau):
    (z, y), (bz, by) = draw(24, 16, dtype=torch.float64), draw(bank, 16, seed=1, dtype=torch.float64)
    z, bz, center = z + 3, bz + 3, torch.full((16,), 2.5, dtype=torch.float64)
    moved, moved_bank = (z - center).numpy(), (bz - center).numpy()
    close(esc_loss(z, y, bz, tau, center=center), naive.esc(moved, y.numpy(), moved_bank, tau), 1e-9)
    close(ensc_loss(z, y, bz, by, tau, center=center), naive.ensc(moved, y.numpy(), moved_bank, by.numpy(), tau), 1e-9)
    rare = naive.ensc_with_positives(moved, y.numpy(), moved_bank, by.numpy(), tau, RARE.numpy())
    close(ensc_loss(z, y, bz, by, tau, bank_positives=RARE, center=center), rare, 1e-9)


@pytest.mark.parametrize("form", ["ensc", "anchors", "positives"])
def test_the_centre_is_a_constant_of_the_gradient(form):
    (z, y), (bz, by) = draw(30, 6, dtype=torch.float64), draw(65, 6, seed=1, dtype=torch.float64)
    center = bz.mean(0)
    options = dict(ensc={}, anchors=dict(anchors_only=True), positives=dict(bank_positives=RARE))[form]
    v, g = value_and_gradient(lambda z: ensc_loss(z, y, bz, by, 0.1, center=center, **options), z)
    v0, g0 = value_and_gradient(lambda z: plain.contrast(z - center, y, 0.1, True, bz - center, by, **options), z)
    assert torch.allclose(v, v0, rtol=1e-9) and torch.allclose(g, g0, rtol=1e-7, atol=1e-10)


def test_a_shift_of_all_features_changes_nothing_once_they_are_centred():
    out, y = output(bank=40)
    far = {**out, **{k: out[k] + 5 for k in ("z_q", "z_k", "bank_z")}}
    centred, paper = ECANLoss(l2=0, center_features=True), ECANLoss(l2=0)
    close(centred(far, y), centred(out, y), 1e-4)
    assert abs(paper(far, y) - paper(out, y)) > 0.1


def test_ecan_loss_centres_on_the_bank():
    out, y = output(bank=40)
    mu = out["bank_z"].mean(0)
    moved = {**out, **{k: out[k] - mu for k in ("z_q", "z_k", "bank_z")}}
    for contrast in ("ensc", "esc"):
        found, expected = ECANLoss(l2=0, contrast=contrast, center_features=True), ECANLoss(l2=0, contrast=contrast)
        close(found(out, y), expected(moved, y))
        for k in ("cos_within", "cos_between"):
            close(found.parts[k], expected.parts[k])
    empty = output(bank=0)[0]
    close(ECANLoss(l2=0, center_features=True)(empty, y), ECANLoss(l2=0)(empty, y))


def test_mean_cosines():
    z, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1, 1])
    within, between = mean_cosines(z, y)
    close(within, (0 - 1) / 2)
    close(between, (1 - 1 + 0 + 0) / 4)
    assert mean_cosines(z[:1], y[:1])[0].isnan()
    (z, y), c = draw(20, 5), torch.ones(5)
    u = naive.unit((z - c).numpy())
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    for found, same in zip(mean_cosines(z, y, c), (True, False)):
        close(found, np.mean([u[i] @ u[j] for i, j in pairs if (y[i] == y[j]) == same]))


def test_label_smoothing_is_torchs():
    out, y = output()
    expected = torch.nn.functional.cross_entropy(out["logits"], y, label_smoothing=0.2)
    loss = ECANLoss(l1=0, l2=0, label_smoothing=0.2)
    close(loss(out, y), expected)
    close(loss(out["logits"], y), expected)


def test_modules_are_their_functions():
    (z, y), (bz, by) = draw(10, 8), draw(12, 8, seed=1)
    c, groups, labels = draw(7, 8, seed=2)[0], bz[:10][None], by[:10][None]
    assert SupConLoss(0.2)(z, y) == supcon_loss(z, y, 0.2)
    assert ESCLoss(0.2)(z, y, bz) == esc_loss(z, y, bz, 0.2)
    assert ENSCLoss(0.2, normalize=False)(z, y, bz, by) == ensc_loss(z, y, bz, by, 0.2, False)
    assert ENSCLoss(0.2)(z, y, bz, by, RARE) == ensc_loss(z, y, bz, by, 0.2, bank_positives=RARE)
    for module, loss, *bank in ((SupConLoss, supcon_loss), (ESCLoss, esc_loss, bz), (ENSCLoss, ensc_loss, bz, by)):
        of_module, of_loss, of_all = [
            value_and_gradient(f, z, y, *bank)[1]
            for f in (module(anchors_only=True), lambda *a: loss(*a, anchors_only=True), loss)
        ]
        assert torch.equal(of_module, of_loss) and not torch.equal(of_loss, of_all)
    assert CenterLoss()(z, y, c) == center_loss(z, y, c)
    assert AffinityLoss("sum")(z, y, c) == affinity_loss(z, y, c, "sum")
    assert MVALoss("sum")(z, y, c, groups, labels) == mva_loss(z, y, c, groups, labels, "sum")


def test_ecan_loss_is_composed_of_the_modules():
    reading = PaperReading(affinity_reduction="sum", anchors_only=True)
    (out, y), loss = output(), ECANLoss(0.3, 0.5, 3, 0.2, reading=reading)
    assert type(loss.contrast_loss) is ENSCLoss and type(loss.compact_loss) is MVALoss
    assert (loss.contrast_loss.temperature, loss.contrast_loss.anchors_only, loss.compact_loss.reduction) == (
        0.2,
        True,
        "sum",
    )
    before = loss(out, y)
    loss.contrast_loss.temperature = 0.4  # what the modules hold is what counts
    assert loss(out, y) != before
    close(loss.parts["alpha"], loss.compact_loss.alpha)


def test_every_parameter_of_the_model_is_in_the_graph_without_compactness():
    out, y = output()
    centers = out["centers"].clone().requires_grad_()
    loss = ECANLoss(l2=0)({**out, "centers": centers}, y)
    assert torch.equal(torch.autograd.grad(loss, centers)[0], torch.zeros_like(centers))
    assert loss == ECANLoss(l2=0)(out, y)


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda: supcon_loss(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)), "as many labels"),
        (lambda: supcon_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), temperature=0), "temperature"),
        (lambda: selfcon_loss(torch.zeros(3, 2), torch.zeros(2, 2)), "two views of the same shape"),
        (
            lambda: ensc_loss(
                torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)
            ),
            "bank_z",
        ),
        (
            lambda: esc_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, 4)),
            r"bank_z of shape \(B, 2\)",
        ),
        (
            lambda: affinity_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(1, 2)),
            "at least 2 classes",
        ),
        (
            lambda: affinity_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(2, 2), "max"),
            "reduction",
        ),
        (
            lambda: center_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(2, 3)),
            r"centers of shape \(C, 2\)",
        ),
        (
            lambda: ensc_loss(
                torch.zeros(3, 2),
                torch.zeros(3, dtype=torch.long),
                torch.zeros(1, 2),
                torch.zeros(1, dtype=torch.long),
                bank_positives=torch.tensor([1, 2]),
            ),
            "True or False for each class",
        ),
        (lambda: ECANLoss(bank_positives=[0, 2]), "True or False for each class"),
        (lambda: ECANLoss(bank_positives=[True] * 3)(*output()), r"of shape \(7,\), True or False"),
        (lambda: ECANLoss(contrast="supcon", bank_positives=[True, False]), "option of contrast 'ensc'"),
        (lambda: ECANLoss(contrast="supcon", center_features=True), "has no bank"),
        (lambda: ECANLoss(label_smoothing=2), "label_smoothing"),
        (
            lambda: esc_loss(
                torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2), center=torch.zeros(3)
            ),
            r"center of shape \(2,\)",
        ),
        (
            lambda: mva_loss(
                torch.zeros(3, 2),
                torch.zeros(3, dtype=torch.long),
                torch.zeros(2, 2),
                torch.zeros(4, 3, 2),
                torch.zeros(3, 3, dtype=torch.long),
            ),
            r"groups of shape \(V-1, n, 2\) and as many labels",
        ),
        (lambda: PaperReading(affinity_reduction="max"), "reduction must be .mean. or .sum., got .max."),
        (lambda: ECANLoss(l1=2), "between 0 and 1"),
        (lambda: ECANLoss(l2=-1), "negative"),
        (lambda: ECANLoss(n_groups=0), "a whole number from 1, got 0"),
        (lambda: ECANLoss(n_groups=2.5), "a whole number from 1, got 2.5"),
        (lambda: ECANLoss(contrast="simclr"), "ensc, esc, supcon"),
        (lambda: ECANLoss(compact="island"), "mva, affinity, center"),
    ],
)
def test_wrong_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(l1=0, temperature=0.2), "no effect with l1=0: temperature$"),
        (
            dict(l1=0, bank_positives=RARE, center_features=True),
            "no effect with l1=0: bank_positives, center_features$",
        ),
        (dict(l1=0, reading=PaperReading(anchors_only=True)), "no effect with l1=0: anchors_only$"),
        (dict(l1=0, contrast="supcon"), "no effect with l1=0: contrast$"),
        (dict(l2=0, n_groups=3), "no effect with l2=0: n_groups$"),
        (dict(l2=0, compact="center"), "no effect with l2=0: compact$"),
        (
            dict(l2=0, reading=PaperReading(affinity_reduction="sum", normalize_compact=True)),
            "no effect with l2=0: normalize_compact, affinity_reduction$",
        ),
        (dict(compact="affinity", n_groups=3), "no effect with compact='affinity': n_groups$"),
        (
            dict(compact="center", reading=PaperReading(affinity_reduction="sum")),
            "no effect with compact='center': affinity_reduction$",
        ),
    ],
)
def test_an_option_that_changes_nothing_warns(options, said):
    with pytest.warns(UserWarning, match=said) as seen:
        loss = ECANLoss(**options)
    assert len(seen) == 1
    out, y = output()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = ECANLoss(**{k: v for k, v in options.items() if f"{k}=" in said})
    assert loss(out, y) == plain(out, y)


def test_a_loss_without_cross_entropy_warns():
    with pytest.warns(UserWarning, match="l1=1 leaves no weight for cross-entropy: the classifier is not trained$"):
        ECANLoss(l1=1)


def test_a_whole_number_of_groups_may_be_a_float():
    out, y = output()
    assert ECANLoss(n_groups=2.0)(out, y) == ECANLoss(n_groups=2)(out, y)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.2, n_groups=3, center_features=True, bank_positives=RARE),
        dict(reading=PaperReading(True, True, "sum", True)),
        dict(compact="affinity", reading=PaperReading(affinity_reduction="sum")),
        dict(compact="center", reading=PaperReading(normalize_compact=True)),
        dict(l1=0, n_groups=3),
        dict(l2=0, temperature=0.2),
    ],
)
def test_an_option_that_changes_something_does_not_warn(options):
    (out, y), kept = output(), ("l1", "l2", "compact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, plain = ECANLoss(**options), ECANLoss(**{k: v for k, v in options.items() if k in kept})
    z = [o["z_q"].requires_grad_() for o in (dict(out, z_q=out["z_q"].detach().clone()) for _ in range(2))]
    grads = [torch.autograd.grad(one(dict(out, z_q=v), y), v)[0] for one, v in zip((loss, plain), z)]
    assert not torch.allclose(*grads)
