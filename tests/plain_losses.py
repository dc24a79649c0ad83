"""The contrastive losses as one writes them first: a matrix of all similarities, a mask, logsumexp, and autograd.
Twin of the streamed code, values and gradients."""

import torch
import torch.nn.functional as F


def contrast(z, y, temperature, normalize=True, bank_z=None, bank_y=None, bank_positives=None, anchors_only=False):
    """Mean over anchors with a positive, that is with the same `y`; with `bank_y` only bank rows of another label
    are negatives, and those of the own label positives for classes that are True in `bank_positives`; with
    `anchors_only` what an anchor is compared with is constant"""
    if bank_z is None:
        bank_z = z[:0].detach()
    if normalize:
        z, bank_z = F.normalize(z, dim=1), F.normalize(bank_z, dim=1)
    own = torch.eye(len(z), dtype=torch.bool)
    positive = (y[:, None] == y) & ~own
    sim = z @ (z.detach() if anchors_only else z).T / temperature
    extra = z @ bank_z.T / temperature
    if bank_y is not None:
        same = y[:, None] == bank_y
        joined = (
            same & (torch.zeros_like(y, dtype=torch.bool) if bank_positives is None else bank_positives[y])[:, None]
        )
        positive, sim_all = torch.cat([positive, joined], 1), torch.cat([sim, extra], 1)
        extra = extra.masked_fill(same & ~joined, -torch.inf)
    else:
        sim_all = sim
    log_p = sim_all - torch.cat([sim.masked_fill(own, -torch.inf), extra], 1).logsumexp(1, keepdim=True)
    losses = [-log_p[i][positive[i]].mean() for i in range(len(z)) if positive[i].any()]
    return torch.stack(losses).mean() if losses else 0 * z.sum()
