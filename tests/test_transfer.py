import argparse
import json
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from small_runs import small_config

from ecan_fastai import runs
from ecan_fastai.learner import baseline_learner, ecan_learner
from ecan_fastai.model import ECANModel, FaceClassifier, load_encoder
from ecan_fastai.runs import resolve_config, resume_run, start_run


def face_network():
    "A face-recognition network as it is passed around: torchvision's names, another head"
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=100)


def checkpoint(tmp_path, net, wrap="state_dict", prefix="module."):
    state = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save({wrap: state, "epoch": 7} if wrap else state, tmp_path / "net.pth")
    return tmp_path / "net.pth"


@pytest.mark.parametrize(
    "wrap,prefix",
    [
        (None, ""),
        ("state_dict", ""),
        ("state_dict", "module."),
        ("model_state_dict", "module.encoder."),
        ("model", "backbone."),
        ("net", "encoder_q."),
        ("backbone", ""),
        ("weights of my thesis", "module."),
    ],
)
def test_wrappers_prefixes_and_heads_are_seen_through(tmp_path, capsys, wrap, prefix):
    net = face_network().eval()
    model = FaceClassifier.create("resnet18", 7, 3, pretrained=checkpoint(tmp_path, net, wrap, prefix)).eval()
    said = capsys.readouterr().out
    assert "resnet18: 120 of 120 tensors found in" in said and f"not used: {prefix}fc.weight, {prefix}fc.bias" in said
    x = torch.randn(2, 3, 48, 48)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(model.encoder(x), net(x), atol=1e-5)


def test_a_colour_stem_answers_grey_pictures_as_before_and_back(tmp_path):
    net, grey = face_network().eval(), torch.randn(2, 1, 48, 48)
    model = FaceClassifier.create("resnet18", 7, 1, pretrained=checkpoint(tmp_path, net)).eval()
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(model.encoder(grey), net(grey.repeat(1, 3, 1, 1)), atol=1e-4)
        save_file(model.state_dict(), tmp_path / "grey.safetensors")
        back = FaceClassifier.create("resnet18", 7, 3, pretrained=tmp_path / "grey.safetensors").eval()
        assert torch.allclose(back.encoder(grey.repeat(1, 3, 1, 1)), model.encoder(grey), atol=1e-4)


def test_a_deeper_network_is_refused_whatever_its_names(tmp_path):
    "Layers of a Sequential are numbered, so those of a deeper one have names at the top"
    shallow, deep = (torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(n)]) for n in (4, 8))
    torch.save(deep.state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match="8 of 8 tensors found in .*: these are the weights of a deeper network"):
        load_encoder(shallow, tmp_path / "deep.pth")


def test_the_head_of_a_network_made_by_a_function_is_not_used(tmp_path):
    state = torchvision.models.resnet18().state_dict() | {"fc.weight": torch.full((1000, 512), torch.nan)}
    torch.save(state, tmp_path / "head.pth")
    model = FaceClassifier.create(torchvision.models.resnet18, 7, 3, pretrained=tmp_path / "head.pth")
    assert torch.equal(model.state_dict()["encoder.0.0.weight"], state["conv1.weight"])


