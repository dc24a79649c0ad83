import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ecan_fastai.losses import ECANLoss
from ecan_fastai.model import ECANModel, FaceClassifier, MemoryBank, resnet18_half
from ecan_fastai.weights import shipped_run


def tiny(**kwargs):
    return ECANModel(**{**dict(arch="resnet18", n_classes=3, in_chans=1, bank_size=10), **kwargs})


def pair(n=4, c=1):
    return torch.randn(n, c, 32, 32), torch.randn(n, c, 32, 32)


@pytest.mark.parametrize("size,batch", [(10, 4), (10, 5), (10, 10), (10, 13), (10, 27), (1, 3), (7, 1)])
def test_bank_holds_the_newest_rows_whatever_the_sizes(size, batch):
    bank, seen = MemoryBank(size, 2), []
    for i in range(6):
        y = torch.arange(i * batch, (i + 1) * batch)
        bank.push(torch.stack([y.float(), -y.float()], 1), y)
        seen += y.tolist()
        newest = seen[::-1][:size]
        assert bank.y[bank.order()].tolist() == newest
        assert bank.z[bank.order()][:, 0].tolist() == newest
        assert len(bank) == min(size, len(seen)) and bank.full == (len(seen) >= size)
        z, y = bank.rows()
        assert sorted(y.tolist()) == sorted(newest) and len(z) == len(bank)


def test_bank_keeps_float32_and_takes_half():
    bank = MemoryBank(4, 2)
    bank.push(torch.ones(2, 2, dtype=torch.float16), torch.zeros(2, dtype=torch.long))
    assert bank.z.dtype == torch.float32 and bank.half().z.dtype == torch.float32


def test_counters_of_the_bank_stay_on_the_cpu():
    bank = MemoryBank(4, 2).to("meta")
    assert bank.z.device.type == bank.y.device.type == "meta"
    assert bank.position.device.type == bank.filled.device.type == "cpu"


def test_a_saved_bank_of_other_features_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for z"):
        MemoryBank(4, 3).load_state_dict(MemoryBank(5, 2).state_dict())


def test_bank_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"features \(n, 2\)"):
        MemoryBank(4, 2).push(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one row"):
        MemoryBank(0, 2)


def test_train_mode_gives_what_the_loss_needs_and_eval_mode_logits():
    model, (x_q, x_k) = tiny(), pair()
    out = model((x_q, x_k))
    assert set(out) == {"logits", "z_q", "z_k", "bank_z", "bank_y", "bank_order", "centers"}
    assert (
        out["logits"].shape == (4, 3)
        and out["z_q"].shape == out["z_k"].shape == (4, 512)
        and out["bank_z"].shape == (0, 512)
    )
    assert out["z_q"].requires_grad and not out["z_k"].requires_grad
    model.eval()
    assert torch.equal(model((x_q, x_k)), model(x_q)) and model(x_q).shape == (4, 3)


def test_key_encoder_starts_as_a_copy_and_gets_no_gradient():
    model, x = tiny(), pair()
    for q, k in zip(model.encoder.parameters(), model.key_encoder.parameters()):
        assert torch.equal(q, k) and q is not k and not k.requires_grad
    model(x)["logits"].sum().backward()
    assert all(p.grad is None for p in model.key_encoder.parameters()) and all(
        p.grad is not None for p in model.encoder.parameters()
    )


def test_autocast_gives_half_features_a_float32_loss_and_a_float32_bank():
    model, y = tiny(), torch.tensor([0, 0, 1, 2])
    model.bank.push(torch.randn(10, 512), torch.arange(10) % 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(pair())
        loss = ECANLoss()(out, y)
    assert out["logits"].dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    model.bank.push(out["z_k"], y)
    assert model.bank.z.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in model.encoder.parameters())


def test_momentum_update_is_equation_1():
    model = tiny()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn_like(p))
    expected = [
        0.9 * k.double() + 0.1 * q.double() for q, k in zip(model.encoder.parameters(), model.key_encoder.parameters())
    ]
    stats = [b.clone() for b in model.key_encoder.buffers()]
    model.update_keys(0.9)
    assert all(torch.allclose(k.double(), e, atol=1e-6) for k, e in zip(model.key_encoder.parameters(), expected))
    assert all(torch.equal(a, b) for a, b in zip(stats, model.key_encoder.buffers()))


