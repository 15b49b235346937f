"""Codes from real outputs or features without labels: rotations of outputs, and projections of features.

A rotation keeps all distances between outputs, but it changes how much is lost by taking signs. With each row z scaled
to the length sqrt(K), H2Q and ITQ both look for the orthogonal R with the least

    mean over rows and bits of (z R - sign(z R))^2

by different methods. Sources: H2Q, Schwengber et al. 2023 (arXiv 2311.04207), Lucas-Schwengber/h2q; ITQ and PCA, Gong
and Lazebnik 2011; LSH, Charikar 2002. Everything is computed in float64 on the CPU.

Shape suffixes: N rows, D features, K bits.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["householder_rotation", "itq_rotation", "principal_directions", "quantisation_error", "random_hyperplanes"]

Reals = npt.NDArray[np.float64]

_BATCH, _RATE = 128, 1.0  # rows of a gradient step of H2Q, and its learning rate: the authors' values


def quantisation_error(z_NK: npt.ArrayLike) -> float:
    """Return the mean of (z - sign z)^2 over bits and rows scaled to the length sqrt(K); 0 at best, below 2.

    Raises:
        ValueError: for anything but a finite (N, K) with N, K >= 1.
    """
    z = _on_sphere(z_NK)
    return float(((z - np.where(z > 0, 1.0, -1.0)) ** 2).mean())


def itq_rotation(z_NK: npt.ArrayLike, *, iterations: int = 50, seed: int = 0) -> Reals:
    """Find the orthogonal (K, K) of iterative quantisation: signs, and the rotation that fits them best, by turns.

    Args:
        z_NK: real outputs (N, K).
        iterations: turns; the authors' default.
        seed: of the random rotation from which it starts.

    Raises:
        ValueError: as `quantisation_error`.
    """
    z = _on_sphere(z_NK)
    bits = z.shape[1]
    # A random orthogonal matrix to start from, as the authors take.
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((bits, bits)))
    for _ in range(iterations):
        signs = np.where(z @ rotation > 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(z.T @ signs)
        # The orthogonal matrix that brings z nearest to the signs (orthogonal Procrustes problem).
        rotation = left @ right
    return np.asarray(rotation, np.float64)


def householder_rotation(
    z_NK: npt.ArrayLike, *, epochs: int = 150, seed: int = 0, advance: Callable[[int], object] = lambda epochs: None
) -> Reals:
    """Learn the orthogonal (K, K) of H2Q, a product of K Householder reflections, by stochastic gradient descent.

    Returns the rotation of the epoch with the least error on all rows.

    Args:
        z_NK: real outputs (N, K).
        epochs: 150 are the authors' default.
        seed: of the order of the rows.
        advance: called after each epoch with the number of those that are done.

    Raises:
        ValueError: as `quantisation_error`.
    """
    z = torch.from_numpy(_on_sphere(z_NK))
    order = torch.Generator().manual_seed(seed)
    vectors = torch.eye(z.shape[1], dtype=torch.float64, requires_grad=True)
    least, best = float("inf"), torch.eye(z.shape[1], dtype=torch.float64)
    for epoch in range(epochs):
        for rows in torch.split(torch.randperm(len(z), generator=order), _BATCH):
            (gradient,) = torch.autograd.grad(_error(z[rows], reflected(vectors)), vectors)
            with torch.no_grad():
                vectors -= _RATE * gradient
        with torch.no_grad():
            rotation = reflected(vectors)
            error = float(_error(z, rotation))
        if error < least:
            least, best = error, rotation
        advance(epoch + 1)
    return best.numpy()


def reflected(vectors_KK: Tensor) -> Tensor:
    """Return the product H_1 ... H_K of the reflections I - 2 v v^T / |v|^2 of the columns v, orthogonal (K, K).

    It is computed at once as I - V T V^T, with T^-1 = striu(V^T V) + I / 2 for columns of length 1 (the UT transform of
    Joffrin et al. 2006), instead of by K products one after another.
    """
    v = vectors_KK / vectors_KK.norm(dim=0)
    eye = torch.eye(len(v), dtype=v.dtype)
    inverse = (v.T @ v).triu(1) + eye / 2
    product: Tensor = eye - v @ torch.linalg.solve_triangular(inverse, v.T, upper=True)
    return product


def principal_directions(x_ND: npt.ArrayLike, bits: int) -> tuple[Reals, Reals]:
    """Return the `bits` directions of the largest variance, (D, K), and the mean (D,) to subtract before.

    Raises:
        ValueError: for anything but a finite (N, D), and for more bits than min(N, D).
    """
    x = _checked(x_ND)
    if not 1 <= bits <= min(x.shape):
        raise ValueError(f"{x.shape[0]} rows of {x.shape[1]} features have no {bits} directions")
    mean = x.mean(0)
    # eigh orders the variances from the smallest up, so the largest are taken from the end.
    _, vectors = np.linalg.eigh(np.cov(x - mean, rowvar=False, bias=True).reshape(x.shape[1], x.shape[1]))
    return np.asarray(vectors[:, ::-1][:, :bits], np.float64), np.asarray(mean, np.float64)


def random_hyperplanes(x_ND: npt.ArrayLike, bits: int, *, seed: int = 0) -> tuple[Reals, Reals]:
    """Draw normals of random hyperplanes through the mean from N(0, 1), (D, K); return them and that mean (D,).

    Raises:
        ValueError: for anything but a finite (N, D), and for fewer than 1 bit.
    """
    x = _checked(x_ND)
    if bits < 1:
        raise ValueError(f"bits must be at least 1: got {bits}")
    return np.random.default_rng(seed).standard_normal((x.shape[1], bits)), np.asarray(x.mean(0), np.float64)


def _error(z_NK: Tensor, rotation_KK: Tensor) -> Tensor:
    turned = z_NK @ rotation_KK
    error: Tensor = ((turned - torch.where(turned > 0, 1.0, -1.0)) ** 2).mean()
    return error


def _on_sphere(z_NK: npt.ArrayLike) -> Reals:
    """Scale rows to the length sqrt(K); rows of zeros stay."""
    z = _checked(z_NK)
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    return np.asarray(z * (np.sqrt(z.shape[1]) / np.where(norms > 0, norms, 1)), np.float64)


def _checked(values: npt.ArrayLike) -> Reals:
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a matrix with rows and columns: got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("expected finite values")
    return array