class Maps(torch.nn.Module):
    "A backbone of one's own that gives feature maps"

    def __init__(self):
        super().__init__()
        self.stem, self.last = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3)

    def forward(self, x):
        return self.last(self.stem(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_a_function_or_of_a_module_with_maps_have_the_names_of_their_network(tmp_path, channels):
    net = face_network()
    x = torch.randn(2, channels, 64, 64)
    model = FaceClassifier.create(torchvision.models.resnet18, 7, channels, pretrained=checkpoint(tmp_path, net))
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(model.eval().encoder(x), net.eval()(x.expand(-1, 3, -1, -1)), atol=1e-4)
    torch.save(model.state_dict(), tmp_path / "saved.pth")  # the names of the body, as `learn.save` writes them
    again = FaceClassifier.create(torchvision.models.resnet18, 7, channels, pretrained=tmp_path / "saved.pth")
    with torch.no_grad():
        assert torch.allclose(again.eval().encoder(x), model.encoder(x), atol=1e-5)


def test_weights_of_a_module_with_maps_have_its_own_names(tmp_path):
    maps, x = Maps(), torch.randn(2, 3, 64, 64)
    model = FaceClassifier.create(Maps(), 7, 3, pretrained=checkpoint(tmp_path, maps)).eval()
    with torch.no_grad():
        assert torch.allclose(model.encoder(x), maps(x).mean((2, 3)), atol=1e-5)


def test_both_encoders_start_from_the_file(tmp_path):
    model = ECANModel("resnet18", 7, 1, pretrained=checkpoint(tmp_path, face_network()))
    assert all(
        torch.equal(a, b) for a, b in zip(model.encoder.state_dict().values(), model.key_encoder.state_dict().values())
    )
    assert not torch.equal(model.encoder.conv1.weight, ECANModel("resnet18", 7, 1).encoder.conv1.weight)


def test_too_few_matches_are_refused_and_nothing_is_loaded(tmp_path):
    encoder = FaceClassifier.create("resnet34", 7, 3).encoder
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    net = {k: v for k, v in face_network().state_dict().items() if k.startswith(("layer1", "conv1", "bn1"))}
    torch.save(net, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="of 216 tensors found in .*part.pth; expected at least half"):
        load_encoder(encoder, tmp_path / "part.pth")
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="^0 of 216"):
        load_encoder(encoder, tmp_path / "other.pth")


def test_a_deeper_network_is_refused_and_of_two_encoders_the_first_is_taken(tmp_path, capsys):
    encoder = FaceClassifier.create("resnet18", 7, 3).encoder
    torch.save(torchvision.models.resnet34(num_classes=5).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(
        ValueError,
        match="120 of 120 tensors found in .*deep.pth; not used: .* and 94 more: these are the weights of a deeper",
    ):
        load_encoder(encoder, tmp_path / "deep.pth")
    query, key = face_network(), torchvision.models.resnet18(num_classes=100)
    torch.save(
        {
            "state_dict": {
                f"module.encoder_{name}.{k}": v
                for name, net in (("q", query), ("k", key))
                for k, v in net.state_dict().items()
            }
        },
        tmp_path / "moco.pth",
    )
    assert "under 'module.encoder_q.'" in load_encoder(encoder, tmp_path / "moco.pth") and torch.equal(
        encoder.conv1.weight, query.conv1.weight
    )


@pytest.mark.parametrize("copy_first", [False, True])
def test_a_copy_beside_the_encoder_is_left_out(tmp_path, copy_first):
    encoder, net = FaceClassifier.create("resnet18", 7, 3).encoder, face_network()
    state, ema = net.state_dict(), {f"ema.{k}": v + 1 for k, v in net.state_dict().items()}
    torch.save({**ema, **state} if copy_first else {**state, **ema}, tmp_path / "ema.pth")
    said = load_encoder(encoder, tmp_path / "ema.pth")
    assert "120 of 120" in said and f".bias, {'conv1.weight' if copy_first else 'ema.conv1.weight'}" in said
    assert torch.equal(encoder.conv1.weight, net.conv1.weight + copy_first)


def test_values_that_are_not_finite_are_refused_where_they_would_be_used(tmp_path):
    encoder, state = FaceClassifier.create("resnet18", 7, 3).encoder, face_network().state_dict()
    before = encoder.conv1.weight.clone()
    torch.save({**state, "fc.bias": torch.full((7,), torch.nan)}, tmp_path / "head.pth")
    assert "120 of 120" in load_encoder(encoder, tmp_path / "head.pth")
    encoder.conv1.weight.data = before
    torch.save({**state, "conv1.weight": torch.full((64, 3, 7, 7), torch.inf)}, tmp_path / "body.pth")
    with pytest.raises(ValueError, match="body.pth has values in conv1.weight that are not finite numbers"):
        load_encoder(encoder, tmp_path / "body.pth")
    assert torch.equal(encoder.conv1.weight, before)


class Harmful:
    def __reduce__(self):
        return print, ("harm done",)


def test_files_that_are_no_weights_are_named_and_run_no_code(tmp_path, capsys):
    encoder = FaceClassifier.create("resnet18", 7, 3).encoder
    with pytest.raises(FileNotFoundError, match="no such file: .*none.pth"):
        load_encoder(encoder, tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="is not the folder of a finished run"):
        load_encoder(encoder, tmp_path)
    for name in ("a.pth", "a.safetensors"):
        for content in (b"nonsense", b"", b"read me", b"hello", b"a,b", b"state"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is no file of weights"):
                load_encoder(encoder, tmp_path / name)
    torch.save({"state_dict": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth is no file of weights, or needs code to load"):
        load_encoder(encoder, tmp_path / "bad.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds no tensors with names: expected the weights of a model"):
        load_encoder(encoder, tmp_path / "list.pth")
    assert "harm done" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,maker", [("ecan", ecan_learner), ("baseline", baseline_learner), ("ecan", baseline_learner)]
)
def test_a_run_is_fine_tuned_to_other_classes(faces, tmp_path, make_dls, capsys, method, maker):
    from dataclasses import replace

    from ecan_fastai.loaders import ExpressionDataLoaders
    from ecan_fastai.readers.folder import folder_faces

    start_run(small_config(faces, method, arch="resnet18"), tmp_path / "run")
    moods = [replace(f, label="good" if f.label == "happy" else "bad") for f in folder_faces(faces)]
    dls = ExpressionDataLoaders.from_faces(
        moods,
        size=32,
        channels=1,
        recipe="fer2013",
        level="weak",
        bs=16,
        num_workers=0,
        device="cpu",
        n_views=2 if maker is ecan_learner else 1,
    )
    learn = maker(dls, pretrained=tmp_path / "run", path=tmp_path)
    assert "120 of 120 tensors found in" in capsys.readouterr().out
    start = learn.model.encoder.conv1.weight.clone()
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.fit(1, 0.01)
    assert (
        torch.equal(start, learn.model.encoder.conv1.weight) and learn.model.classifier.out_features == 2
    )  # frozen at first
    learn.fine_tune(1, 0.01)
    assert not torch.equal(start, learn.model.encoder.conv1.weight)


@pytest.mark.slow
def test_a_run_starts_from_another_and_resumes_without_it(faces, tmp_path, monkeypatch):
    start_run(small_config(faces), tmp_path / "first")
    second = small_config(faces, epochs=2, pretrained=str(tmp_path / "first"))

    class Stop(runs.RunState):
        def after_epoch(self):
            super().after_epoch()
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(runs, "RunState", Stop)
        with pytest.raises(KeyboardInterrupt):
            start_run(second, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert resume_run(tmp_path / "second")["epochs"] == 2
    assert json.loads((tmp_path / "second" / "config.json").read_text())["config"]["pretrained"] == str(
        tmp_path / "first"
    )


def test_a_checkpoint_with_other_things_in_it_names_them(tmp_path):
    torch.save({"state_dict": face_network().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net.pth .* needs code to load \(argparse.Namespace\).* state dict alone"):
        FaceClassifier.create("resnet18", pretrained=tmp_path / "net.pth")


def test_empty_weights_are_no_weights(faces):
    with pytest.raises(ValueError, match="pretrained is empty"):
        FaceClassifier.create("resnet18", pretrained="")
    with pytest.raises(ValueError, match="pretrained is empty"):
        resolve_config(small_config(faces, kind="folder", pretrained=""))
