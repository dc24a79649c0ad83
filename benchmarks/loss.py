"""Forward and backward of ENSC, 2 x 256 anchors, 7 classes as unequal as RAF-DB's, against its peers and against
the bare matrix product as the limit."""

import importlib.util
import warnings

import torch
import torch.nn.functional as F

from benchmarks.common import alternate, arguments, parser, peak_memory, report, table
from ecan_fastai.losses import ensc_loss

RAFDB = torch.tensor([4772, 2524, 1982, 1290, 717, 705, 281.0])  # training images a class


def draw(n, d, device):
    return F.normalize(torch.randn(n, d, device=device), dim=1), torch.multinomial(
        RAFDB.to(device), n, replacement=True
    ) if n else torch.zeros(0, dtype=torch.long, device=device)


def masked(z, y, bank_z, bank_y, temperature):
    "The obvious code: all similarities, masks, logsumexp"
    z, bank_z = F.normalize(z, dim=1), F.normalize(bank_z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (y[:, None] == y) & ~own
    sim = z @ z.T / temperature
    extra = (z @ bank_z.T / temperature).masked_fill(y[:, None] == bank_y, -torch.inf)
    log_p = sim - torch.cat([sim.masked_fill(own, -torch.inf), extra], 1).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    return -(log_p * positive).sum(1).div(count.clamp(min=1)).sum() / (count > 0).sum()


def metric_learning(temperature):
    "pytorch-metric-learning's SupConLoss with the pairs of ENSC, which it is told by indices"
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature)

    def f(z, y, bank_z, bank_y):
        ref, labels = torch.cat([z, bank_z]), torch.cat([y, bank_y])
        same = y[:, None] == labels
        positive, negative = same.clone(), ~same
        positive[:, len(z) :] = False
        positive.fill_diagonal_(False)
        return loss(z, y, (*positive.nonzero(as_tuple=True), *negative.nonzero(as_tuple=True)), ref, labels)

    return f


def cross_batch_memory(temperature, bank_z, bank_y):
    "Its CrossBatchMemory around SupConLoss: the memory's entries are positives too, so this is another loss"
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss

    loss = CrossBatchMemory(SupConLoss(temperature), bank_z.shape[1], memory_size=len(bank_z))
    for i in range(0, len(bank_z), 4096):
        loss.add_to_memory(bank_z[i : i + 4096], bank_y[i : i + 4096], len(bank_z[i : i + 4096]))
    return lambda z, y, *_: loss(z, y)


def lightly_ntxent(temperature, bank_z):
    "lightly's NTXentLoss with its bank: self-supervised, 256 anchors instead of 512"
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature, memory_bank_size=(len(bank_z), bank_z.shape[1])).to(bank_z.device)
    return lambda z, y, *_: loss(*z.chunk(2))


def supcontrast(path, temperature):
    "The loss of SupContrast's losses.py, in-batch alone"
    spec = importlib.util.spec_from_file_location("supcontrast", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.SupConLoss(temperature, base_temperature=temperature)
    return lambda z, y, *_: loss(torch.stack(z.chunk(2), 1), y[: len(y) // 2])


def contenders(z, y, bank_z, bank_y, temperature, supcontrast_file):
    def step(loss):
        def f():
            z.grad = None
            loss(z, y, bank_z, bank_y).backward()

        return f

    keys = torch.cat([z.detach(), bank_z])

    def limit():
        sim = z @ keys.T
        torch.autograd.grad(sim, z, sim.detach())

    made = {
        "limit: product, forward and backward": limit,
        "ecan_fastai": step(lambda *a: ensc_loss(*a, temperature)),
        "masked, obvious": step(lambda *a: masked(*a, temperature)),
    }
    others = {"pytorch-metric-learning SupConLoss": lambda: metric_learning(temperature)}
    if len(bank_z):
        others |= {
            "pytorch-metric-learning CrossBatchMemory *": lambda: cross_batch_memory(temperature, bank_z, bank_y),
            "lightly NTXentLoss *": lambda: lightly_ntxent(temperature, bank_z),
        }
    elif supcontrast_file:
        others |= {"SupContrast": lambda: supcontrast(supcontrast_file, temperature)}
    for name, make in others.items():
        try:
            made[name] = step(make())
        except ImportError as e:
            print(f"{name} left out: {e}")
    return made


def error(z, y, bank_z, bank_y, temperature):
    "Relative error of value and gradient against the masked code in float64"

    def both(loss, z, bank_z):
        z = z.detach().clone().requires_grad_()
        value = loss(z, y, bank_z, bank_y, temperature)
        return value.detach(), torch.autograd.grad(value, z)[0]

    (v, g), (v0, g0) = both(ensc_loss, z, bank_z), both(masked, z.double(), bank_z.double())
    return float((v - v0).abs() / v0), float((g - g0).abs().max() / g0.abs().max())


def main():
    p = parser("loss", __doc__)
    p.add_argument("--banks", type=int, nargs="*", default=[0, 1280, 4096, 16384, 65536])
    p.add_argument("--dims", type=int, nargs="*", default=[128, 512])
    p.add_argument("--temperature", type=float, default=0.1)
    p.add_argument("--supcontrast", metavar="FILE", help="losses.py of SupContrast, which is not on PyPI")
    args = arguments(p)
    warnings.simplefilter("ignore")
    parts, errors = [], []
    for d in args.dims:
        columns, memory = {}, {}
        for bank in args.banks:
            torch.manual_seed(0)
            (z, y), (bank_z, bank_y) = draw(256, d, args.device), draw(bank, d, args.device)
            z, y = torch.cat([z, F.normalize(z + torch.randn_like(z), dim=1)]).requires_grad_(), y.repeat(2)
            made = contenders(z, y, bank_z, bank_y, args.temperature, args.supcontrast)
            columns[bank] = alternate(made, args.rounds, args.device)
            memory[bank] = {name: peak_memory(f, args.device) for name, f in made.items()}
            if bank <= 16384:
                errors += [(d, bank, t, *error(z, y, bank_z, bank_y, t)) for t in (0.05, 0.1)]
        names = list(dict.fromkeys(n for c in columns.values() for n in c))

        def cell(bank, name):
            if name not in columns[bank]:
                return ""
            t, limit = columns[bank][name], columns[bank]["limit: product, forward and backward"]
            return f"{1e3 * t:.1f} ({t / limit:.2f})"

        header = [f"d = {d}", *[f"bank {b}" for b in args.banks]]
        parts.append(
            "Milliseconds, in brackets times the limit\n\n"
            + table(header, [[n, *[cell(b, n) for b in args.banks]] for n in names])
        )
        parts.append(
            "Peak memory, MiB\n\n"
            + table(
                header,
                [[n, *[f"{memory[b][n] / 2**20:.0f}" if n in memory[b] else "" for b in args.banks]] for n in names],
            )
        )
    parts.append(
        "Largest relative error of ecan_fastai in float32 against float64, over all rows up to a bank of 16,384 at "
        "temperatures 0.05 and 0.1: "
        f"value {max(e[3] for e in errors):.1e}, gradient {max(e[4] for e in errors):.1e}"
    )
    parts.append(
        "\\* another loss: CrossBatchMemory takes the memory's entries as positives too, lightly's has 256 anchors "
        "and no labels"
    )
    report(
        "loss", "Loss: ENSC forward and backward", parts, args.device, args.save, ("pytorch-metric-learning", "lightly")
    )


if __name__ == "__main__":
    main()
