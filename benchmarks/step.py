"""A training step of ECAN against plain cross-entropy on the same backbone, against its ideal (one more forward pass
and the EMA), against itself inside a fastai Learner, and of the backbone against plain timm in PyTorch."""

import warnings
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders

from benchmarks.common import alternate, arguments, parser, peak_memory, report, table
from ecan_fastai.callbacks import CPUMixedPrecision
from ecan_fastai.layers import channels_last_is_faster, fast_precision
from ecan_fastai.learner import baseline_learner, ecan_learner
from ecan_fastai.losses import ECANLoss

CE, ECAN, KEYS, EMA = "cross-entropy", "ECAN", "key encoder's forward pass", "EMA (foreach)"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Batches(list):
    "A loader of one batch, with what the learners ask of a loader"

    def __init__(self, x, y, device):
        super().__init__([(x, y)])
        self.bs, self.device, self.dataset = len(y), device, [((x[0][0].cpu(), x[1][0].cpu()), y[0].cpu())]

    def to(self, device):
        return self


def learners(given, bs):
    torch.manual_seed(0)
    shape = (bs, given.channels, given.size, given.size)
    pair = tuple(torch.randn(*shape, device=given.device) for _ in range(2))
    batch = Batches(pair, torch.randint(7, (bs,), device=given.device), given.device)
    dls = DataLoaders(batch, batch)
    dls.vocab, dls.n_inp = range(7), 1

    def make(learner):
        learn = learner(dls, given.arch)
        if given.channels_last:
            learn.add_cb(ChannelsLast())
        on_cpu = torch.device(given.device).type == "cpu"
        if given.precision != "fp32":
            learn.add_cb(CPUMixedPrecision() if on_cpu else MixedPrecision(given.precision))
        learn.remove_cb(learn.progress)
        return learn

    return make(baseline_learner), make(ecan_learner), pair, batch[0][1]


def autocast(given, precision):
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(given.device).type, DTYPES[precision])


def plain(model, loss, x, y, given, precision, after=lambda out: None):
    "A step in a loop of one's own"
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(torch.device(given.device).type, enabled=precision == "fp16")

    def f():
        with autocast(given, precision):
            out = model(x)
            value = loss(out, y)
        scaler.scale(value).backward()
        opt.step()  # fp16's unscaling is left out: the same for both methods
        opt.zero_grad()
        after(out)

    return f


def timm_steps(given, x, y):
    "Cross-entropy on the architecture as timm makes it, in each precision that is fast here and in both memory layouts"
    made = {}
    for precision in dict.fromkeys(("fp32", fast_precision(given.device))):
        for layout in ("", ", channels last"):
            model = timm.create_model(given.arch, num_classes=7, in_chans=given.channels).to(given.device)
            if layout:
                model.to(memory_format=torch.channels_last)
            images = x.contiguous(memory_format=torch.channels_last) if layout else x
            made[f"plain timm, {precision}{layout}"] = plain(model, F.cross_entropy, images, y, given, precision)
    return made


def in_learner(learn, batch):
    "The same step with fastai's events and this package's callbacks around it"
    learn.create_opt()
    learn.opt.set_hypers(wd=learn.wd)
    learn.n_epoch, learn.epoch, learn.dl, learn.n_iter = 1, 0, learn.dls.train, 1
    for event in ("before_fit", "before_epoch", "before_train"):
        learn(event)
    return lambda: learn.one_batch(0, batch)