@pytest.mark.parametrize(
    "copied", [lambda m: copy.deepcopy(m), lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")]
)
def test_copies_keep_bank_counters_and_centers(copied):
    model = tiny()
    model.bank.push(torch.randn(13, 512), torch.arange(13))
    other = copied(model)
    assert (
        torch.equal(other.bank.z, model.bank.z)
        and torch.equal(other.bank.order(), model.bank.order())
        and torch.equal(other.centers, model.centers)
    )
    other.bank.push(torch.randn(1, 512), torch.tensor([99]))
    assert other.bank.y[other.bank.order()[0]] == 99


def test_state_dict_round_trip_goes_on_where_it_was():
    model, f = tiny(), io.BytesIO()
    model.bank.push(torch.randn(7, 512), torch.arange(7))
    torch.save(model.state_dict(), f)
    f.seek(0)
    other = tiny()
    other.load_state_dict(torch.load(f, weights_only=True))
    for m in (model, other):
        m.bank.push(torch.ones(5, 512), torch.arange(50, 55))
    assert (
        torch.equal(other.bank.z, model.bank.z)
        and torch.equal(other.bank.y, model.bank.y)
        and torch.equal(other.bank.order(), model.bank.order())
    )


def test_inference_is_a_copy_without_the_apparatus():
    model, (x, _) = tiny().eval(), pair()
    small = model.inference()
    assert torch.equal(small(x), model(x)) and not any(
        "key" in n or "bank" in n or "center" in n for n in small.state_dict()
    )
    with torch.no_grad():
        small.classifier.weight += 1
    assert not torch.equal(small(x), model(x))


def test_inference_with_the_key_encoder():
    model, (x, _) = tiny().eval(), pair()
    with torch.no_grad():
        for p in model.key_encoder.parameters():
            p.mul_(1.1)
    assert torch.equal(model.inference(key=True)(x), model.classifier(model.key_encoder(x))) and not torch.equal(
        model.inference(key=True)(x), model(x)
    )
    assert all(p.requires_grad for p in model.inference(key=True).parameters()) and not any(
        p.requires_grad for p in model.key_encoder.parameters()
    )


def test_key_encoder_in_evaluation_mode():
    "Keys do not depend on the batch, and the running statistics follow those of the query encoder by Eq. 1"
    model, (x_q, x_k) = ECANModel("resnet18", 3, 1, 10, key_eval=True), pair()
    assert (
        model.training
        and model.encoder.training
        and not any(m.training for m in model.key_encoder.modules())
        and not model.eval().train().key_encoder.training
    )
    before = [b.double() for b in model.key_encoder.buffers()]
    z_k = model((x_q, x_k))["z_k"]
    assert torch.allclose(model.keys(x_k[:1]), z_k[:1], atol=1e-5) and not torch.allclose(
        tiny().train().keys(x_k[:2]), tiny().train().keys(x_k)[:2], atol=1e-3
    )
    model.update_keys(0.9)
    for a, q, k in zip(before, model.encoder.buffers(), model.key_encoder.buffers()):
        assert torch.allclose(k.double(), 0.9 * a + 0.1 * q.double() if q.is_floating_point() else a, atol=1e-6)


def test_crops_are_averaged_in_evaluation_and_refused_in_training():
    model = FaceClassifier.create("resnet18", 3, 1).eval()
    x = torch.randn(2, 5, 1, 32, 32)
    assert torch.allclose(model(x), torch.stack([model(x[:, i]) for i in range(5)]).mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="CropsAsImages"):
        model.train()(x)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_resnet_from_scratch_starts_as_torchvisions(arch):
    torch.manual_seed(0)
    own, theirs = FaceClassifier.create(arch).encoder.state_dict(), getattr(torchvision.models, arch)().state_dict()
    assert set(theirs) - set(own) == {"fc.weight", "fc.bias"}
    for name, t in own.items():
        if t.ndim == 4:
            assert t.std().item() == pytest.approx(theirs[name].std().item(), rel=0.05)
        else:
            assert torch.equal(t, theirs[name]), name


@pytest.mark.parametrize(
    "arch,size",
    [("resnet18_cifar", 32), ("mobilenetv3_small_050", 64), ("efficientnet_lite0", 64), ("vit_tiny_patch16_224", 224)],
)
def test_other_backbones(arch, size):
    model = ECANModel(arch, n_classes=4, in_chans=3, bank_size=4)
    out = model((torch.randn(2, 3, size, size), torch.randn(2, 3, size, size)))
    assert out["logits"].shape == (2, 4) and out["z_q"].shape == out["z_k"].shape == (2, model.centers.shape[1])


def test_named_weights_bring_their_architecture_to_both_encoders():
    model = ECANModel(n_classes=7, in_chans=1, bank_size=4, pretrained="fer2013")
    shipped = load_file(shipped_run() / "model.safetensors")
    for encoder in (model.encoder, model.key_encoder):
        assert torch.equal(encoder.state_dict()["conv1.weight"], shipped["encoder.conv1.weight"].float())


def test_a_module_with_a_head_has_the_width_of_its_head():
    model = FaceClassifier.create(timm.create_model("resnet10t", num_classes=16), 7, 3)
    assert model.classifier.in_features == 16 and model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("arch", [resnet18_half, timm.models.resnet18])
def test_a_registered_function_is_the_same_as_its_name(arch):
    by_function, by_name = (FaceClassifier.create(a, 7, 1).state_dict() for a in (arch, arch.__name__))
    assert {k: v.shape for k, v in by_function.items()} == {k: v.shape for k, v in by_name.items()}


@pytest.mark.parametrize(
    "kwargs,said",
    [
        (dict(arch="resnet-18"), "timm has no model 'resnet-18'"),
        (dict(arch="resnet10t.none"), r"timm cannot make resnet10t.none: Invalid pretrained tag \(none\)"),
        (dict(in_chans=2), "in_chans must be 1 or 3, got 2"),
        (dict(n_classes=1), "at least 2 classes"),
        (dict(bank_size=0), "at least one row"),
    ],
)
def test_wrong_arguments_are_named(kwargs, said):
    with pytest.raises(ValueError, match=said):
        tiny(**kwargs)


# What a training step must not do


class HostReads(TorchDispatchMode):
    "Collects every operation whose result the program has to wait for on a device"

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.seen.append((name, args[0]))
        return func(*args, **(kwargs or {}))


def step(model, x, y):
    out = model(x)
    ECANLoss(n_groups=3)(out, y).backward()
    model.update_keys(0.9)
    model.bank.push(out["z_k"], y)


def test_a_step_reads_no_value_from_the_device():
    model, x, y = tiny(), pair(), torch.tensor([0, 0, 1, 2])
    for _ in range(3):
        model.bank.push(torch.randn(4, 512), y)
    with HostReads() as reads:
        step(model, x, y)
    counters = {model.bank.position.data_ptr(), model.bank.filled.data_ptr()}  # these two stay on the CPU
    assert reads.seen and all(t.data_ptr() in counters for _, t in reads.seen)
    with HostReads() as reads:
        x[0][x[0] > 0], y.sum().item()
    assert [name for name, _ in reads.seen] == ["index", "_local_scalar_dense"]


def test_a_step_copies_neither_the_bank_nor_the_keys():
    model = tiny(bank_size=64)
    model.bank.push(torch.randn(64, 512), torch.zeros(64, dtype=torch.long))
    out = model(pair())
    assert out["bank_z"].data_ptr() == model.bank.z.data_ptr() and out["bank_y"].data_ptr() == model.bank.y.data_ptr()
    where = [p.data_ptr() for p in model.key_encoder.parameters()]
    model.update_keys(0.9)
    assert where == [p.data_ptr() for p in model.key_encoder.parameters()]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_never_waits():
    model, x, y = tiny().cuda(), tuple(v.cuda() for v in pair()), torch.tensor([0, 0, 1, 2]).cuda()
    step(model, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
