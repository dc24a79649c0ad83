"A training step of ECAN against plain cross-entropy on the same backbone, against its ideal (one more forward pass and the EMA), and against itself inside a fastai Learner."
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders

from benchmarks.common import alternate, arguments, parser, peak_memory, report, table
from ecan_fastai.callbacks import CPUMixedPrecision
from ecan_fastai.learner import baseline_learner, ecan_learner, paper_opt
from ecan_fastai.losses import ECANLoss

CE, ECAN, KEYS, EMA = "cross-entropy", "ECAN", "key encoder's forward pass", "EMA (foreach)"

class Batches(list):
    "A loader of one batch, with what the learners ask of a loader"
    def __init__(self, x, y, device): super().__init__([(x, y)]); self.bs, self.device, self.dataset = len(y), device, [((x[0][0], x[1][0]), y[0])]
    def to(self, device): return self

def learners(given, bs):
    torch.manual_seed(0)
    pair = tuple(torch.randn(bs, given.channels, given.size, given.size, device=given.device) for _ in range(2))
    batch = Batches(pair, torch.randint(7, (bs,), device=given.device), given.device)
    dls = DataLoaders(batch, batch)
    dls.vocab, dls.n_inp = range(7), 1
    def make(learner):
        learn = learner(dls, given.arch)
        if given.channels_last: learn.add_cb(ChannelsLast())
        if given.precision != "fp32": learn.add_cb(MixedPrecision(given.precision) if torch.device(given.device).type == "cuda" else CPUMixedPrecision())
        learn.remove_cb(learn.progress)
        return learn
    return make(baseline_learner), make(ecan_learner), pair, batch[0][1]

def plain(model, loss, x, y, given, after=lambda out: None):
    "A step in a loop of one's own"
    params = [p for p in model.parameters() if p.requires_grad]
    opt = paper_opt["opt_func"](params, lr=1e-3, wd=5e-4)
    scaler = torch.amp.GradScaler(torch.device(given.device).type, enabled=given.precision == "fp16")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(given.precision)
    def f():
        with torch.autocast(torch.device(given.device).type, dtype) if dtype else nullcontext():
            out = model(x)
            value = loss(out, y)
        scaler.scale(value).backward()
        opt.step()  # fp16's unscaling is left out: the same for both methods
        opt.zero_grad()
        after(out)
    return f

def in_learner(learn, batch):
    "The same step with fastai's events and this package's callbacks around it"
    learn.create_opt()
    learn.opt.set_hypers(wd=learn.wd)
    learn.n_epoch, learn.epoch, learn.dl, learn.n_iter = 1, 0, learn.dls.train, 1
    for event in ("before_fit", "before_epoch", "before_train"): learn(event)
    return lambda: learn.one_batch(0, batch)

def contenders(given, bs):
    baseline, ecan, pair, y = learners(given, bs)
    made = {f"{CE}, in a Learner": in_learner(baseline, (pair[0], y)), f"{ECAN}, in a Learner": in_learner(ecan, (pair, y))}
    model = ecan.model
    while not model.bank.full: model.bank.push(model.keys(pair[1]), y)
    def moved(out):
        model.update_keys(0.999)
        model.bank.push(out["z_k"], y)
    if given.compile: baseline.model.encoder.compile(), model.encoder.compile(), model.key_encoder.compile()
    keys, queries = list(model.key_encoder.parameters()), list(model.encoder.parameters())
    def loop():
        with torch.no_grad():
            for k, q in zip(keys, queries): k.lerp_(q, 0.001)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(given.precision)
    def key_pass():
        with torch.autocast(torch.device(given.device).type, dtype) if dtype else nullcontext(): model.keys(pair[1])
    return {CE: plain(baseline.model, F.cross_entropy, pair[0], y, given), ECAN: plain(model, ECANLoss(), pair, y, given, moved),
            KEYS: key_pass, EMA: lambda: model.update_keys(0.999), "EMA, parameter by parameter": loop, **made}

def main():
    p = parser("step", __doc__)
    p.add_argument("--bs", type=int, nargs="*", default=[8, 128, 256])
    p.add_argument("--arch", default="resnet18")
    p.add_argument("--size", type=int, default=48)
    p.add_argument("--channels", type=int, default=1)
    p.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--compile", action="store_true", help="torch.compile for the encoders")
    given = arguments(p)
    warnings.simplefilter("ignore")
    columns, memory = {}, {}
    for bs in given.bs:
        made = contenders(given, bs)
        columns[bs] = alternate(made, given.rounds, given.device, seconds_each=0.5)
        memory[bs] = {name: peak_memory(made[name], given.device)/2**20 for name in (CE, ECAN)}
    rows = [[name, *[f"{1e3*columns[bs][name]:.1f} ({columns[bs][name]/columns[bs][CE]:.3f})" for bs in given.bs]] for name in columns[given.bs[0]]]
    ideal = {bs: c[CE]+c[KEYS]+c[EMA] for bs, c in columns.items()}
    rows.append([f"ideal: {CE} + {KEYS} + {EMA}", *[f"{1e3*ideal[bs]:.1f} ({ideal[bs]/columns[bs][CE]:.3f})" for bs in given.bs]])
    rows.append([f"{ECAN} over its ideal", *[f"{columns[bs][ECAN]/ideal[bs]:.3f}" for bs in given.bs]])
    for name in (CE, ECAN): rows.append([f"Learner over plain loop, {name}", *[f"{columns[bs][name + ', in a Learner']/columns[bs][name]:.3f}" for bs in given.bs]])
    rows.append([f"memory of {CE}, MiB", *[f"{memory[bs][CE]:.0f}" for bs in given.bs]])
    rows.append([f"memory of {ECAN}, MiB", *[f"{memory[bs][ECAN]:.0f}" for bs in given.bs]])
    title = f"{given.arch}, {given.channels}x{given.size}x{given.size}, {given.precision}{', channels last' if given.channels_last else ''}{', compiled' if given.compile else ''}: milliseconds, in brackets times cross-entropy; memory is what a step takes above what it starts with"
    report("step", "Step: ECAN against cross-entropy", [title, table(["", *[f"batch {bs}" for bs in given.bs]], rows)], given.device, given.save)

if __name__ == "__main__": main()