def contenders(given, bs):
    baseline, ecan, pair, y = learners(given, bs)
    made = {
        f"{CE}, in a Learner": in_learner(baseline, (pair[0], y)),
        f"{ECAN}, in a Learner": in_learner(ecan, (pair, y)),
    }
    model = ecan.model
    while not model.bank.full:
        model.bank.push(model.keys(pair[1]), y)

    def moved(out):
        model.update_keys(0.999)
        model.bank.push(out["z_k"], y)

    if given.compile:
        baseline.model.encoder.compile(), model.encoder.compile(), model.key_encoder.compile()
    keys, queries = list(model.key_encoder.parameters()), list(model.encoder.parameters())

    def loop():
        with torch.no_grad():
            for k, q in zip(keys, queries):
                k.lerp_(q, 0.001)

    def key_pass():
        with autocast(given, given.precision):
            model.keys(pair[1])

    return {
        CE: plain(baseline.model, F.cross_entropy, pair[0], y, given, given.precision),
        ECAN: plain(model, ECANLoss(), pair, y, given, given.precision, moved),
        KEYS: key_pass,
        EMA: lambda: model.update_keys(0.999),
        "EMA, parameter by parameter": loop,
        **made,
        **timm_steps(given, pair[0], y),
    }


def rows_of(columns, memory, sizes):
    "The table's rows from median seconds and MiB by batch size"

    def cells(cell):
        return [cell(columns[bs]) for bs in sizes]

    rows = [[name, *cells(lambda c: f"{1e3 * c[name]:.1f} ({c[name] / c[CE]:.3f})")] for name in columns[sizes[0]]]

    def ideal(c):
        return c[CE] + c[KEYS] + c[EMA]

    def best_timm(c):
        return min(seconds for name, seconds in c.items() if name.startswith("plain timm"))

    rows.append([f"ideal: {CE} + {KEYS} + {EMA}", *cells(lambda c: f"{1e3 * ideal(c):.1f} ({ideal(c) / c[CE]:.3f})")])
    rows.append([f"{ECAN} over its ideal", *cells(lambda c: f"{c[ECAN] / ideal(c):.3f}")])
    for name in (CE, ECAN):
        rows.append(
            [f"Learner over plain loop, {name}", *cells(lambda c: f"{c[name + ', in a Learner'] / c[name]:.3f}")]
        )
    rows.append([f"fastest plain timm over {CE}", *cells(lambda c: f"{best_timm(c) / c[CE]:.3f}")])
    rows.append([f"images a second, {CE}", *[f"{bs / columns[bs][CE]:.0f}" for bs in sizes]])
    for name in (CE, ECAN):
        rows.append([f"memory of {name}, MiB", *[f"{memory[bs][name]:.0f}" for bs in sizes]])
    return rows


def main():
    p = parser("step", __doc__)
    p.add_argument("--bs", type=int, nargs="*", default=[8, 128, 256])
    p.add_argument("--arch", default="resnet18")
    p.add_argument("--size", type=int, default=48)
    p.add_argument("--channels", type=int, default=1)
    p.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile for the encoders")
    given = arguments(p)
    if given.precision == "auto":
        given.precision = fast_precision(given.device)
    given.channels_last = channels_last_is_faster(given.device, given.precision)
    warnings.simplefilter("ignore")
    columns, memory = {}, {}
    for bs in given.bs:
        made = contenders(given, bs)
        columns[bs] = alternate(made, given.rounds, given.device, seconds_each=0.5)
        memory[bs] = {name: peak_memory(made[name], given.device) / 2**20 for name in (CE, ECAN)}
    settings = [given.arch, f"{given.channels}x{given.size}x{given.size}", given.precision]
    settings += ["channels last"] * given.channels_last + ["compiled"] * given.compile
    about = "milliseconds, in brackets times cross-entropy; memory is what a step takes above what it starts with"
    header = ["", *[f"batch {bs}" for bs in given.bs]]
    body = table(header, rows_of(columns, memory, given.bs))
    name = "-".join(["step"] + [s for s in (given.arch, given.precision) if s not in ("resnet18", "fp32")])
    report(
        "step",
        "Step: ECAN against cross-entropy",
        [f"{', '.join(settings)}: {about}", body],
        given.device,
        given.save,
        name=name,
    )


if __name__ == "__main__":
    main()
