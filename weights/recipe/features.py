"""A Fréchet distance between sets of pictures on stated features: no trained network, nothing to download.

The usual one (Heusel et al. 2017) takes the features of an Inception network trained on photographs, which would have
to be fetched and knows no emoji. Here a picture is described by 80 numbers that can be named:

    48  mean colours on a grid of 4 × 4: what is where, in which colour
    16  root mean square of the steps between neighbouring pixels, on 4 × 4: how sharp the edges are, and where
    16  the same at a quarter of the size: the coarser shapes

Each is divided by its deviation over real pictures. So few numbers that 500 pictures determine their covariances. The
distance between Gaussians of these means and covariances is comparable only with others of the same list of pairs
and as many pictures, such as the one between two sets of real pictures, which is not 0 because sets are finite.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = 4


def _edges(images: Tensor) -> Tensor:
    """(N, GRID²): root mean square over channels, both directions and a field's pixels of the steps between pixels."""
    across = F.pad(images.diff(dim=3), (0, 1)).square()
    down = F.pad(images.diff(dim=2), (0, 0, 0, 1)).square()
    return F.adaptive_avg_pool2d((across + down).mean(dim=1, keepdim=True), GRID).sqrt().flatten(1)


def features(images: Tensor) -> Tensor:
    """float64 (N, 80) of images (N, 3, height, width) in [-1, 1], sides at least 16."""
    colours = F.adaptive_avg_pool2d(images, GRID).flatten(1)
    return torch.cat([colours, _edges(images), _edges(F.avg_pool2d(images, 4))], dim=1).double().cpu()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|m - n|² + tr(A + B - 2 (A^½ B A^½)^½) of the Gaussians fitted to two sets of features, float64 (N, D) and (M,
    D); Dowson & Landau 1982."""
    first, second = torch.cov(one.T), torch.cov(other.T)
    root = _square_root(first)
    between = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    means = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    return max(0.0, float(means + first.trace() + second.trace() - 2 * between))


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


class DistanceToReal:
    """The Fréchet distance of pictures to a fixed set of real ones, by whose deviations features are divided."""

    def __init__(self, real: Tensor) -> None:
        found = features(real)
        self.width = found.std(dim=0).clamp(min=1e-6)
        self.real = found / self.width

    def __call__(self, images: Tensor) -> float:
        return frechet_distance(features(images) / self.width, self.real)
