"""The paper's equations in NumPy float64, term by term with plain loops: the twin that the package's losses are
compared with."""

import numpy as np


def unit(z):
    return z / np.sqrt((z**2).sum(1, keepdims=True))


def contrast(z, y, tau, bank=None, allowed=lambda i, m: True, positives=None, normalize=True, also=lambda i, m: False):
    """Mean over anchors that have a positive; `allowed(i, m)` says whether bank entry m is in anchor i's
    denominator, `also(i, m)` whether it is a positive too"""
    z = np.asarray(z, np.float64)
    bank = np.zeros((0, z.shape[1])) if bank is None else np.asarray(bank, np.float64)
    if normalize:
        z, bank = unit(z), unit(bank)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        mine = [p for p in others if (positives[p] == positives[i] if positives is not None else y[p] == y[i])]
        more = [m for m in range(len(bank)) if also(i, m)]
        if not mine and not more:
            continue
        below = sum(np.exp(z[i] @ z[a] / tau) for a in others) + sum(
            np.exp(z[i] @ bank[m] / tau) for m in range(len(bank)) if allowed(i, m) or also(i, m)
        )
        near = [z[p] for p in mine] + [bank[m] for m in more]
        losses.append(-sum(np.log(np.exp(z[i] @ p / tau) / below) for p in near) / len(near))
    return np.mean(losses) if losses else 0.0


def selfcon(z_q, z_k, tau):  # Eq. 3
    n = len(z_q)
    return contrast(np.concatenate([z_q, z_k]), None, tau, positives=list(range(n)) * 2)


def supcon(z, y, tau, **kw):
    return contrast(z, y, tau, **kw)  # Eq. 4


def esc(z, y, bank, tau, **kw):
    return contrast(z, y, tau, bank, **kw)  # Eq. 5


def ensc(z, y, bank, bank_y, tau, **kw):
    return contrast(z, y, tau, bank, lambda i, m: y[i] != bank_y[m], **kw)  # Eq. 6


def ensc_with_positives(z, y, bank, bank_y, tau, classes, **kw):
    return ensc(z, y, bank, bank_y, tau, also=lambda i, m: y[i] == bank_y[m] and classes[y[i]], **kw)


def distances(x, y, c):
    return sum(((np.asarray(x[i], np.float64) - np.asarray(c[y[i]], np.float64)) ** 2).sum() for i in range(len(x)))


def center(x, y, c):
    return distances(x, y, c) / (2 * len(x))  # Eq. 7


def affinity(x, y, c, reduction="mean"):  # Eq. 8
    c = np.asarray(c, np.float64)
    mean = c.sum(0) / len(c)
    variance = sum(((row - mean) ** 2).sum() for row in c) / (len(c) - 1)
    return distances(x, y, c) / variance / (len(x) if reduction == "mean" else 1)


def alpha(losses):  # Eq. 9
    mean = sum(losses) / len(losses)
    return 1 + sum((l - mean) ** 2 for l in losses) / len(losses)


def mva(x, y, c, groups, labels, reduction="mean"):  # Eq. 10
    losses = [affinity(x, y, c, reduction)] + [affinity(g, l, c, reduction) for g, l in zip(groups, labels)]
    return alpha(losses) * losses[0]


def cross_entropy(logits, y):
    logits = np.asarray(logits, np.float64)
    return -np.mean([np.log(np.exp(row[t]) / np.exp(row).sum()) for row, t in zip(logits, y)])
