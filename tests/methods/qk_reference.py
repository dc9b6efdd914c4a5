"""QK-Clip in NumPy and float64, from the formulas, and dense attention logits."""

import numpy as np


def scales(maxima, threshold=100.0):
    maxima = np.asarray(maxima, np.float64)
    above = np.isfinite(maxima) & (maxima > threshold)
    return np.where(above, threshold / np.where(above, maxima, 1.0), 1.0)


def mha(query, key, maxima, alpha=0.5):
    """Kernels of shape (in, heads, dim)."""
    gamma = scales(maxima)[None, :, None]
    return query * gamma**alpha, key * gamma ** (1 - alpha)


def gqa(query, key, maxima, alpha=0.5):
    gamma = scales(maxima)
    query, key = query.copy(), key.copy()
    size = query.shape[1] // key.shape[1]
    for group in range(key.shape[1]):
        heads = range(group * size, (group + 1) * size)
        shared = min(gamma[h] for h in heads) ** (1 - alpha)
        key[:, group] *= shared
        for h in heads:
            query[:, h] *= min(1.0, gamma[h] / shared)
    return query, key


def mla(query, key, rotary, maxima, alpha=0.5):
    gamma = scales(maxima)[None, :, None]
    return query * gamma**alpha, key * gamma ** (1 - alpha), rotary * gamma


def logits(query, key):
    """(batch, heads, queries, keys) of queries and keys (batch, length, heads, dim)."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])


def project(x, kernel, bias=0.0):
    return np.einsum("bli,ihd->blhd", x, np.asarray(kernel, np.float64)) + np.asarray(
        bias, np.float64
    )


def rotated(x):
    """Rotary embeddings of (batch, length, heads, dim)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 100.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * cos - second * sin, first * sin + second * cos], axis=-1
    )


def maxima(values):
    return values.max(axis=(0, 2, 3))
